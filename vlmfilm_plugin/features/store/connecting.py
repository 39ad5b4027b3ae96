"""One SQLite connection, set up for a file that someone else may have made: it is data, and nothing in it runs."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vlmfilm_plugin.features.store.snapshot import signature

_LIMIT_LENGTH, _LARGEST_VALUE = 0, 1 << 28  # SQLITE_LIMIT_LENGTH
_STEPS = 1_000_000
# More than any statement of ours takes for a byte of a sound file.
_STEPS_A_BYTE, _FREE_STEPS = 8, 20_000_000


def connect(path: Path, how: str, timeout_s: float) -> sqlite3.Connection:
    """Open a file.

    Args:
        how: the URI's parameters, such as `mode=ro`.
    """
    # check_same_thread off: a store closes the connections of all threads, and thread idents are reused.
    connection = sqlite3.connect(f"{path.resolve().as_uri()}?{how}", uri=True, timeout=timeout_s, isolation_level=None, check_same_thread=False)
    # A damaged text must fail its row's check, not the whole read.
    connection.text_factory = lambda raw: raw.decode("utf-8", "replace")
    connection.execute("PRAGMA trusted_schema = OFF")
    connection.execute("PRAGMA cell_size_check = ON")
    set_limit = getattr(connection, "setlimit", None)  # since Python 3.11
    if set_limit is not None:
        set_limit(_LIMIT_LENGTH, _LARGEST_VALUE)
    return connection


def bound(connection: sqlite3.Connection, path: Path) -> Callable[[], None]:
    """Interrupt a connection that takes more steps than a file of this size can need; return what starts the count anew."""
    taken = 0

    def step() -> int:
        nonlocal taken
        taken += _STEPS
        return taken > _FREE_STEPS and taken > _FREE_STEPS + _STEPS_A_BYTE * sum(size for _, size, *_ in signature(path))

    def start() -> None:
        nonlocal taken
        taken = 0

    connection.set_progress_handler(step, _STEPS)
    return start


def connect_private(path: Path) -> sqlite3.Connection:
    """Open a file that no other process knows: without locks, which its file system may not grant, and without shared memory."""
    connection = connect(path, "mode=rw&vfs=unix-none" if os.name == "posix" else "mode=rw", 0.0)
    connection.execute("PRAGMA locking_mode = EXCLUSIVE").fetchall()
    return connection


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Run the body in one write transaction: all of it, or nothing."""
    # IMMEDIATE: taking the write lock at the start lets busy_timeout wait; an upgrade from read to write could not.
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
