"""Run real Python processes: start-up can only be tested from outside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
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


def succeed(result: subprocess.CompletedProcess[str]) -> str:
    """Return a process's stdout; fail with everything it said where its exit code is not 0."""
    assert result.returncode == 0, f"exit code {result.returncode}\n--- stdout\n{result.stdout[-4000:]}\n--- stderr\n{result.stderr[-4000:]}"
    return result.stdout


def verdicts_of(result: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """Return how each scenario of a script ended: `ok`, or its error; fail where the script itself did."""
    return dict(json.loads(line.removeprefix("VERDICT ")) for line in succeed(result).splitlines() if line.startswith("VERDICT "))
