"""The demo's folder: used by one demo at a time; what an interrupted one left there is cleared by the next, and nothing else ever is."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from vlmfilm_plugin.errors import Interrupted, VlmFilmError
from vlmfilm_plugin.files import cannot_write

# There from the first to the last moment of a demo, and locked by its process.
UNFINISHED = "demo-unfinished"
# Everything that a demo makes.
CONTENT = frozenset({"host", "data", "runs", "results", "logs", "cache", "plain.yaml", "film.yaml", "weights"})


class DemoError(VlmFilmError):
    """A step of the demo failed, or its folder is in use or cannot be written."""


@contextmanager
def demo_folder(folder: str | os.PathLike[str]) -> Iterator[tuple[Path, int]]:
    """Hold an empty folder, made when missing, for one demo; where the block raises, the next demo may have it again.

    Yields the folder and a descriptor that holds its lock. Processes that write there inherit it: where this one is killed, the folder stays
    in use until they end, too.

    Raises:
        DemoError: another demo runs there, or it holds anything that is no demo's.
    """
    root = Path(folder).resolve()
    if root.exists() and not root.is_dir():
        raise _in_use(root, "a file")
    root.mkdir(parents=True, exist_ok=True)
    mark = root / UNFINISHED
    names = {path.name for path in root.iterdir()}
    strange = sorted(names - CONTENT - {UNFINISHED}) if UNFINISHED in names else sorted(names)
    if strange:
        raise _in_use(root, f"{strange[0]}, which is no part of an interrupted demo")
    with mark.open("a") as file:
        if not _lock(file):
            raise _in_use(root, "another demo that is running")
        for name in sorted(names & CONTENT):
            _remove(root / name)
        yield root, file.fileno()
        mark.unlink()


@contextmanager
def one_demo(folder: str | os.PathLike[str]) -> Iterator[tuple[Path, int]]:
    """Hold a folder for one demo, as `demo_folder`; what goes wrong with it, and Ctrl-C, are said in its words.

    Raises:
        DemoError: it holds something else, or cannot be written.
        Interrupted: Ctrl-C; the next demo in the folder starts over.
    """
    try:
        with demo_folder(folder) as held:
            yield held
    except BrokenPipeError:
        raise  # of whoever reads what a demo says
    except OSError as error:
        raise cannot_write(folder, "the demo's files", error, DemoError) from error
    except KeyboardInterrupt as stop:
        raise Interrupted(f"what there is lies in {folder}; the same command starts over there") from stop


def _in_use(root: Path, found: str) -> DemoError:
    facts = {"folder": root, "found": found, "expected": "an empty or absent folder, or one of an interrupted demo"}
    return DemoError("cannot run the demo: its folder is in use", facts, "give another `--folder`")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _lock(file: IO[str]) -> bool:
    """Take the lock that ends with this process; False where another one has it."""
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        # A file system without locks: there only the user can tell.
        return True
    return True
