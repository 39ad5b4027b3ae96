"""The SQLite file of the feature store: schema and migrations, connections, transactions, and errors with a fix.

Knows nothing of features but what binds a checksum to its encoder: it hands out connections that are safe for this process and thread.
"""

from __future__ import annotations

import functools
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vlmfilm_plugin.errors import StoreError
from vlmfilm_plugin.features.store.rows import bound
from vlmfilm_plugin.files import touch

FILE_NAME = "features.sqlite"

# A row's checksum as it is since version 4: right under its own encoder's fingerprint alone.
_BOUND = "vlmfilm_bound(checksum, (SELECT fingerprint FROM main.namespaces WHERE id = namespace))"

# Versions 1 and 2 kept digest and place in one text, `digest@place`, and one row a key.
_FROM_2 = (
    "namespace, key, source_size, source_mtime_ns,"
    " CASE WHEN source_digest IS NULL THEN '' WHEN instr(source_digest, '@') = 0 THEN source_digest"
    " ELSE substr(source_digest, 1, instr(source_digest, '@') - 1) END AS source_digest,"
    " CASE WHEN instr(source_digest, '@') > 0 THEN substr(source_digest, instr(source_digest, '@') + 1) END AS source_place,"
    " dtype, width, data, checksum, created, note"
)

# Migration i takes a file from schema version i to i + 1. Published ones are never edited; new ones are appended.
_MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        "CREATE TABLE namespaces (id INTEGER PRIMARY KEY, fingerprint TEXT NOT NULL UNIQUE, facts TEXT NOT NULL, created REAL NOT NULL)",
        # Keys are bytes: a file name that is no valid UTF-8 has no text form in SQLite.
        "CREATE TABLE features (namespace INTEGER NOT NULL REFERENCES namespaces(id), key BLOB NOT NULL, source_size INTEGER,"
        " source_mtime_ns INTEGER, source_digest TEXT, dtype TEXT NOT NULL, width INTEGER NOT NULL, data BLOB NOT NULL,"
        " checksum INTEGER NOT NULL, created REAL NOT NULL, PRIMARY KEY (namespace, key)) WITHOUT ROWID",
    ),
    (
        # With row ids and a separate index of keys: rows of 4 KB inside the key's own tree made it deep, and reads three times as slow.
        "ALTER TABLE features RENAME TO features_1",
        "CREATE TABLE features (namespace INTEGER NOT NULL REFERENCES namespaces(id), key BLOB NOT NULL, source_size INTEGER,"
        " source_mtime_ns INTEGER, source_digest TEXT, dtype TEXT NOT NULL, width INTEGER NOT NULL, data BLOB NOT NULL,"
        " checksum INTEGER NOT NULL, created REAL NOT NULL, note TEXT, PRIMARY KEY (namespace, key))",
        "INSERT INTO features SELECT namespace, key, source_size, source_mtime_ns, source_digest, dtype, width, data, checksum, created, NULL"
        " FROM features_1",
        "DROP TABLE features_1",
    ),
    (
        # The content of the source file is part of what names a row: data sets that share names do not replace each other's features.
        "ALTER TABLE features RENAME TO features_2",
        "CREATE TABLE features (namespace INTEGER NOT NULL REFERENCES namespaces(id), key BLOB NOT NULL, source_size INTEGER,"
        " source_mtime_ns INTEGER, source_digest TEXT NOT NULL, source_place TEXT, dtype TEXT NOT NULL, width INTEGER NOT NULL,"
        " data BLOB NOT NULL, checksum INTEGER NOT NULL, created REAL NOT NULL, note TEXT, PRIMARY KEY (namespace, key, source_digest))",
        f"INSERT INTO features SELECT {_FROM_2} FROM features_2",
        "DROP TABLE features_2",
        "CREATE INDEX features_by_content ON features (namespace, source_size, source_digest)",
    ),
    (f"UPDATE features SET checksum = {_BOUND}",),
)

