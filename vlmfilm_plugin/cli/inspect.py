"""`vlmfilm inspect -- COMMAND`, or `vlmfilm inspect module:factory --input SHAPE`: look at a UNet by one forward, and write a host adapter."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from vlmfilm_plugin.errors import HostError, SettingsError
from vlmfilm_plugin.files import new_file, refuse_to_replace
from vlmfilm_plugin.inspection.report import unets_from
from vlmfilm_plugin.settings.mode import AUTOLOAD_VARIABLE, HOSTS_VARIABLE, INSPECT_VARIABLE, MODE_VARIABLE

INTERRUPTED = "no file was written"
_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_WHAT = "the host adapter"
_EXAMPLES = """examples:
  vlmfilm inspect -o vlmfilm_adapter.py -- python train.py --config small.yaml
  VLM_FILM_HOSTS=./vlmfilm_adapter.py VLM_FILM_MODE=on python train.py --config small.yaml
  vlmfilm inspect nets:build --input 1,1,64,64 --input 1:int64 --input cond=1,1,64,64

The script runs as it is until its UNet has been called once, and is ended there. An input is a shape, with the type behind a colon (float32)
and the name of the argument before `=`; `:int64` alone is a number without dimensions. Numbers are drawn from a fixed seed, integers are 1.
"""
_POLL = 0.05


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "inspect",
        help="look at a UNet by one forward of your script, and write a starter host adapter",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_options(parser)
    parser.add_argument(
        "target", nargs=argparse.REMAINDER, metavar="-- COMMAND | module:factory", help="the script's command, or what builds the UNet"
    )
    parser.set_defaults(run=run)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", action="append", default=[], metavar="SHAPE", help="an argument of one call, in order: 1,1,64,64 or t=1:int64")
    parser.add_argument("--json", action="store_true", help="print what was seen as JSON")
    parser.add_argument("-o", "--output", type=Path, default=None, metavar="PATH", help="write a starter host adapter; never over a file")


def run(arguments: argparse.Namespace) -> int:
    """Look, print, and write; 1 where the script ran no UNet."""
    target = arguments.target
    if target and target[0] != "--" and _FACTORY.fullmatch(target[0]):
        rest = argparse.ArgumentParser(prog="vlmfilm inspect module:factory", add_help=False)
        _add_options(rest)
        more = rest.parse_args(target[1:])
        arguments.input += more.input
        arguments.json |= more.json
        arguments.output = more.output or arguments.output
        _check_output(arguments.output)
        return _show(_look_at_factory(target[0], arguments.input), arguments)
    command = target[1:] if target[:1] == ["--"] else target
    if not command:
        facts = {"expected": "vlmfilm inspect -- python train.py ..., or vlmfilm inspect module:factory --input 1,1,64,64"}
        raise SettingsError("there is nothing to inspect", facts, "put the command after `--`")
    if arguments.input:
        facts = {"found": f"--input {arguments.input[0]} with a command", "expected": "the script's own inputs, or module:factory"}
        raise SettingsError("cannot use --input", facts, "take it out")
    _check_output(arguments.output)
    return _show(_look_at_run(command), arguments)


def _check_output(path: Path | None) -> None:
    if path is not None:
        if path.suffix != ".py":
            facts = {"file": path, "expected": "a name that ends in .py"}
            raise SettingsError(f"cannot write {_WHAT}: {HOSTS_VARIABLE} takes Python files", facts, "give another path")
        refuse_to_replace(path, _WHAT, error=SettingsError)


def _show(content: dict[str, Any], arguments: argparse.Namespace) -> int:
    adapter, script = content.pop("adapter", ""), content.pop("command", "")
    if arguments.json:
        print(json.dumps(content))
    else:
        print(str(unets_from(content)) + _facts(content.get("run")) if content["unets"] else content["text"])
    if not content["unets"]:
        return 1
    if arguments.output is None:
        return 0
    from vlmfilm_plugin.inspection.starter import placed

    if not adapter:
        print(f"vlmfilm inspect: no host adapter was written: {content['no_adapter']}", file=sys.stderr)
        return 1
    with new_file(arguments.output, _WHAT, error=SettingsError) as file:
        file.write(placed(adapter, script, _here(arguments.output)).encode())
    print(
        f"wrote {arguments.output}; read it, then: {HOSTS_VARIABLE}={_here(arguments.output)} {MODE_VARIABLE}=on {script}".rstrip(), file=sys.stderr
    )
    return 0


def _here(path: Path) -> str:
    return str(path) if path.is_absolute() else f"./{path}"


def _facts(facts: dict[str, Any] | None) -> str:
    if facts is None:
        return ""
    step = facts["step"]["name"] if facts["step"] else "none that a host adapter can name: the UNet's own call is taken for one"
    condition = facts["condition"]
    proved = "" if condition is None or condition["proved"] else " (by its name)"
    lines = {
        "step": step,
        "images of the batch": facts["image"] or "not found",
        "condition image": f"{condition['in']}{proved}" if condition else "not found in the UNet's arguments",
        "rows are named by": f"{facts['rows']['named_by']}: {facts['rows']['why']}",
        "called by": " > ".join(each["name"] for each in facts["callers"]),
        **{f"optimizer {number}": text for number, text in enumerate(facts["optimizers"])},
        **{f"checkpoint call {number}": text for number, text in enumerate(facts["checkpoints"])},
    }
    width = max(map(len, lines)) + 1
    return "\n\n" + "\n".join(f"{label + ':':<{width}} {text}" for label, text in lines.items())


def _look_at_factory(target: str, inputs: list[str]) -> dict[str, Any]:
    from vlmfilm_plugin.inspection.factory import look_at

    return look_at(target, inputs) | {"command": ""}


def _look_at_run(command: list[str]) -> dict[str, Any]:
    """Run the host's command until a process of it has seen a UNet."""
    with tempfile.TemporaryDirectory(prefix="vlmfilm-inspect-") as folder:
        result = Path(folder) / "seen.json"
        environ = {**os.environ, INSPECT_VARIABLE: str(result), AUTOLOAD_VARIABLE: "1"}
        environ.pop(MODE_VARIABLE, None)
        sys.stdout.flush()
        try:
            # What the script prints is not the result.
            child = subprocess.Popen(command, env=environ, stdout=sys.stderr, start_new_session=True)
        except OSError as error:
            raise HostError("cannot run the command", {"command": command[0], "system said": error.strerror}, "correct it") from error
        try:
            while child.poll() is None and not result.exists():
                time.sleep(_POLL)
        finally:
            _end_all(child)
        ends = sorted(Path(folder).glob("seen.json.*"), key=lambda path: path.suffix != f".{child.pid}")
        found = result if result.exists() else ends[0] if ends else None
        content: dict[str, Any] = (
            {"unets": [], "when": "which never imported torch"} if found is None else json.loads(found.read_text(encoding="utf-8"))
        )
    content["command"] = shlex.join(command)
    if not content["unets"]:
        content["text"] = _nothing(content, child.returncode)
    return content


def _end_all(child: subprocess.Popen[bytes]) -> None:
    """End what the command has started, as a terminal that is closed would."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _nothing(content: dict[str, Any], code: int | None) -> str:
    seen = content.get("seen") or "no module with convolutions was called"
    ended = "" if code in (0, None) or "first update" in content["when"] else f" (exit code {code})"
    return f"the script ran {content['when']}{ended}, and no UNet was called\n  {seen}"
