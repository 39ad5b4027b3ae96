"""The host's scripts, run as a user runs them: subprocesses with `VLM_FILM_MODE` in the environment, with their logs and times."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from vlmfilm_plugin.demo.folder import DemoError
from vlmfilm_plugin.settings.mode import MODE_VARIABLE, PREFIX

_LOG_TAIL = 20

Say = Callable[[str], None]


class HostScripts:
    """The subprocesses of one demo, with their logs and times."""

    def __init__(self, root: Path, lock: int, say: Say) -> None:
        self.root = root
        self.say = say
        self.seconds: dict[str, float] = {}
        self._lock = lock
        (root / "logs").mkdir(parents=True)

    def log_of(self, step: str) -> Path:
        """Return the log of a step."""
        return self.root / "logs" / f"{step.replace(' ', '_')}.log"

    def run(self, step: str, mode: str | None, arguments: Sequence[object], settings: Mapping[str, object]) -> None:
        """Run a script of the host, its first argument, in a mode and with settings.

        Raises:
            DemoError: it failed; the end of its log has been said.
        """
        log = self.log_of(step)
        command = [sys.executable, f"scripts/{arguments[0]}", *map(str, arguments[1:])]
        self.say(f"{step:<17} {MODE_VARIABLE}={mode or '(unset)'} ...")
        start = time.monotonic()
        cwd, env = self.root / "host", _environment(mode, settings)
        with log.open("w", encoding="utf-8") as out:
            done = subprocess.run(command, cwd=cwd, env=env, pass_fds=[self._lock], stdout=out, stderr=subprocess.STDOUT, check=False)
        self.seconds[step] = round(time.monotonic() - start, 1)
        if done.returncode != 0:
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_TAIL:]
            self.say("\n".join(f"  | {line}" for line in lines))
            raise DemoError(f"the demo's step `{step}` failed", {"exit status": done.returncode, "log": log}, "read the log")
        self.say(f"{step:<17} done in {self.seconds[step]:.1f} s")


def _environment(mode: str | None, settings: Mapping[str, object]) -> dict[str, str]:
    # The user's own settings would make this another experiment.
    env = {key: value for key, value in os.environ.items() if not key.startswith(PREFIX)}
    # The network is too small for more: threads wait on each other, badly so on a busy machine.
    env.setdefault("OMP_NUM_THREADS", "1")
    if mode is not None:
        env.update({MODE_VARIABLE: mode, **{f"{PREFIX}{name.upper()}": str(value) for name, value in settings.items()}})
    return env
