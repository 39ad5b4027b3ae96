"""The SQLite file of the feature store: who may open it and how, connections, transactions, and its state at rest.

At rest, and while it is only read, it is one plain file. While a process writes it has a write-ahead log, where the file system can share
memory; whoever closes it last puts everything back into the file. Knows nothing of features.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.util import Finalize
from pathlib import Path
from weakref import WeakSet

from vlmfilm_plugin.errors import StoreError
from vlmfilm_plugin.features.store import schema
from vlmfilm_plugin.features.store.connecting import bound, connect, connect_private, transaction
from vlmfilm_plugin.features.store.file_systems import shares_memory
from vlmfilm_plugin.features.store.log_mode import leave_log, put_to_rest, start_log
from vlmfilm_plugin.features.store.looking import Seen, look_at
from vlmfilm_plugin.features.store.snapshot import Signature, private_copy, signature
from vlmfilm_plugin.features.store.sqlite_errors import (
    FILE_NAME,
    cannot_be_read_in_place,
    foreign,
    store_error,
    unknown_version,
    without_locks,
)
from vlmfilm_plugin.files import touch

__all__ = ["FILE_NAME", "StoreFile"]

_UPGRADE_TIMEOUT_MS = 3_600_000
_logger = logging.getLogger("vlmfilm.store")


@dataclass
class _Opened:
    """A connection of one thread: what starts its count of steps anew, the schema it was checked against, and of what it is a copy."""

    connection: sqlite3.Connection
    begin: Callable[[], None]
    schema_version: int = -1
    copied: Signature | None = None
    reason: str = ""
    has_tried_log: bool = False


class StoreFile:
    """One SQLite file, with a connection for each process and thread; made and migrated when opened.

    Args:
        path: the file; its folder is made when missing.
        timeout_s: seconds to wait for a lock of another connection.

    Raises:
        StoreError: the file is none of ours, or cannot be made, read or written, or its schema is newer than this package.
    """

    def __init__(self, path: Path, timeout_s: float) -> None:
        self.path = path
        self._timeout_s = timeout_s
        self._is_closed = False
        # After a fork the parent's connections stay listed, unused and open: SQLite forbids using or closing them in the child.
        self._connections: dict[tuple[int, int], _Opened] = {}
        with self.use("open"):
            pass

    @contextmanager
    def use(self, action: str) -> Iterator[sqlite3.Connection]:
        """Hand out this thread's connection; what SQLite raises becomes a StoreError that says `action` could not be done."""
        with self._used(action) as opened:
            yield opened.connection

    @contextmanager
    def writing(self, action: str) -> Iterator[sqlite3.Connection]:
        """Hand out this thread's connection in one write transaction: all of the body, or nothing."""
        with self._used(action) as opened:
            if opened.copied is not None:
                facts = {"file": self.path, "found": opened.reason, "expected": "a file and a folder that can be written"}
                raise StoreError(f"cannot {action} the feature store: it can only be read", facts, "set `cache_dir` to a folder you can write")
            if not opened.has_tried_log:
                opened.has_tried_log = True
                start_log(opened.connection, self.path, self._timeout_s)
            with transaction(opened.connection):
                self._check(opened)
                yield opened.connection

    def close(self) -> None:
        """Put everything into the one file and close this process's connections; doing it twice is fine."""
        self._is_closed = True
        own = [owner for owner in self._connections if owner[0] == os.getpid()]
        for left, owner in zip(range(len(own) - 1, -1, -1), own, strict=True):
            opened = self._connections.pop(owner)
            if not left and opened.copied is None:
                put_to_rest(opened.connection, self.path)
            opened.connection.close()

    def __del__(self) -> None:
        if getattr(self, "_connections", None):
            self.close()

    @contextmanager
    def _used(self, action: str) -> Iterator[_Opened]:
        if self._is_closed:
            raise StoreError(f"cannot {action} the feature store: it is closed", {"file": self.path}, "open a new FeatureStore")
        try:
            yield self._connection()
        except (sqlite3.Error, UnicodeDecodeError, OverflowError) as error:  # what SQLite says of a damaged file may be no text
            raise store_error(action, self.path, error) from error

    def _connection(self) -> _Opened:
        owner = (os.getpid(), threading.get_ident())
        opened = self._connections.get(owner)
        if opened is not None and opened.copied is not None and opened.copied != signature(self.path):
            # Another process wrote: what it committed must be seen.
            self._connections.pop(owner).connection.close()
            opened = None
        if opened is None:
            with _OPENING:
                opened = self._connections[owner] = self._open()
                _OPEN.add(self)
                _close_at_exit()
        opened.begin()
        return opened

    def _open(self) -> _Opened:
        seen = None if _has_connections(self.path) else self._look()
        if seen is not None and seen.lock_problem is not None:
            if seen.version == 0:
                raise without_locks("open", self.path, seen.lock_problem)
            return self._open_copy(str(without_locks("write", self.path, seen.lock_problem).facts["found"]))
        try:
            return self._open_in_place(seen)
        except sqlite3.OperationalError as error:
            if not cannot_be_read_in_place(error) or (seen is None or seen.version == 0) or _has_connections(self.path):
                raise
            return self._open_copy(f"SQLite said: {error}")

    def _look(self) -> Seen:
        seen = look_at(self.path, self._timeout_s)
        if seen.version > schema.VERSION:
            raise unknown_version(self.path, seen.version, schema.VERSION)
        if seen.version == 0:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                # SQLite's own new file would not be writable for the group, whatever the umask says.
                touch(self.path)
            except OSError as error:
                facts = {"folder": self.path.parent, "system said": error.strerror or str(error), "expected": "a folder that can be written"}
                raise StoreError("cannot make the folder of the feature store", facts, "set `cache_dir` to a folder you can write") from error
            if not self.path.exists():
                raise sqlite3.OperationalError("unable to open database file")
            return look_at(self.path, self._timeout_s)
        return seen

    def _open_in_place(self, seen: Seen | None) -> _Opened:
        connection = connect(self.path, "mode=rw", self._timeout_s)
        try:
            connection.execute("PRAGMA cache_size = -16384")  # KiB: the key index of a large store stays in memory
            if seen is not None and seen.is_wal and not shares_memory(self.path.parent):
                leave_log(connection, self.path)
            opened = _Opened(connection, bound(connection, self.path))
            self._bring_up_to_date(connection)
            opened.schema_version = _schema_version(connection)
        except BaseException:
            connection.close()
            raise
        return opened

    def _open_copy(self, reason: str) -> _Opened:
        with private_copy(self.path) as (copy, copied):
            megabytes = sum(size for _, size, *_ in copied) / 1e6
            _logger.warning("[VLM] the feature store %s is read from a private copy (%.1f MB): %s", self.path, megabytes, reason)
            connection = connect_private(copy)
            try:
                self._bring_up_to_date(connection)
                connection.execute("PRAGMA journal_mode = MEMORY").fetchall()
                connection.execute("PRAGMA query_only = ON")
            except BaseException:
                connection.close()
                raise
        # The copy has no name any more, and lives as long as the connection.
        return _Opened(connection, bound(connection, self.path), copied=copied, reason=reason)

    def _bring_up_to_date(self, connection: sqlite3.Connection) -> None:
        if (version := self._version(connection)) == schema.VERSION:
            return
        if version:
            _logger.info("[VLM] the feature store %s is brought up to date (%.0f MB)", self.path, self.path.stat().st_size / 1e6)
            # Every process of a run comes here, and the first one may have gigabytes to go through.
            connection.execute(f"PRAGMA busy_timeout = {_UPGRADE_TIMEOUT_MS}").fetchall()
        with transaction(connection):
            # Another process may have made or migrated it while this one waited for the lock.
            if (version := self._version(connection)) != schema.VERSION:
                schema.migrate(connection, version)
        connection.execute(f"PRAGMA busy_timeout = {int(1000 * self._timeout_s)}").fetchall()

    def _version(self, connection: sqlite3.Connection) -> int:
        found = schema.look(connection)
        if found.foreign:
            raise foreign(self.path, found.foreign)
        if found.version > schema.VERSION:
            raise unknown_version(self.path, found.version, schema.VERSION)
        return found.version

    def _check(self, opened: _Opened) -> None:
        """Check that the schema is still ours: a trigger that somebody added meanwhile must not run."""
        if (now := _schema_version(opened.connection)) != opened.schema_version:
            if self._version(opened.connection) != schema.VERSION:
                raise sqlite3.OperationalError("database disk image is malformed: its schema is gone")
            opened.schema_version = now


def _schema_version(connection: sqlite3.Connection) -> int:
    ((version,),) = connection.execute("PRAGMA schema_version").fetchall()
    return int(version)


# One thread at a time looks at a file and opens it.
_OPENING = threading.RLock()
_OPEN: WeakSet[StoreFile] = WeakSet()
_closing_process: int | None = None


def _has_connections(path: Path) -> bool:
    """Tell whether this process has a connection on a file: to open and close it in any other way would end the locks of all of them."""
    process = os.getpid()
    same = [file for file in list(_OPEN) if _is_same(file.path, path)]
    return any(owner[0] == process and opened.copied is None for file in same for owner, opened in list(file._connections.items()))


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one == other or os.path.samefile(one, other)
    except OSError:
        return False


def _close_at_exit() -> None:
    """Close every store when this process ends, after an error, too; processes of `multiprocessing` included, which run no exit handlers."""
    global _closing_process
    if _closing_process != os.getpid():
        _closing_process = os.getpid()
        Finalize(None, _close_all, exitpriority=0)


def _close_all() -> None:
    for file in list(_OPEN):
        file.close()


def _forget_lock() -> None:
    """Give a forked process a lock of its own: the thread that held the parent's does not exist in it."""
    global _OPENING
    _OPENING = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_lock)
