"""`vlmfilm doctor`: what would happen to a run started here and now, and where each setting comes from."""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from vlmfilm_plugin import __version__
from vlmfilm_plugin.entry_points import HOSTS, STARTUP, installed
from vlmfilm_plugin.errors import VlmFilmError
from vlmfilm_plugin.settings.layers import layers_of, resolve
from vlmfilm_plugin.settings.mode import MODE_VARIABLE, read_mode
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
    mode = _attempt(read_mode, problems)
    gate = [entry.value for entry in installed(STARTUP, "vlmfilm_plugin")]
    autoload = os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") != "0"
    if not gate:
        problems.append("the entry point in `torch.backends` is missing: install the package with pip")
    if not autoload:
        problems.append("TORCH_DEVICE_BACKEND_AUTOLOAD=0 keeps the plugin out: start the host with `vlmfilm run -- ...`")
    report["activation"] = {MODE_VARIABLE: mode, "state": f"active, mode {mode}" if mode else "dormant", "entry point": gate, "autoload": autoload}
    report["adapters"] = {entry.name: entry.value for entry in installed(HOSTS)}
    settings = _attempt(lambda: resolve(layers_of(os.environ)), problems)
    if settings is not None:
        report["settings"] = {name: {"value": value, "from": settings.origin(name)} for name, value in settings.as_dict().items()}
        report["without effect"] = without_effect(settings)
    report["problems"] = problems
    return report


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
