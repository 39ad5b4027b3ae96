"""The write-ahead log of a store: begun by the first write where the file system can share memory, and put back into the file at the end.

With a log readers read while a process writes, and a write waits for no disk. Without one they wait for each other.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from pathlib import Path

from vlmfilm_plugin.errors import StoreError
from vlmfilm_plugin.features.store.file_systems import shares_memory, type_of
from vlmfilm_plugin.features.store.sqlite_errors import LOCAL_FIX

_START_TIMEOUT_S, _PAUSE_S = 1.0, 0.02
# Whoever keeps this process waiting has the file open, and puts it to rest when it ends.
_CLOSE_TIMEOUT_MS = 1000

_logger = logging.getLogger("vlmfilm.store")


def start_log(connection: sqlite3.Connection, path: Path, timeout_s: float) -> None:
    """Begin a log where one can be used; where other processes keep the file busy it goes without."""
    if not shares_memory(path.parent):
        return
    # SQLite does not wait for this as it does for other locks.
    deadline = time.monotonic() + min(_START_TIMEOUT_S, timeout_s)
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL").fetchall()
            connection.execute("PRAGMA synchronous = NORMAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error):
                raise
            if time.monotonic() > deadline:
                return
            time.sleep(_PAUSE_S)


def leave_log(connection: sqlite3.Connection, path: Path) -> None:
    """Bring a file that was left with a log back to a plain one, without the shared memory that its file system does not have.

    Raises:
        StoreError: another process has it open.
    """
    connection.execute("PRAGMA locking_mode = EXCLUSIVE").fetchall()
    try:
        connection.execute("PRAGMA journal_mode = DELETE").fetchall()
    except sqlite3.OperationalError as error:
        if "locked" not in str(error):
            raise
        kind = type_of(path.parent) or "of unknown type"
        found = f"open elsewhere with shared memory, which this file system ({kind}) cannot share"
        facts = {"file": path, "found": found, "expected": "one machine at a time"}
        raise StoreError("cannot open the feature store from two machines at once", facts, LOCAL_FIX) from error
    connection.execute("PRAGMA locking_mode = NORMAL").fetchall()
    connection.execute("SELECT count(*) FROM sqlite_master").fetchall()  # the lock is given back by the next read


def put_to_rest(connection: sqlite3.Connection, path: Path) -> None:
    """Put the log into the file, and make it a plain one where no other process has it open; that one will."""
    try:
        ((mode,),) = connection.execute("PRAGMA journal_mode").fetchall()
        if mode != "wal":
            return
        connection.execute(f"PRAGMA busy_timeout = {_CLOSE_TIMEOUT_MS}").fetchall()
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        connection.execute("PRAGMA busy_timeout = 0").fetchall()
        connection.execute("PRAGMA journal_mode = DELETE").fetchall()
    except sqlite3.Error as error:
        if "locked" not in str(error) and "readonly" not in str(error):
            _logger.warning("[VLM] %s: the last features are in %s-wal still; copy both: %s", path, path.name, error)
