"""Look after a feature store: statistics, verification, merging, pruning, one key. `store_exchange` moves features in and out.

Works on the file alone: no encoder, no torch. A store that does not exist is never made here, except as the target of a merge.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vlmfilm_plugin.errors import StoreError
from vlmfilm_plugin.features.store.rows import COLUMNS, Row, decode, is_facts_of, key_to_bytes, key_to_text, stamp_of
from vlmfilm_plugin.features.store.sqlite_file import FILE_NAME, StoreFile, transaction
from vlmfilm_plugin.features.store.store import insert_rows

TIMEOUT_S = 30.0
ROWS = 256  # a transaction, or a step of a scan


@contextmanager
def opened(place: str | Path, *, is_new_fine: bool = False) -> Iterator[StoreFile]:
    """Open the store in a folder, or the store that is this file.

    Raises:
        StoreError: there is none, or it cannot be used.
    """
    path = Path(place)
    if path.is_dir() or path.suffix != Path(FILE_NAME).suffix:
        path = path / FILE_NAME
    if not path.is_file() and not is_new_fine:
        facts = {"found": "no such file", "expected": path}
        raise StoreError("cannot open the feature store: there is none", facts, "correct `cache_dir`, or run: vlmfilm warmup")
    file = StoreFile(path, TIMEOUT_S)
    try:
        yield file
    finally:
        file.close()


@dataclass(frozen=True)
class Namespace:
    """The features of one encoder identity: its facts as they were stored, the number of features, bytes and dates (Unix seconds)."""

    fingerprint: str
    facts: dict[str, Any]
    count: int
    bytes: int
    width: int | None
    notes: int
    created: float
    first: float | None
    last: float | None


def stats(file: StoreFile) -> list[Namespace]:
    """Return every namespace of a store."""
    statement = (
        "SELECT fingerprint, facts, count(features.key), coalesce(sum(length(data)), 0), min(width), count(note), namespaces.created,"
        " min(features.created), max(features.created) FROM namespaces LEFT JOIN features ON namespace = namespaces.id"
        " GROUP BY namespaces.id ORDER BY namespaces.id"
    )
    with file.use("read") as connection:
        return [Namespace(str(fingerprint), _facts(facts), *figures) for fingerprint, facts, *figures in connection.execute(statement)]


@dataclass
class Verification:
    """What is wrong with a store: damaged rows as (fingerprint, key), and what SQLite or the namespaces say."""

    checked: int = 0
    damaged: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def is_sound(self) -> bool:
        """Tell whether nothing is wrong."""
        return not self.damaged and not self.problems


def verify(file: StoreFile) -> Verification:
    """Check the file's structure, every namespace's fingerprint, and every row's checksum."""
    found = Verification()
    with file.use("verify") as connection:
        try:
            found.problems += [text for (text,) in connection.execute("PRAGMA integrity_check(20)") if text != "ok"]
            statement = "SELECT count(*) FROM features WHERE namespace NOT IN (SELECT id FROM namespaces)"
            (orphans,) = connection.execute(statement).fetchone()
            if orphans:
                found.problems.append(f"{orphans} features belong to no namespace")
            for identifier, fingerprint, facts in _namespaces(connection):
                if not is_facts_of(facts, fingerprint):
                    found.problems.append(f"namespace {fingerprint}: its facts do not give its fingerprint")
                for row in _rows(connection, identifier):
                    found.checked += 1
                    if decode(row, fingerprint) is None:
                        found.damaged.append((fingerprint, key_to_text(row.key)))
        except sqlite3.DatabaseError as error:
            found.problems.append(f"SQLite said: {error}")
    return found


@dataclass
class Merged:
    """What a merge, or an import, did: features added, replaced by newer ones, left because the target's is as new, and damaged."""

    added: int = 0
    replaced: int = 0
    kept: int = 0
    damaged: int = 0


def merge(source: StoreFile, target: StoreFile, done: Merged) -> None:
    """Copy every sound feature of `source` into `target`; of two with one key and content the newer stays. Count into `done`.

    Raises:
        FeatureError: a namespace holds another width in the target.
    """
    with source.use("read") as reading:
        for identifier, fingerprint, facts in _namespaces(reading):
            for rows in _chunks(_rows(reading, identifier)):
                put(target, fingerprint, facts, rows, done)


def put(target: StoreFile, fingerprint: str, facts: str, rows: Sequence[Row], done: Merged) -> None:
    """Write rows of one namespace in one transaction, the newer of two with one key and content; count into `done`."""
    sound = [row for row in rows if decode(row, fingerprint) is not None and is_facts_of(facts, fingerprint)]
    done.damaged += len(rows) - len(sound)
    statement = "SELECT features.created FROM features JOIN namespaces ON namespace = namespaces.id"
    statement += " WHERE fingerprint = ? AND key = ? AND source_digest = ?"
    with target.use("write") as writing, transaction(writing):
        wanted = []
        for row in sound:
            there = [created for (created,) in writing.execute(statement, (fingerprint, row.key, row.source_digest))]
            if there and there[0] >= row.created:
                done.kept += 1
                continue
            done.replaced += bool(there)
            done.added += not there
            wanted.append(row)
        if wanted:
            insert_rows(writing, fingerprint, facts, wanted)