# What is in a file, but for SQLite's own; one text for what an index of SQLite's own has no text for.
_SCHEMA = "SELECT type, name, coalesce(sql, '') FROM sqlite_master WHERE name NOT LIKE 'sqlite\\_%' ESCAPE '\\' ORDER BY name"

# A store of an older version that cannot be written is read through a view, which stands before the table of the same name.
_FROM_3 = "namespace, key, source_size, source_mtime_ns, source_digest, source_place, dtype, width, data, checksum, created, note"
_VIEWS = {
    version: f"CREATE TEMP VIEW features AS SELECT {columns.replace('checksum', f'{_BOUND} AS checksum')} FROM main.features"
    for version, columns in ((2, _FROM_2), (3, _FROM_3))
}

_DELETE = f"delete {FILE_NAME} with its -wal and -shm files; features are encoded again"
_FIXES = (
    ("locked", "wait for, or end, the other process that writes to this file"),
    ("full", "free space on the disk, or set `cache_dir` to another one"),
    ("disk i/o", "free space on the disk, or set `cache_dir` to another one"),
    ("not a database", _DELETE),
    ("malformed", _DELETE),
    ("no such", _DELETE),
    ("readonly", "set `cache_dir` to a folder you can write"),
    ("unable to open", "set `cache_dir` to a folder you can write"),
)


class StoreFile:
    """One SQLite file in WAL mode, with a connection for each process and thread; made and migrated when opened.

    Args:
        path: the file; its folder is made when missing.
        timeout_s: seconds to wait for a lock of another connection.

    Raises:
        StoreError: the folder or file cannot be made, read or written, or its schema is newer than this package.
    """

    def __init__(self, path: Path, timeout_s: float) -> None:
        self.path = path
        self._timeout_s = timeout_s
        self._is_closed = False
        # After a fork the parent's connections stay listed, unused and open: SQLite forbids using or closing them in the child.
        self._connections: dict[tuple[int, int], sqlite3.Connection] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # SQLite's own new file would not be writable for the group, whatever the umask says.
            touch(path)
        except OSError as error:
            facts = {"folder": path.parent, "system said": error.strerror or str(error), "expected": "a folder that can be written"}
            raise StoreError("cannot make the folder of the feature store", facts, "set `cache_dir` to a folder you can write") from error
        with self.use("open"):
            pass

    @contextmanager
    def use(self, action: str) -> Iterator[sqlite3.Connection]:
        """Hand out this thread's connection; what SQLite raises becomes a StoreError that says `action` could not be done."""
        if self._is_closed:
            raise StoreError(f"cannot {action} the feature store: it is closed", {"file": self.path}, "open a new FeatureStore")
        try:
            yield self._connection()
        except (sqlite3.Error, UnicodeDecodeError, OverflowError) as error:  # what SQLite says of a damaged file may be no text
            fix = next((fix for said, fix in _FIXES if said in str(error).lower()), "check the disk and the folder of the file")
            facts = {"file": self.path, "SQLite said": str(error), "expected": "a feature store that can be read and written"}
            raise StoreError(f"cannot {action} the feature store", facts, fix) from error

    def close(self) -> None:
        """Close this process's connections; doing it twice is fine."""
        self._is_closed = True
        for owner in [owner for owner in self._connections if owner[0] == os.getpid()]:
            self._connections.pop(owner).close()

    def _connection(self) -> sqlite3.Connection:
        owner = (os.getpid(), threading.get_ident())
        if owner not in self._connections:
            self._connections[owner] = self._open()
        return self._connections[owner]

    def _open(self) -> sqlite3.Connection:
        try:
            return self._open_writable()
        except sqlite3.OperationalError as error:
            # A cache that others share is often mounted read-only: what it holds can be read, a write will say what is wrong.
            if not self.path.is_file() or not any(said in str(error).lower() for said in ("readonly", "unable to open")):
                raise
            return self._open_read_only()

    def _open_read_only(self) -> sqlite3.Connection:
        # immutable: SQLite would otherwise make files beside the database, which it cannot there.
        connection = _connect(f"{self.path.resolve().as_uri()}?mode=ro&immutable=1", self._timeout_s, uri=True)
        try:
            _refuse_foreign(connection, self.path)
            version = _version(connection)
            if version in _VIEWS:
                connection.execute(_VIEWS[version])
            elif version != len(_MIGRATIONS):
                raise StoreError(
                    "cannot open the feature store: it is read-only and of another schema",
                    {"file": self.path, "found": f"version {version}", "expected": f"version {len(_MIGRATIONS)}"},
                    "open it once where it can be written",
                )
        except BaseException:
            connection.close()
            raise
        return connection

    def _open_writable(self) -> sqlite3.Connection:
        connection = _connect(self.path, self._timeout_s)
        try:
            # Before anything is written: a file of somebody else's is left as it is.
            _until(self._timeout_s, lambda: _refuse_foreign(connection, self.path))
            _until(self._timeout_s, lambda: connection.execute("PRAGMA journal_mode = WAL").fetchone())
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute("PRAGMA cache_size = -16384")  # KiB: the key index of a large store stays in memory
            _migrate(connection)
        except BaseException:
            connection.close()
            raise
        return connection


