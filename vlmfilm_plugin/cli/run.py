"""`vlmfilm run -- COMMAND`: the explicit way to run a host's script with VLM-FiLM."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from vlmfilm_plugin.errors import SettingsError
from vlmfilm_plugin.settings.mode import MODE_VARIABLE, MODES, read_mode

_AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser("run", help="run a command with VLM-FiLM switched on", description=__doc__)
    parser.add_argument("--mode", choices=MODES, default=None, help=f"on (default), off or shuffle; wins over {MODE_VARIABLE}")
    parser.add_argument("command_line", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="the command and its arguments, unchanged")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Set the variable and become the command; returns only when that is impossible."""
    command = arguments.command_line[1:] if arguments.command_line[:1] == ["--"] else arguments.command_line
    if not command:
        raise SettingsError("there is no command to run", {"expected": "vlmfilm run -- python scripts/train.py ..."}, "put the command after `--`")
    mode = arguments.mode or read_mode() or "on"
    environ = {**os.environ, MODE_VARIABLE: mode}
    if environ.get(_AUTOLOAD) == "0":
        environ[_AUTOLOAD] = "1"
        print(f"vlmfilm: {_AUTOLOAD}=0 would keep the plugin out; it is 1 for this command", file=sys.stderr)
    sys.stdout.flush()
    try:
        os.execvpe(command[0], command, environ)
    except OSError as error:
        print(f"vlmfilm: cannot run {command[0]!r}: {error.strerror}", file=sys.stderr)
        return 127
