"""The command line, one command a file. Results go to stdout, everything else to stderr; an error exits 2 with its message, Ctrl-C 130."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from vlmfilm_plugin import __version__
from vlmfilm_plugin.cli import apply, cache, demo, doctor, export, inspect, run, warmup
from vlmfilm_plugin.cli.run import INTERRUPTED_CODE
from vlmfilm_plugin.errors import Interrupted, VlmFilmError
from vlmfilm_plugin.log import is_rank_zero

_COMMANDS = (run, warmup, cache, export, apply, doctor, inspect, demo)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of `vlmfilm`."""
    parser = argparse.ArgumentParser(prog="vlmfilm", description="VLM-FiLM for unmodified MedSegDiff-style UNets.")
    parser.add_argument("--version", action="version", version=f"vlmfilm-plugin {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add_parser(subparsers)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    parsed = build_parser().parse_args(arguments)
    try:
        result: int = parsed.run(parsed)
    except VlmFilmError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        # Whoever cannot wait for the end of this presses it again.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if is_rank_zero():
            hint = next(command.INTERRUPTED for command in _COMMANDS if command.__name__.endswith(f".{parsed.command}"))
            print(f"vlmfilm {parsed.command}: interrupted: {stop if isinstance(stop, Interrupted) else hint}", file=sys.stderr)
        return INTERRUPTED_CODE
    except BrokenPipeError:
        # The reader (`| head`) has had enough; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return result
