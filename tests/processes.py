"""Run real Python processes: start-up can only be tested from outside."""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

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
    """One `zygote.py` for this process, started at the first command; it runs one command at a time."""

    def __init__(self) -> None:
        command = [sys.executable, Path(__file__).with_name("zygote.py")]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(), bufsize=0)
        atexit.register(self.close)

    def run(self, argv: list[str], cwd: Path, env: dict[str, str], timeout: float) -> subprocess.CompletedProcess[str]:
        assert self._process.stdin is not None
        with tempfile.TemporaryDirectory() as folder:
            places = {name: str(Path(folder) / name) for name in ("stdout", "stderr")}
            order = {"argv": argv, "cwd": str(cwd), "env": env, **places}
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            # The first answer also waits for the imports.
            pid = self._answer(600)["pid"]
            try:
                returncode = self._answer(timeout)["returncode"]
            except TimeoutError:
                os.kill(pid, signal.SIGKILL)
                self._answer(60)
                said = {name: Path(path).read_text() for name, path in places.items()}
                raise subprocess.TimeoutExpired(argv, timeout, said["stdout"], said["stderr"]) from None
            said = {name: Path(path).read_text() for name, path in places.items()}
        return subprocess.CompletedProcess(argv, returncode, said["stdout"], said["stderr"])

    def _answer(self, timeout: float) -> dict[str, int]:
        assert self._process.stdout is not None
        line, end = b"", time.monotonic() + timeout
        while not line.endswith(b"\n"):
            if not select.select([self._process.stdout], [], [], max(0.0, end - time.monotonic()))[0]:
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


def forked(*arguments: str | Path, cwd: str | Path | None = None, timeout: float = 600, **variables: str | None) -> subprocess.CompletedProcess[str]:
    """Run Python with arguments as `python` does, in a fork of a process that has imported torch and lightning already (`zygote`)."""
    global _zygote
    if _zygote is None:
        _zygote = _Zygote()
    return _zygote.run([str(argument) for argument in arguments], Path(cwd or ".").absolute(), environment(**variables), timeout)


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
