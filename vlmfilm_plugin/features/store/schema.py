"""The schema of the feature store: its versions, how one becomes the next, and which SQLite files are stores of ours.

A file is ours by its application id and the exact text of its schema, so that no trigger, view or function of somebody else's ever runs.
"""

from __future__ import annotations

import functools
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from vlmfilm_plugin.features.store.rows import Row, bound, checksum, checksum_of_first_version

APPLICATION_ID = 0x564C_4D46  # "VLMF"
# Stores before this version have no application id, and are known by their schema alone.
_STAMPED_SINCE = 5

# Versions 1 and 2 kept digest and place in one text, `digest@place`, and one row a key.
_FROM_2 = (
    "namespace, key, source_size, source_mtime_ns,"
    " CASE WHEN source_digest IS NULL THEN '' WHEN instr(source_digest, '@') = 0 THEN source_digest"
    " ELSE substr(source_digest, 1, instr(source_digest, '@') - 1) END AS source_digest,"
    " CASE WHEN instr(source_digest, '@') > 0 THEN substr(source_digest, instr(source_digest, '@') + 1) END AS source_place,"
    " dtype, width, data, checksum, created, note"
)
_FINGERPRINT = "(SELECT fingerprint FROM namespaces WHERE id = namespace)"
# A row of version 3 or 4 as the arguments of a function: today's columns, and the namespace's fingerprint.
_AS_ARGUMENTS = (
    f"key, source_size, source_mtime_ns, source_digest, source_place, dtype, width, data, checksum, created, note, NULL, NULL, {_FINGERPRINT}"
)
_NAMESPACES = "(id INTEGER PRIMARY KEY AUTOINCREMENT, fingerprint TEXT NOT NULL UNIQUE, facts TEXT NOT NULL, created REAL NOT NULL)"
_NEW_NAMESPACES = (
    # AUTOINCREMENT: the id of a namespace that was deleted is never another encoder's.
    f"CREATE TABLE namespaces_5 {_NAMESPACES}",
    "INSERT INTO namespaces_5 SELECT id, fingerprint, facts, created FROM namespaces ORDER BY id",
    "DROP TABLE namespaces",
    "ALTER TABLE namespaces_5 RENAME TO namespaces",
)
_FEATURES = (
    "CREATE TABLE features (namespace INTEGER NOT NULL REFERENCES namespaces(id), key BLOB NOT NULL, source_size INTEGER,"
    " source_mtime_ns INTEGER, source_digest TEXT NOT NULL, source_place TEXT, dtype TEXT NOT NULL, width INTEGER NOT NULL,"
    " data BLOB NOT NULL, checksum INTEGER NOT NULL, created REAL NOT NULL, note TEXT, source_ctime_ns INTEGER, source_inode INTEGER,"
    " PRIMARY KEY (namespace, key, source_digest))"
)
_BY_CONTENT = "CREATE INDEX features_by_content ON features (namespace, source_size, source_digest)"
_STAMP = f"PRAGMA application_id = {APPLICATION_ID}"

# Migration i takes a file from schema version i to i + 1. Published ones are never edited; new ones are appended.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
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
    # A checksum is right under its own encoder's fingerprint alone.
    (f"UPDATE features SET checksum = vlmfilm_bound(checksum, {_FINGERPRINT})",),
    (
        *_NEW_NAMESPACES,
        # In place: rows of 4 KB are not copied once more.
        "ALTER TABLE features ADD COLUMN source_ctime_ns INTEGER",
        "ALTER TABLE features ADD COLUMN source_inode INTEGER",
        f"UPDATE features SET checksum = vlmfilm_checksum(4, {_AS_ARGUMENTS})",
        _STAMP,
    ),
)
VERSION = len(MIGRATIONS)

# From a version to version 5 in one pass over the rows; what results is, but for blanks, what all migrations result in.
_AT_ONCE_TO = 5
_AT_ONCE: dict[int, tuple[str, ...]] = {
    0: (f"CREATE TABLE namespaces {_NAMESPACES}", _FEATURES, _BY_CONTENT, _STAMP),
    # The version of the first release.
    2: (
        "ALTER TABLE features RENAME TO features_2",
        *_NEW_NAMESPACES,
        _FEATURES,
        "INSERT INTO features SELECT namespace, key, source_size, source_mtime_ns, source_digest, source_place, dtype, width, data,"
        f" vlmfilm_checksum(3, {_AS_ARGUMENTS}), created, note, NULL, NULL FROM (SELECT {_FROM_2} FROM features_2)",
        "DROP TABLE features_2",
        _BY_CONTENT,
        _STAMP,
    ),
}

