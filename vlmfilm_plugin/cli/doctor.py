"""`vlmfilm doctor`: what would happen to a run started here and now, and where each setting comes from."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import platform
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vlmfilm_plugin import __version__
from vlmfilm_plugin.entry_points import HOSTS, STARTUP, installed
from vlmfilm_plugin.errors import VlmFilmError
from vlmfilm_plugin.settings.layers import layers_of, resolve
from vlmfilm_plugin.settings.mode import AUTOLOAD_VARIABLE, MODE_VARIABLE, is_autoload_on, read_mode
from vlmfilm_plugin.settings.port_names import without_effect

INTERRUPTED = "run it again"
_PACKAGES = ("torch", "transformers", "accelerate", "wrapt", "pluggy")


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser("doctor", help="show what a run started here would do, and why", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the report; exit 1 where something would stop a run."""
    report = examine()
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        _print(report)
    return 1 if report["problems"] else 0


def examine() -> dict[str, Any]:
    """Return the report: versions, activation, host adapters, settings with their origins, problems."""
    problems: list[str] = []
    packages = {name: _version(name) for name in _PACKAGES}
    report: dict[str, Any] = {"vlmfilm-plugin": __version__, "python": platform.python_version(), "packages": packages}
    report["activation"] = _activation(problems)
    report["adapters"] = {entry.name: entry.value for entry in installed(HOSTS)}
    settings = _attempt(lambda: resolve(layers_of(os.environ)), problems)
    if settings is not None:
        report["settings"] = {name: {"value": value, "from": settings.origin(name)} for name, value in settings.as_dict().items()}
        report["without effect"] = without_effect(settings)
    report["problems"] = problems
    return report


def _activation(problems: list[str]) -> dict[str, Any]:
    """Return what would become of `VLM_FILM_MODE`; what keeps the plugin from what it is asked for is a problem."""
    is_asked, is_free = MODE_VARIABLE in os.environ, is_autoload_on(os.environ)
    wrong = len(problems)
    mode = _attempt(read_mode, problems)
    entries = installed(STARTUP, "vlmfilm_plugin")
    gates = [entry for entry in entries if importlib.util.find_spec(entry.module) is not None]
    if not entries:
        problems.append("the entry point in `torch.backends` is missing: install the package with pip")
    for entry in entries:
        if entry not in gates:
            problems.append(f"`import torch` fails: {entry.value} is named by an entry point and is not there: install the package again")
    problems += _left_behind()
    off = f"{AUTOLOAD_VARIABLE}={os.environ.get(AUTOLOAD_VARIABLE)} keeps torch from starting the plugin"
    if is_asked and not is_free:
        problems.append(f"{off}, whatever {MODE_VARIABLE} says: take it out, or start the host with `vlmfilm run -- ...`")
    stopped = is_asked and len(problems) > wrong
    if gates:
        # The gate says these itself, on stderr, when torch is imported.
        for name, closest in importlib.import_module(gates[0].module).strangers(os.environ).items():
            problems.append(f"{name} is no variable of vlmfilm-plugin" + (f"; did you mean {closest}?" if closest else ""))
    state = f"NOT active, although {MODE_VARIABLE} is set" if stopped else f"active, mode {mode}" if is_asked else "dormant"
    if not is_asked and not is_free:
        state += f" ({off}: setting {MODE_VARIABLE} would not change that)"
    return {MODE_VARIABLE: mode, "state": state, "entry point": [entry.value for entry in entries], "autoload": is_free}


def _left_behind() -> list[str]:
    """Return what a killed pip has left: metadata under a name of pip's own, which torch would follow once the gate is gone."""
    places = sorted({Path(place) for place in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))})
    found = [path for place in places for path in place.glob("~*lmfilm_plugin-*.dist-info")]
    return [f"a pip that was killed has left {path}: delete this folder, or a later uninstall makes `import torch` fail" for path in found]


def _attempt(function: Any, problems: list[str]) -> Any:
    try:
        return function()
    except VlmFilmError as error:
        problems.append(f"{type(error).__name__}: {' '.join(str(error).split())}")
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _print(report: dict[str, Any]) -> None:
    print(f"vlmfilm-plugin {report['vlmfilm-plugin']}, Python {report['python']}")
    print("packages:   " + ", ".join(f"{name} {found or 'MISSING'}" for name, found in report["packages"].items()))
    print(f"activation: {report['activation']['state']}")
    print("host adapters:")
    for name, value in report["adapters"].items():
        print(f"  {name:<44} {value}")
    print("settings:")
    for name, entry in report.get("settings", {}).items():
        print(f"  {name:<32} {entry['value']!s:<36} ({entry['from']})")
    if report.get("without effect"):
        print(f"without effect: {report['without effect']}")
    print("problems:   " + ("none" if not report["problems"] else ""))
    for problem in report["problems"]:
        print(f"  {problem}")
