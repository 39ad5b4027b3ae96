"""A private copy of a store: where it cannot be read in its place, and to see what a file is before anything touches it.

SQLite must write beside a file to read it safely while others may write: shared memory, or a journal to roll back. Where it cannot, the file
and its journals are copied and read from there. A file that may change is never opened as one that cannot.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlmfilm_plugin.errors import StoreError

_JOURNALS = ("-wal", "-journal")
_TRIES, _PAUSE_S = 20, 0.1

Signature = tuple[tuple[str, int, int, int, int], ...]


def signature(path: Path) -> Signature:
    """Return what tells that a store was written: size, times and inode of its file and journals."""
    found = []
    for suffix in ("", *_JOURNALS):
        try:
            status = path.with_name(path.name + suffix).stat()
        except OSError:
            continue
        found.append((suffix, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino))
    return tuple(found)


@contextmanager
def private_copy(path: Path) -> Iterator[tuple[Path, Signature]]:
    """Yield a copy of a store with its journals, as they were at one moment, and their signature; it is gone when the block ends.

    No connection of this process may be open on the file: to close the handle that is read would end its locks.

    Raises:
        StoreError: the file does not stand still, or there is no room.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="vlmfilm-", ignore_cleanup_errors=True) as folder:
            for _ in range(_TRIES):
                before = signature(path)
                for suffix, *_ in before:
                    shutil.copyfile(path.with_name(path.name + suffix), Path(folder) / (path.name + suffix))
                if before and signature(path) == before:
                    yield Path(folder) / path.name, before
                    return
                time.sleep(_PAUSE_S)
    except OSError as problem:
        facts = {"file": path, "copied to": tempfile.gettempdir(), "system said": problem.strerror or str(problem)}
        raise StoreError("cannot read the feature store by a private copy", facts, "free space there, or name another folder by TMPDIR") from problem
    facts = {"file": path, "found": "a file that changes while it is copied", "expected": "a store that can be read in its place"}
    raise StoreError("cannot read the feature store while another process writes it", facts, "wait for the other process, or copy the store")