# What ANALYZE leaves: statistics for the planner.
_STATISTICS = {"CREATETABLEsqlite_stat1(tbl,idx,stat)", "CREATETABLEsqlite_stat4(tbl,idx,neq,nlt,ndlt,sample)"}


class Found(NamedTuple):
    """What a SQLite file is: the version of our schema, 0 for an empty file; or what makes it somebody else's."""

    version: int
    foreign: str = ""


def look(connection: sqlite3.Connection) -> Found:
    """Tell what a file is, from its header and its schema; nothing of either is executed."""
    try:
        with _one_moment(connection):
            application, version, held = _number(connection, "application_id"), _number(connection, "user_version"), _schema(connection)
    except UnicodeDecodeError as error:
        # SQLite quotes a damaged schema in its message, and Python cannot read the message.
        raise sqlite3.DatabaseError("database disk image is malformed: its schema is no text") from error
    if not held and (application, version) == (0, 0):
        return Found(0)
    if application not in (0, APPLICATION_ID):
        return Found(version, f"a SQLite file of another program (application id {application:#010x})")
    if application == APPLICATION_ID and version > VERSION:
        return Found(version)
    stamp = APPLICATION_ID if version >= _STAMPED_SINCE else 0
    if 0 < version <= VERSION and application == stamp and held == _expected(version):
        return Found(version)
    if application == APPLICATION_ID:
        known = _expected(version) if 0 < version <= VERSION else set()
        changed = ", ".join(sorted(held ^ known))[:200]
        return Found(version, f"a feature store that was changed by hand: {changed or f'version {version}'}")
    return Found(version, "a SQLite file of another program: " + (", ".join(sorted(held))[:200] or f"version {version}"))


@contextmanager
def _one_moment(connection: sqlite3.Connection) -> Iterator[None]:
    """Read several things as they are at one moment: another process may make the store between two of them."""
    if connection.in_transaction:
        yield
        return
    connection.execute("BEGIN")
    try:
        yield
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")


def migrate(connection: sqlite3.Connection, version: int) -> None:
    """Bring a file of ours, or an empty one, from a version to today's; the caller holds the transaction."""
    _add_functions(connection)
    while version < VERSION:
        statements = _AT_ONCE.get(version)
        version, statements = (version + 1, MIGRATIONS[version]) if statements is None else (_AT_ONCE_TO, statements)
        for statement in statements:
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {version}")


def _add_functions(connection: sqlite3.Connection) -> None:
    connection.create_function("vlmfilm_bound", 2, bound, deterministic=True)
    connection.create_function("vlmfilm_checksum", -1, _upgraded, deterministic=True)


def _upgraded(version: int, *values: object) -> int:
    """Return today's checksum of a row that holds that of version 3 or 4; a number that no row has where it holds another."""
    *columns, fingerprint = values
    row = Row._make(columns)
    is_readable = isinstance(row.key, bytes) and isinstance(row.data, bytes) and (row.note is None or isinstance(row.note, str))
    if not is_readable or not isinstance(fingerprint, str):
        return -1
    expected = checksum_of_first_version(row.key, row.data, row.note)
    return checksum(row, fingerprint) if row.checksum == (expected if version == 3 else bound(expected, fingerprint)) else -1


def _number(connection: sqlite3.Connection, name: str) -> int:
    ((value,),) = connection.execute(f"PRAGMA {name}").fetchall()
    return int(value)


def _schema(connection: sqlite3.Connection) -> set[str]:
    """Return every object of a schema as text without blanks and quotes: versions of SQLite differ in these after a renaming."""
    found = set()
    for kind, name, table, sql in connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_master"):
        text = "".join(str(sql).replace('"', "").split()) if sql is not None else f"{kind} {name} of {table}"
        if text not in _STATISTICS:
            found.add(text)
    return found


@functools.cache
def _expected(version: int) -> set[str]:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    try:
        _add_functions(connection)
        for statement in (statement for statements in MIGRATIONS[:version] for statement in statements):
            connection.execute(statement)
        return _schema(connection)
    finally:
        connection.close()
