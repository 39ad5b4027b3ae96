"""Look after a feature store: statistics, verification, merging, pruning, one key. `store_exchange` moves features in and out.

Works on the file alone: no encoder, no torch. A store that does not exist is never made here, except as the target of a merge.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vlmfilm_plugin.errors import StoreError
from vlmfilm_plugin.features.store import scan
from vlmfilm_plugin.features.store.rows import COLUMNS, Row, decode, facts_in, is_facts_of, key_to_bytes, key_to_text, stamp_of
from vlmfilm_plugin.features.store.scan import NamespaceRow
from vlmfilm_plugin.features.store.sqlite_file import FILE_NAME, StoreFile
from vlmfilm_plugin.features.store.store import insert_rows

TIMEOUT_S = 30.0


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
    with file.use("read") as connection:
        counts: dict[object, _Count] = {}
        for summary in scan.summaries(connection):
            counts.setdefault(summary.namespace, _Count()).add(summary)
        return [counts.get(space.id, _Count()).of(space) for space in scan.namespaces(connection)]


class _Count:
    """What the rows of one namespace add up to."""

    def __init__(self) -> None:
        self.widths: Counter[int] = Counter()
        self.dates: tuple[float, float] | None = None
        self.rows = self.bytes = self.notes = 0

    def add(self, row: scan.Summary) -> None:
        self.rows += 1
        self.bytes += row.bytes if isinstance(row.bytes, int) else 0
        self.notes += row.has_note
        if isinstance(row.width, int):
            self.widths[row.width] += 1
        if isinstance(row.created, float):
            first, last = self.dates or (row.created, row.created)
            self.dates = min(first, row.created), max(last, row.created)

    def of(self, space: NamespaceRow) -> Namespace:
        first, last = self.dates or (None, None)
        width = next((width for width, _ in self.widths.most_common(1)), None)
        facts = facts_in(space.facts)
        return Namespace(
            fingerprint=space.fingerprint,
            facts=facts,
            count=self.rows,
            bytes=self.bytes,
            width=width,
            notes=self.notes,
            created=space.created,
            first=first,
            last=last,
        )


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
    """Check the file's structure, every namespace's fingerprint, and every row: its checksum, its values, its width."""
    found = Verification()
    with file.use("verify") as connection:
        try:
            found.problems += [str(text) for (text,) in connection.execute("PRAGMA integrity_check(20)") if text != "ok"]
            statement = "SELECT count(*) FROM features WHERE namespace NOT IN (SELECT id FROM namespaces)"
            (orphans,) = connection.execute(statement).fetchone()
            if orphans:
                found.problems.append(f"{orphans} features belong to no namespace")
            for space in scan.namespaces(connection):
                if not is_facts_of(space.facts, space.fingerprint):
                    found.problems.append(f"namespace {space.fingerprint}: its facts do not give its fingerprint")
                width = scan.width_of(connection, space.id)
                for row in scan.rows(connection, space.id):
                    found.checked += 1
                    if row.width != width or decode(row, space.fingerprint) is None:
                        found.damaged.append((space.fingerprint, key_to_text(row.key)))
        except sqlite3.Error as error:
            found.problems.append(f"SQLite said: {error}")
    found.damaged.sort()
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
        for space in scan.namespaces(reading):
            width = scan.width_of(reading, space.id)
            for chunk in _chunks(scan.rows(reading, space.id)):
                sound = [row for row in chunk if row.width == width]
                done.damaged += len(chunk) - len(sound)
                put(target, space.fingerprint, space.facts, sound, done)


def put(target: StoreFile, fingerprint: str, facts: str, rows: Sequence[Row], done: Merged) -> None:
    """Write rows of one namespace in one transaction, the newer of two with one key and content; count into `done`."""
    sound = [row for row in rows if decode(row, fingerprint) is not None and is_facts_of(facts, fingerprint)]
    done.damaged += len(rows) - len(sound)
    statement = f"SELECT {COLUMNS} FROM features WHERE namespace = (SELECT id FROM namespaces WHERE fingerprint = ?)"
    statement += " AND key = ? AND source_digest = ?"
    with target.writing("write") as writing:
        wanted = []
        for row in sound:
            there = [Row._make(held) for held in writing.execute(statement, (fingerprint, row.key, row.source_digest))]
            # A damaged one must not stop its own repair, whatever its date says.
            if any(held.created >= row.created for held in there if decode(held, fingerprint) is not None):
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
    with file.writing("prune") as connection:
        for space in going:
            condition = "(SELECT id FROM namespaces WHERE fingerprint = ?)"
            connection.execute(f"DELETE FROM features WHERE namespace = {condition}", (space.fingerprint,))
            connection.execute("DELETE FROM namespaces WHERE fingerprint = ?", (space.fingerprint,))
    with file.use("prune") as connection:
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
        for space in scan.namespaces(connection):
            if namespace is not None and not space.fingerprint.startswith(namespace):
                continue
            statement = f"SELECT {COLUMNS} FROM features WHERE namespace = ? AND key = ? ORDER BY features.created"
            for row in map(Row._make, connection.execute(statement, (space.id, key_to_bytes(key))).fetchall()):
                result.append({"key": key, "namespace": space.fingerprint, "facts": facts_in(space.facts), **_described(row, space.fingerprint)})
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


def _chunks(rows: Iterator[Row]) -> Iterator[list[Row]]:
    chunk: list[Row] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == scan.STEP:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
