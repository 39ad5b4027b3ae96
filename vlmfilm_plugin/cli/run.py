"""`vlmfilm run -- COMMAND`: the explicit way to run a host's script with VLM-FiLM."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from vlmfilm_plugin.errors import Interrupted, SettingsError
from vlmfilm_plugin.settings.mode import AUTOLOAD_VARIABLE, MODE_VARIABLE, MODES, is_autoload_on, read_mode

INTERRUPTED_CODE = 130
INTERRUPTED = "features that were encoded are stored and not encoded again; checkpoints are those that the command wrote"
# What schedulers and terminals send to end a job, or to warn it of its end.
_PASSED_ON = {signal.SIGINT, signal.SIGTERM, *(getattr(signal, name) for name in ("SIGHUP", "SIGUSR1", "SIGUSR2") if hasattr(signal, name))}
_KERNEL = 0x80  # si_code of a signal that the terminal sent, to every process in its foreground
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser("run", help="run a command with VLM-FiLM switched on", description=__doc__)
    parser.add_argument("--mode", choices=MODES, default=None, help=f"on (default), off or shuffle; wins over {MODE_VARIABLE}")
    parser.add_argument("command_line", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="the command and its arguments, unchanged")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Set the variable, run the command, and return its exit code: 130 where Ctrl-C ended it, 128 + n where signal n did, as shells do."""
    command = arguments.command_line[1:] if arguments.command_line[:1] == ["--"] else arguments.command_line
    if not command:
        raise SettingsError("there is no command to run", {"expected": "vlmfilm run -- python scripts/train.py ..."}, "put the command after `--`")
    mode = arguments.mode or read_mode() or "on"
    environ = {**os.environ, MODE_VARIABLE: mode}
    if not is_autoload_on(environ):
        print(f"vlmfilm: {AUTOLOAD_VARIABLE}={environ[AUTOLOAD_VARIABLE]} would keep the plugin out; it is 1 for this command", file=sys.stderr)
        environ[AUTOLOAD_VARIABLE] = "1"
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        return _supervise(command, environ)
    except OSError as error:
        print(f"vlmfilm: cannot run {command[0]!r}: {error.strerror}", file=sys.stderr)
        return 127


def _supervise(command: list[str], environ: Mapping[str, str]) -> int:
    """Run a command as if this process were not there: it gets every signal once, and never outlives this process."""
    # A scheduler sends its signals to every process of a job: passed on, they would come twice. There this process becomes the command.
    if "SLURM_JOB_ID" in environ or not hasattr(signal, "sigtimedwait"):
        os.execvpe(command[0], command, environ)
    waited_for = {*_PASSED_ON, signal.SIGCHLD}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, waited_for)
    child = subprocess.Popen(command, env=environ, preexec_fn=_child_setup(before))
    is_interrupted = False
    while child.poll() is None:
        # A second, should the system keep one back.
        said = signal.sigtimedwait(waited_for, 1.0)
        if said is None or said.si_signo == signal.SIGCHLD:
            continue
        is_interrupted |= said.si_signo == signal.SIGINT
        if said.si_code != _KERNEL:
            child.send_signal(said.si_signo)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    code = child.returncode
    # A command that took it and ended well, an interactive one say, was not ended by it.
    if is_interrupted and code != 0:
        raise Interrupted(INTERRUPTED)
    return code if code >= 0 else 128 - code


def _child_setup(mask: set[Any]) -> Any:
    """Return what the child does before it becomes the command: everything is loaded by now, a fork must not import."""
    prctl = None
    if sys.platform == "linux":
        import ctypes

        prctl = ctypes.CDLL(None).prctl

    def setup() -> None:
        if prctl is not None:
            prctl(_DIE_WITH_PARENT, signal.SIGKILL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    return setup