def _connect(place: str | Path, timeout_s: float, *, uri: bool = False) -> sqlite3.Connection:
    # check_same_thread off: `close` ends the connections of all threads, and thread idents are reused.
    connection = sqlite3.connect(place, uri=uri, timeout=timeout_s, isolation_level=None, check_same_thread=False)
    # A damaged text must fail its row's check, not the whole read.
    connection.text_factory = lambda raw: raw.decode("utf-8", "replace")
    _add_functions(connection)
    return connection


def _add_functions(connection: sqlite3.Connection) -> None:
    connection.create_function("vlmfilm_bound", 2, lambda crc, fingerprint: bound(crc, str(fingerprint)))


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


def _refuse_foreign(connection: sqlite3.Connection, path: Path) -> None:
    """Check that the file is empty, or a store of ours and nothing else: a trigger, a view or a computed column would run in our statements."""
    with _one_view(connection):
        version = _version(connection)
        found = set(connection.execute(_SCHEMA))
    if not 0 <= version <= len(_MIGRATIONS):
        raise StoreError(
            "cannot open the feature store: unknown schema",
            {"file": path, "found": f"version {version}", "expected": f"version {len(_MIGRATIONS)} or older"},
            "upgrade vlmfilm-plugin, or set `cache_dir` to another folder",
        )
    expected = _schema_after(_MIGRATIONS[:version])
    if strange := sorted(f"{kind} {name}" for kind, name, _ in found ^ expected):
        facts = {"file": path, "found": ", ".join(strange)[:200], "expected": f"the tables of version {version}, or an empty file"}
        raise StoreError("cannot open the feature store: this database is none, or was changed", facts, "set `cache_dir` to another folder")


@contextmanager
def _one_view(connection: sqlite3.Connection) -> Iterator[None]:
    """Let reads inside see one moment of the file."""
    connection.execute("BEGIN")
    try:
        yield
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")


@functools.cache
def _schema_after(migrations: tuple[tuple[str, ...], ...]) -> frozenset[tuple[str, str, str]]:
    """Return what a file holds after these migrations, as `_SCHEMA` gives it."""
    connection = sqlite3.connect(":memory:", isolation_level=None)
    _add_functions(connection)
    try:
        for migration in migrations:
            for statement in migration:
                connection.execute(statement)
        return frozenset(connection.execute(_SCHEMA))
    finally:
        connection.close()


def _migrate(connection: sqlite3.Connection) -> None:
    while (version := _version(connection)) != len(_MIGRATIONS):
        with transaction(connection):
            # Another process may have migrated while this one waited for the lock.
            if _version(connection) == version:
                for statement in _MIGRATIONS[version]:
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {version + 1}")


def _version(connection: sqlite3.Connection) -> int:
    ((version,),) = connection.execute("PRAGMA user_version").fetchall()
    return int(version)


def _until(timeout_s: float, call: Callable[[], object]) -> None:
    """Repeat a call while the file is locked: SQLite does not wait for the switch to WAL as it does for other locks."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            call()
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)
