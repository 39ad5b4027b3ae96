"""Run real Python processes: start-up can only be tested from outside."""

from __future__ import annotations

import atexit
import json
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# For the start of a script: each function under @scenario runs in a fork with a store of its own, and says how it ended.
SCENARIO = """
import json, os, sys, traceback

def scenario(function):
    name = function.__name__
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.environ["VLM_FILM_CACHE_DIR"] = os.path.join(os.environ["VLM_FILM_CACHE_DIR"], name)
        scenario_process, verdict = os.getpid(), "ok"
        try:
            function()
        except BaseException as error:
            traceback.print_exc()
            verdict = f"{type(error).__name__}: {error}"
        if os.getpid() == scenario_process:  # a scenario's own forks have no verdict
            print()
            print("VERDICT", json.dumps([name, verdict]), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""

# Variables that torch, lightning and transformers, or the interpreter, read once.
READ_AT_IMPORT = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "TOKENIZERS_", "OMP_", "MKL_", "PYTHONHASHSEED", "PYTHONWARNINGS", "TORCH_LOGS")

DEMO_HOST = Path(__file__).parents[1] / "vlmfilm_plugin" / "demo" / "host"


def environment(**variables: str | None) -> dict[str, str]:
    """Return this process's environment without any setting of ours, then with `variables` (None takes one out)."""
    base = {name: value for name, value in os.environ.items() if not name.startswith("VLM_F")}
    base |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    for name, value in variables.items():
        base.pop(name, None)
        if value is not None:
            base[name] = value
    return base


def python(*arguments: str | Path, cwd: str | Path | None = None, timeout: float = 300, **variables: str | None) -> subprocess.CompletedProcess[str]:
    """Run Python with arguments; nothing is raised for its exit code."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment(**variables), capture_output=True, text=True, timeout=timeout, check=False)


def run_code(code: str, *, cwd: str | Path | None = None, timeout: float = 300, **variables: str | None) -> subprocess.CompletedProcess[str]:
    """Run a piece of code in a new process."""
    return python("-c", textwrap.dedent(code), cwd=cwd, timeout=timeout, **variables)


class _Zygote:
    """One `zygote.py` for this process, started at the first command."""

    def __init__(self) -> None:
        command = [sys.executable, Path(__file__).with_name("zygote.py")]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(), bufsize=0)
        self._ended: dict[int, int] = {}
        atexit.register(self.close)

    def start(self, order: dict[str, object]) -> int:
        """Start a command and return its process id."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        # The first answer also waits for the imports.
        until = time.monotonic() + 600
        while "returncode" in (answer := self._answer(until)):
            self._ended[answer["pid"]] = answer["returncode"]
        return answer["pid"]

    def returncode(self, pid: int, until: float) -> int:
        """Return how a process ended, or raise TimeoutError."""
        while pid not in self._ended:
            answer = self._answer(until)
            self._ended[answer["pid"]] = answer["returncode"]
        return self._ended[pid]

    def _answer(self, until: float) -> dict[str, int]:
        assert self._process.stdout is not None
        line = b""
        while not line.endswith(b"\n"):
            # An answer that has begun is read to its end.
            if not line and not select.select([self._process.stdout], [], [], max(0.0, until - time.monotonic()))[0]:
                raise TimeoutError
            byte = os.read(self._process.stdout.fileno(), 1)
            assert byte, "the zygote has ended"
            line += byte
        answer: dict[str, int] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


_zygote: _Zygote | None = None


class Fork:
    """A Python command in a fork of a process that has imported torch and lightning already (`zygote`); its output goes to two files."""

    def __init__(self, arguments: Sequence[str | Path], folder: Path, cwd: Path, **variables: str | None) -> None:
        global _zygote
        if read := [name for name in variables if name.startswith(READ_AT_IMPORT)]:
            raise ValueError(f"{', '.join(read)}: read before the fork; start a real process with `python`")
        self.argv, self.stdout, self.stderr = [str(argument) for argument in arguments], folder / "stdout", folder / "stderr"
        if _zygote is None:
            _zygote = _Zygote()
        env = environment(**variables)
        self._zygote = _zygote
        self.pid = _zygote.start({"argv": self.argv, "cwd": str(cwd), "env": env, "stdout": str(self.stdout), "stderr": str(self.stderr)})

    def wait(self, timeout: float) -> int:
        """Return the exit code, negative for a signal.

        Raises:
            TimeoutError: the process is still there.
        """
        return self._zygote.returncode(self.pid, time.monotonic() + timeout)

    def kill(self) -> None:
        """End the process, if it has not ended."""
        try:
            self.wait(0)
        except TimeoutError:
            os.kill(self.pid, signal.SIGKILL)
            self.wait(60)


def forked(*arguments: str | Path, cwd: str | Path | None = None, timeout: float = 600, **variables: str | None) -> subprocess.CompletedProcess[str]:
    """Run Python with arguments as `python` does, in a fork of a process that has imported torch and lightning already (`zygote`).

    Raises:
        ValueError: a variable that those packages read once, at their import.
    """
    with tempfile.TemporaryDirectory() as folder:
        fork = Fork(arguments, Path(folder), Path(cwd or ".").absolute(), **variables)
        try:
            returncode: int | None = fork.wait(timeout)
        except TimeoutError:
            returncode = None
        finally:
            fork.kill()
        stdout, stderr = fork.stdout.read_text(), fork.stderr.read_text()
    if returncode is None:
        raise subprocess.TimeoutExpired(fork.argv, timeout, stdout, stderr)
    return subprocess.CompletedProcess(fork.argv, returncode, stdout, stderr)


def forked_code(code: str, *, cwd: str | Path | None = None, timeout: float = 600, **variables: str | None) -> subprocess.CompletedProcess[str]:
    """Run a piece of code in such a fork."""
    return forked("-c", textwrap.dedent(code), cwd=cwd, timeout=timeout, **variables)


def succeed(result: subprocess.CompletedProcess[str]) -> str:
    """Return a process's stdout; fail with everything it said where its exit code is not 0."""
    assert result.returncode == 0, f"exit code {result.returncode}\n--- stdout\n{result.stdout[-4000:]}\n--- stderr\n{result.stderr[-4000:]}"
    return result.stdout


def verdicts_of(result: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """Return how each scenario of a script ended: `ok`, or its error; fail where the script itself did."""
    return dict(json.loads(line.removeprefix("VERDICT ")) for line in succeed(result).splitlines() if line.startswith("VERDICT "))


@contextmanager
def forked_worker(work: Callable[..., None], *arguments: object) -> Iterator[tuple[Any, Connection]]:
    """Run `work(connection, *arguments)` in a fork of this process; give it and this end of its pipe, and kill it at the end."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    worker = context.Process(target=work, args=(there, *arguments))
    worker.start()
    there.close()
    try:
        yield worker, here
    finally:
        worker.kill()
        worker.join()
        here.close()
