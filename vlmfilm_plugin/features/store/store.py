"""The feature store of this package: one SQLite file that keeps the frozen encoder's features between runs and processes.

Owns what is asked of the file; `rows` owns a row, `sqlite_file` the file. A key is text and never becomes a path. Knows nothing of torch.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmfilm_plugin.errors import FeatureError, StoreError
from vlmfilm_plugin.features.store.protocol import SourceStamp, StoredFeature
from vlmfilm_plugin.features.store.rows import COLUMNS, DTYPES, Row, decode_all, encode, key_to_bytes, key_to_text, stamp_of
from vlmfilm_plugin.features.store.sqlite_file import FILE_NAME, StoreFile

if TYPE_CHECKING:
    from vlmfilm_plugin.encoders.base import EncoderIdentity

logger = logging.getLogger("vlmfilm.store")

_VALUES_PER_SELECT = 400  # of at most two variables; SQLite's old limit is 999 a statement
_UPSERT = f"INSERT OR REPLACE INTO features (namespace, {COLUMNS}) VALUES (?{', ?' * len(Row._fields)})"
_NAMESPACE = "INSERT OR IGNORE INTO namespaces (fingerprint, facts, created) VALUES (?, ?, ?)"
# By fingerprint each time: a namespace may be deleted, and made anew with another id, while a process has the file open.
_SELECT = f"SELECT {COLUMNS} FROM features WHERE namespace = (SELECT id FROM namespaces WHERE fingerprint = ?) AND "
_HAS_SIZE = "SELECT 1 FROM features WHERE namespace = (SELECT id FROM namespaces WHERE fingerprint = ?) AND source_size = ? LIMIT 1"

_RESTAMP = (
    "UPDATE features SET source_mtime_ns = ?, source_place = ?, source_ctime_ns = ?, source_inode = ? WHERE key = ? AND source_digest = ?"
    " AND namespace = (SELECT id FROM namespaces WHERE fingerprint = ?)"
)
# The width of a namespace is that of any row that can be sound; where another is to be written, that of most of them: a damaged one must not
# stop its own repair.
_SOUND_WIDTHS = (
    "FROM features WHERE namespace = ? AND typeof(width) = 'integer' AND length(data) = width * CASE dtype WHEN 'float16' THEN 2 ELSE 4 END"
)
_WIDTH = f"SELECT width {_SOUND_WIDTHS} LIMIT 1"
_MOST_WIDTH = f"SELECT width {_SOUND_WIDTHS} GROUP BY width ORDER BY count(*) DESC LIMIT 1"


class FeatureStore:
    """Features on disk, one namespace for each encoder identity; safe for many processes and threads, and after fork.

    Args:
        cache_dir: folder of `features.sqlite`; made when missing.
        embedding_dtype: `float16` or `float32`, how features are written and read.
        timeout_s: seconds to wait for another process's write.

    Raises:
        StoreError: the folder or the file cannot be used, or a newer version of this package made the file.
    """

    def __init__(self, cache_dir: str | os.PathLike[str], embedding_dtype: str = "float16", *, timeout_s: float = 30.0) -> None:
        if embedding_dtype not in DTYPES:
            facts = {"embedding_dtype": repr(embedding_dtype), "expected": "float16 or float32"}
            raise StoreError("cannot open the feature store: unknown dtype", facts, "set `embedding_dtype` to float16")
        self.path = Path(cache_dir) / FILE_NAME
        self.embedding_dtype = embedding_dtype
        self._file = StoreFile(self.path, timeout_s)

    def __enter__(self) -> FeatureStore:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[object, ...]:
        # A spawned data-loader worker opens the file for itself.
        return type(self), (str(self.path.parent), self.embedding_dtype)

    def rows(self, identity: EncoderIdentity, keys: Sequence[str]) -> list[StoredFeature]:
        """Return every stored feature of these keys: one for each content that a key's file had, the newest last.

        A damaged row is left out with a warning. Asked for float32, a row that was stored as float16 is left out; asked for float16, one
        that was stored as float32 is rounded.

        Shape:
            feature: (F,) in `embedding_dtype`; read-only.

        Raises:
            StoreError: the file cannot be read.
        """
        wanted = [(key_to_bytes(key),) for key in dict.fromkeys(keys)]
        return self._select(identity, "key IN ({})", "?", wanted)

    def rows_of_content(self, identity: EncoderIdentity, stamps: Sequence[SourceStamp]) -> list[StoredFeature]:
        """Return the stored features of files with these sizes and digests, under whatever keys; otherwise as `rows`."""
        wanted = [(stamp.size, stamp.digest) for stamp in stamps]
        return self._select(identity, "(source_size, source_digest) IN (VALUES {})", "(?, ?)", list(dict.fromkeys(wanted)))

    def known_sizes(self, identity: EncoderIdentity, sizes: Sequence[int]) -> set[int]:
        """Return those of these sizes in bytes that the source file of some stored feature has.

        Raises:
            StoreError: the file cannot be read.
        """
        with self._file.use("read") as connection:
            names = identity.fingerprints
            return {size for size in sizes if any(connection.execute(_HAS_SIZE, (name, size)).fetchone() for name in names)}

    def read(self, identity: EncoderIdentity, keys: Sequence[str]) -> dict[str, StoredFeature]:
        """Return the newest stored feature of each of these keys that has one, by key; otherwise as `rows`."""
        return {row.key: row for row in self.rows(identity, keys)}

    def _select(self, identity: EncoderIdentity, condition: str, mark: str, values: Sequence[tuple[object, ...]]) -> list[StoredFeature]:
        """Return rows under a condition whose braces stand for one mark a value."""
        found: list[tuple[float, StoredFeature]] = []
        # Today's name last: what was stored under it stands before what was stored under a former one.
        names = identity.fingerprints[::-1]
        with self._file.use("read") as connection:
            for name, start in ((name, start) for name in names for start in range(0, len(values), _VALUES_PER_SELECT)):
                part = values[start : start + _VALUES_PER_SELECT]
                statement = _SELECT + condition.format(",".join([mark] * len(part)))
                rows = list(map(Row._make, connection.execute(statement, (name, *[x for value in part for x in value]))))
                for row, feature in zip(rows, decode_all(rows, name), strict=True):
                    if (stored := self._stored(row, feature)) is not None:
                        found.append((row.created, stored))
        if len(found) > len(values):
            found.sort(key=lambda item: item[0])
        return [stored for _, stored in found]

    def _stored(self, row: Row, feature: np.ndarray[Any, Any] | None) -> StoredFeature | None:
        if feature is None:
            logger.warning("[VLM] damaged feature left out: key %r in %s", key_to_text(row.key), self.path)
            return None
        if row.dtype != self.embedding_dtype:
            if row.dtype == "float16":
                # Asked for full precision: a rounded row would pass for it.
                return None
            feature = _rounded(feature, self.embedding_dtype)
            if feature is None:
                return None
        return StoredFeature(row.key.decode("utf-8", "surrogatepass"), feature, stamp_of(row), row.note)

    def write(self, identity: EncoderIdentity, rows: Iterable[StoredFeature]) -> None:
        """Store features in one transaction: all of them, or none. One of the same key and content is replaced.

        Raises:
            FeatureError: NaN, infinity, a value that `embedding_dtype` cannot hold, or mixed widths.
            StoreError: the file cannot be written.
        """
        fingerprint = identity.fingerprint
        encoded = [encode(row, self.embedding_dtype, fingerprint) for row in rows]
        if not encoded:
            return
        with self._file.writing("write") as connection:
            facts = json.dumps(dict(identity.facts), sort_keys=True, default=str)
            insert_rows(connection, fingerprint, facts, encoded)

    def restamp(self, identity: EncoderIdentity, rows: Iterable[StoredFeature]) -> None:
        """Note what the files of stored features are now: the same content, with other times, inode or place. Features are left as they are.

        Raises:
            StoreError: the file cannot be written.
        """
        changed = [
            (stamp.mtime_ns, stamp.place, stamp.ctime_ns, stamp.inode, key_to_bytes(row.key), stamp.digest, name)
            for row in rows
            if (stamp := row.stamp) is not None
            for name in identity.fingerprints
        ]
        with self._file.writing("write") as connection:
            connection.executemany(_RESTAMP, changed)

    def keys(self, identity: EncoderIdentity) -> list[str]:
        """Return the keys stored for an identity, sorted, each once."""
        statement = "SELECT DISTINCT key FROM features WHERE namespace = (SELECT id FROM namespaces WHERE fingerprint = ?)"
        with self._file.use("read") as connection:
            found = {key for name in identity.fingerprints for (key,) in connection.execute(statement, (name,))}
        return sorted(map(key_to_text, found))

    def count(self, identity: EncoderIdentity) -> int:
        """Return how many features are stored for an identity."""
        with self._file.use("read") as connection:
            statement = "SELECT count(*) FROM features WHERE namespace = (SELECT id FROM namespaces WHERE fingerprint = ?)"
            ((count,),) = connection.execute(statement, (identity.fingerprint,))
            return int(count)

    def close(self) -> None:
        """Close this process's connections; doing it twice is fine."""
        self._file.close()


