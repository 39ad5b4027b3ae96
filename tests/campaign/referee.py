"""What an attempt of the campaign is, and who judges it: every attempt runs in a child process that may be killed, and is told by its seed.

A failure is: an exception that is no `VlmFilmError`, a wrong feature or weight, a payload that ran, a hang, a crash, a silent loss.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from vlmfilm_plugin.errors import VlmFilmError

FORK = multiprocessing.get_context("fork")
REFUSED = "refused"
_HEADROOM = 4 << 30  # bytes of memory that attempts may take beside what the process has


class Wrong(Exception):
    """What an attempt saw is a failure."""


class Kind(ABC):
    """One kind of fault. `attempt` must depend on nothing but its arguments and what `prepare` has made."""

    name: ClassVar[str]
    full: ClassVar[int]
    short: ClassVar[int]
    limit_s: ClassVar[float] = 20.0
    is_short = False

    def prepare(self, folder: Path) -> None:  # noqa: B027
        """Make once what all attempts share."""

    @abstractmethod
    def attempt(self, number: int, folder: Path, chance: random.Random) -> str:
        """Make one attempt in an empty folder; return how it ended, in a word. An error of ours counts as refused."""


@dataclass
class Tally:
    """How the attempts of a kind ended."""

    kind: str
    attempts: int = 0
    fates: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[int, str]] = field(default_factory=list)
    seconds: float = 0.0

    def row(self) -> str:
        """Return its line of the table."""
        fates = ", ".join(f"{fate} {count}" for fate, count in self.fates.most_common())
        return f"{self.kind:<22} {self.attempts:>8} {len(self.failures):>8} {self.seconds:>7.0f}s  {fates}"


def judge(kind: Kind, count: int, seed: int) -> Tally:
    """Make `count` attempts; one that hangs or crashes is a failure, and the others go on."""
    tally, start = Tally(kind.name), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="vlmfilm-campaign-") as place:
        shared = Path(place, "shared")
        shared.mkdir()
        kind.prepare(shared)
        while tally.attempts < count:
            _some(kind, count, seed, Path(place), tally)
    tally.seconds = time.monotonic() - start
    return tally


def _some(kind: Kind, count: int, seed: int, place: Path, tally: Tally) -> None:
    """Let a child make attempts until it has made all, or one of them was its last."""
    here, there = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_attempts, args=(kind, range(tally.attempts, count), seed, place, there))
    process.start()
    there.close()
    ended = None
    while tally.attempts < count and ended is None:
        if not here.poll(kind.limit_s):
            ended = f"hang: no end after {kind.limit_s:.0f} s"
            break
        try:
            fate, failure = here.recv()
        except EOFError:
            process.join()
            ended = f"crash: exit code {process.exitcode}"
            break
        if failure is not None:
            tally.failures.append((tally.attempts, failure))
        tally.fates[fate] += 1
        tally.attempts += 1
    if ended is not None:
        tally.failures.append((tally.attempts, ended))
        tally.fates[ended.split(":")[0]] += 1
        tally.attempts += 1
    process.kill()
    process.join()
    here.close()


def _attempts(kind: Kind, numbers: range, seed: int, place: Path, reports: Any) -> None:
    _be_quiet()
    for number in numbers:
        folder = place / f"{number}"
        folder.mkdir()
        os.chdir(folder)
        chance = random.Random(f"{seed}/{kind.name}/{number}")
        failure = None
        try:
            fate = kind.attempt(number, folder, chance)
        except VlmFilmError as error:
            fate = REFUSED
            if len(str(error).splitlines()) < 2:
                failure = f"an error without facts: {error}"
        except Wrong as wrong:
            fate, failure = "WRONG", str(wrong)
        except BaseException as error:
            *_, last = traceback.extract_tb(error.__traceback__)
            fate, failure = "RAW", f"{type(error).__name__}: {' '.join(str(error).split())[:200]} ({last.filename}:{last.lineno})"
        os.chdir(place)
        shutil.rmtree(folder, ignore_errors=True)
        reports.send((fate, failure))


def _be_quiet() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    quiet = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(quiet, number)
    sys.stdout = sys.stderr = os.fdopen(os.dup(quiet), "w")
    with contextlib.suppress(OSError, ValueError):
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + _HEADROOM, used + _HEADROOM))
