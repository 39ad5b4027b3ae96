"""What a file is, before SQLite may write a byte of it or beside it: empty, a store of ours, or somebody else's."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path
from typing import NamedTuple

from vlmfilm_plugin.errors import StoreError
from vlmfilm_plugin.features.store import schema
from vlmfilm_plugin.features.store.connecting import connect, connect_private
from vlmfilm_plugin.features.store.file_systems import lock_problem
from vlmfilm_plugin.features.store.snapshot import private_copy, signature
from vlmfilm_plugin.features.store.sqlite_errors import foreign

_MAGIC = b"SQLite format 3\0"
_WAL_VERSIONS = slice(18, 20)
_USER_VERSION, _APPLICATION_ID = 60, 68
_PAUSE_S = 0.05


class Seen(NamedTuple):
    """What a file is: the version of our schema (0 where it is empty), whether it is in WAL mode, and why it cannot be locked."""

    version: int
    is_wal: bool = False
    lock_problem: OSError | None = None


def look_at(path: Path, timeout_s: float) -> Seen:
    """Look at a file; neither it nor anything beside it changes. No connection of this process may be open on it.

    Raises:
        StoreError: it is no store of ours, or its main part is gone.
        sqlite3.Error: it cannot be read.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        before = signature(path)
        try:
            return _look(path, timeout_s)
        except (StoreError, sqlite3.Error):
            # While another process makes or migrates the file, half of it may be seen.
            if signature(path) == before or time.monotonic() > deadline:
                raise
            time.sleep(_PAUSE_S)


def _look(path: Path, timeout_s: float) -> Seen:
    log = path.with_name(f"{path.name}-wal")
    has_log = log.is_file() and log.stat().st_size > 0
    if not path.is_file() or path.stat().st_size == 0:
        if path.exists() and not path.is_file():
            raise sqlite3.OperationalError("unable to open database file")
        if has_log:
            # SQLite would delete the log, which may hold every row.
            facts = {"file": path, "found": f"{log.name} without {path.name}", "expected": "both, or neither"}
            raise StoreError("cannot open the feature store: its main file is gone", facts, f"copy {path.name}, too, or delete {log.name}")
    if not path.exists():
        return Seen(0)
    try:
        with open(path, "rb") as file:
            header, problem = file.read(100), lock_problem(file.fileno())
    except OSError as error:
        raise sqlite3.OperationalError(f"unable to open database file: {error.strerror}") from error
    if not header:
        return Seen(0, lock_problem=problem)
    if not header.startswith(_MAGIC):
        raise sqlite3.DatabaseError("file is not a database")
    is_wal = 2 in header[_WAL_VERSIONS]
    version, application = (int.from_bytes(header[place : place + 4], "big") for place in (_USER_VERSION, _APPLICATION_ID))
    if is_wal and has_log:
        if application == schema.APPLICATION_ID:
            # Of a store that is, or was, being written the file alone says no more than that it is ours.
            return Seen(max(version, 1), is_wal, problem)
        found = _found_beside_log(path, timeout_s)
    else:
        found = _found(path, "mode=ro" if not is_wal and problem is None else "mode=ro&immutable=1", timeout_s)
    if found.foreign:
        raise foreign(path, found.foreign)
    return Seen(found.version, is_wal, problem)


def _found_beside_log(path: Path, timeout_s: float) -> schema.Found:
    """Tell what a file without our id is, part of which is in its log."""
    try:
        found = _found(path, "mode=ro&immutable=1", timeout_s)
    except sqlite3.DatabaseError:
        found = schema.Found(0)  # a process that was killed left half of its log in the file
    if found.version or found.foreign:
        return found
    with private_copy(path) as (copy, _):
        connection = connect_private(copy)
        try:
            return schema.look(connection)
        finally:
            connection.close()


def _found(path: Path, how: str, timeout_s: float) -> schema.Found:
    connection = connect(path, how, timeout_s)
    try:
        return schema.look(connection)
    finally:
        connection.close()
