"""Walk through a store that may hold anything: every walk ends, and what is no namespace or no row of ours is said to be damaged."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from vlmfilm_plugin.errors import StoreError
from vlmfilm_plugin.features.store.rows import COLUMNS, Row

STEP = 256


class NamespaceRow(NamedTuple):
    """A namespace as it is stored: its id, the fingerprint of its encoder, the facts that give it, and when it was made."""

    id: int
    fingerprint: str
    facts: str
    created: float


class Summary(NamedTuple):
    """What a row is counted by: its namespace and width, the bytes of its feature, whether it has a note, and its date."""

    namespace: int
    width: object
    bytes: int
    has_note: int
    created: object


def namespaces(connection: sqlite3.Connection) -> list[NamespaceRow]:
    """Return the namespaces of a store, the oldest first. What is no text is written as Python would, and is no encoder's name."""
    found = connection.execute("SELECT id, fingerprint, facts, created FROM namespaces ORDER BY id")
    return [
        NamespaceRow(identifier, str(fingerprint), str(facts), created if isinstance(created, float) else 0.0)
        for identifier, fingerprint, facts, created in found
    ]


def namespace_of(connection: sqlite3.Connection, fingerprint: str) -> NamespaceRow:
    """Return the namespace of a fingerprint.

    Raises:
        StoreError: there is none.
    """
    found = next((space for space in namespaces(connection) if space.fingerprint == fingerprint), None)
    if found is None:
        raise StoreError("cannot find this namespace", {"namespace": fingerprint, "found": "none of this name"}, "look at `vlmfilm cache stats`")
    return found


def rows(connection: sqlite3.Connection, namespace: int) -> Iterator[Row]:
    """Yield the rows of a namespace, a step at a time: no cursor stays open while the caller writes."""
    for owner, row in _walk(connection, COLUMNS):
        if owner == namespace:
            yield Row._make(row)


def summaries(connection: sqlite3.Connection) -> Iterator[Summary]:
    """Yield the summary of every row; features are not read."""
    for owner, values in _walk(connection, "width, length(data), note IS NOT NULL, created"):
        yield Summary(owner, *values)  # type: ignore[arg-type]


def width_of(connection: sqlite3.Connection, namespace: int) -> object:
    """Return the width that most rows of a namespace have; None where it has none."""
    found: Counter[object] = Counter(summary.width for summary in summaries(connection) if summary.namespace == namespace)
    return next((width for width, _ in found.most_common(1)), None)


def _walk(connection: sqlite3.Connection, columns: str) -> Iterator[tuple[object, tuple[object, ...]]]:
    # By row ids, which are whole numbers that grow: keys may be anything, and a text that cannot be read has no place among them.
    start = -(1 << 63)
    statement = f"SELECT rowid, namespace, {columns} FROM features WHERE rowid >= ? ORDER BY rowid LIMIT {STEP}"
    while True:
        found = connection.execute(statement, (start,)).fetchall()
        for rowid, owner, *values in found:
            if rowid < start:
                raise sqlite3.DatabaseError("database disk image is malformed: its rows are out of order")
            yield owner, tuple(values)
            if rowid == (1 << 63) - 1:
                return
            start = rowid + 1
        if len(found) < STEP:
            return