def prune(file: StoreFile, *, drop: Sequence[str] = (), keep: Sequence[str] = (), dry_run: bool = False) -> list[Namespace]:
    """Delete namespaces: those named by `drop`, or all but those named by `keep`; return them. The file shrinks.

    Args:
        drop, keep: fingerprints, or starts of them that name exactly one.
        dry_run: delete nothing.

    Raises:
        StoreError: a name matches no namespace, or several.
    """
    spaces = stats(file)
    named = {select(spaces, name).fingerprint for name in (*drop, *keep)}
    going = [space for space in spaces if (space.fingerprint in named) == bool(drop)] if named else []
    if dry_run or not going:
        return going
    with file.use("prune") as connection:
        with transaction(connection):
            for space in going:
                condition = "(SELECT id FROM namespaces WHERE fingerprint = ?)"
                connection.execute(f"DELETE FROM features WHERE namespace = {condition}", (space.fingerprint,))
                connection.execute("DELETE FROM namespaces WHERE fingerprint = ?", (space.fingerprint,))
        connection.execute("VACUUM")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return going


def select(spaces: Sequence[Namespace], name: str) -> Namespace:
    """Return the one namespace whose fingerprint is `name`, or starts with it.

    Raises:
        StoreError: there is none, or more than one.
    """
    found = [space for space in spaces if space.fingerprint == name] or [space for space in spaces if space.fingerprint.startswith(name)]
    if len(found) == 1:
        return found[0]
    facts = {"given": repr(name), "matches": len(found), "namespaces": ", ".join(space.fingerprint for space in spaces) or "none"}
    raise StoreError("cannot tell which namespace is meant", facts, "give a whole fingerprint, as `vlmfilm cache stats` prints it")


def show(file: StoreFile, key: str, namespace: str | None = None) -> list[dict[str, Any]]:
    """Return what the store knows of a key, one entry for each namespace and content that has it, the oldest first."""
    result = []
    with file.use("read") as connection:
        for identifier, fingerprint, facts in _namespaces(connection):
            if namespace is not None and not fingerprint.startswith(namespace):
                continue
            statement = f"SELECT {COLUMNS} FROM features WHERE namespace = ? AND key = ? ORDER BY features.created"
            for row in map(Row._make, connection.execute(statement, (identifier, key_to_bytes(key))).fetchall()):
                result.append({"key": key, "namespace": fingerprint, "facts": _facts(facts), **_described(row, fingerprint)})
    return result


def _described(row: Row, fingerprint: str) -> dict[str, Any]:
    feature = decode(row, fingerprint)
    if feature is None:  # its other columns may hold anything
        return {**dict.fromkeys(("stamp", "note", "dtype", "width", "norm")), "is_damaged": True, "created": None}
    stamp = stamp_of(row)
    return {
        "stamp": None if stamp is None else stamp._asdict(),
        "note": row.note,
        "dtype": row.dtype,
        "width": row.width,
        "norm": float(np.linalg.norm(feature.astype(np.float32))),
        "is_damaged": False,
        "created": row.created,
    }


def similar_keys(file: StoreFile, text: str, limit: int = 5) -> list[str]:
    """Return some keys that contain a text."""
    with file.use("read") as connection:
        rows = connection.execute("SELECT DISTINCT key FROM features WHERE instr(key, ?) LIMIT ?", (key_to_bytes(text), limit)).fetchall()
    return [key_to_text(key) for (key,) in rows]


def _namespaces(connection: sqlite3.Connection) -> list[tuple[int, str, str]]:
    # A damaged name may be bytes.
    return [(number, str(name), facts) for number, name, facts in connection.execute("SELECT id, fingerprint, facts FROM namespaces ORDER BY id")]


def _rows(connection: sqlite3.Connection, namespace: int) -> Iterator[Row]:
    """Yield rows in key order, a step at a time: no cursor stays open while the caller writes."""
    start: tuple[object, ...] = ()
    while True:
        condition = "AND (key, source_digest) > (?, ?)" if start else ""
        statement = f"SELECT {COLUMNS} FROM features WHERE namespace = ? {condition} ORDER BY key, source_digest LIMIT {ROWS}"
        rows = [Row._make(row) for row in connection.execute(statement, (namespace, *start))]
        yield from rows
        if len(rows) < ROWS:
            return
        *_, last = rows
        start = (last.key, last.source_digest)


def rows_of(connection: sqlite3.Connection, fingerprint: str) -> tuple[str, Iterator[Row]]:
    """Return a namespace's facts as they are stored, and its rows in key order."""
    identifier, facts = next((identifier, facts) for identifier, name, facts in _namespaces(connection) if name == fingerprint)
    return facts, _rows(connection, identifier)


def _chunks(rows: Iterator[Row]) -> Iterator[list[Row]]:
    chunk: list[Row] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == ROWS:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _facts(text: object) -> dict[str, Any]:
    try:
        facts = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        facts = None
    return facts if isinstance(facts, dict) else {"unreadable": str(text)[:200]}