def insert_rows(connection: sqlite3.Connection, fingerprint: str, facts: str, rows: Sequence[Row]) -> None:
    """Insert or replace rows of one namespace, which is made when missing; the caller holds the transaction.

    Raises:
        FeatureError: the widths differ from each other, or from those in the namespace.
    """
    connection.execute(_NAMESPACE, (fingerprint, facts, time.time()))
    (namespace,) = connection.execute("SELECT id FROM namespaces WHERE fingerprint = ?", (fingerprint,)).fetchone()
    (expected,) = connection.execute(_WIDTH, (namespace,)).fetchone() or (rows[0].width,)
    if any(row.width != expected for row in rows):
        (expected,) = connection.execute(_MOST_WIDTH, (namespace,)).fetchone() or (rows[0].width,)
    for row in rows:
        if row.width != expected:
            found = {"key": repr(key_to_text(row.key)), "found": f"({row.width},)", "expected": f"({expected},)"}
            raise FeatureError("cannot store features of different widths in one namespace", found, "store the features of one encoder only")
    connection.executemany(_UPSERT, [(namespace, *row) for row in rows])


def _rounded(feature: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any] | None:
    """Return a feature as a run of this dtype would have stored it; None where it could not."""
    with np.errstate(over="ignore"):
        kept = feature.astype(DTYPES[dtype])
    kept.flags.writeable = False
    return kept if np.isfinite(kept).all() else None
