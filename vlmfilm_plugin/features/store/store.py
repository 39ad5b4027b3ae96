"""The feature store: one SQLite file that keeps the frozen encoder's features between runs and processes.

Owns rows and their integrity; `store_file` owns the file. A key is text and never becomes a path. Knows nothing of torch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sqlite3
import time
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vlmfilm_plugin.errors import FeatureError, ImageReadError, StoreError
from vlmfilm_plugin.features.store.sqlite_file import FILE_NAME, StoreFile, transaction

if TYPE_CHECKING:
    from vlmfilm_plugin.encoders.base import EncoderIdentity

Row = tuple[Any, ...]

logger = logging.getLogger("vlmfilm.store")

_KEYS_PER_SELECT = 500  # SQLite's old limit is 999 variables a statement
_DTYPES: dict[str, np.dtype[Any]] = {"float16": np.dtype("<f2"), "float32": np.dtype("<f4")}
# Every column of a row but its namespace, in the order of `Row`.
COLUMNS = "key, source_size, source_mtime_ns, source_digest, dtype, width, data, checksum, created, note"
_UPSERT = f"INSERT OR REPLACE INTO features (namespace, {COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_NAMESPACE = "INSERT OR IGNORE INTO namespaces (fingerprint, facts, created) VALUES (?, ?, ?)"
# By fingerprint each time: ids are used again after a prune, so a remembered one might be another encoder's.
_SELECT = f"SELECT {COLUMNS} FROM features WHERE namespace = (SELECT id FROM namespaces WHERE fingerprint = ?) AND key IN "

# The width of a namespace is that of any sound row; a damaged one must not stop its own repair.
_WIDTH = "SELECT width FROM features WHERE namespace = ? AND length(data) = width * CASE dtype WHEN 'float16' THEN 2 ELSE 4 END LIMIT 1"


# Named tuples: eight of each are made for every batch, and frozen dataclasses take twice as long.
class SourceStamp(NamedTuple):
    """What a source file was when its feature was made: bytes, modification time in ns, blake2b-128 of the content, and its place.

    The place names the absolute path: two files of one name, size and time are told apart by it without being read.
    """

    size: int
    mtime_ns: int
    digest: str
    place: str | None = None

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> SourceStamp:
        """Stamp a file; reads all of it.

        Raises:
            ImageReadError: the file cannot be read.
        """
        state = hashlib.blake2b(digest_size=16)
        try:
            with open(path, "rb") as file:
                status = os.fstat(file.fileno())
                while block := file.read(1 << 20):
                    state.update(block)
        except OSError as error:
            facts = {"file": path, "system said": error.strerror or str(error), "expected": "a readable file"}
            raise ImageReadError(f"cannot read image {path}", facts, "correct the path, or restore the file") from error
        return cls(status.st_size, status.st_mtime_ns, state.hexdigest(), place_of(path))


class StoredFeature(NamedTuple):
    """A feature (F,), its cache key, the stamp of its source file (None where it came from a tensor), and what the encoder said of the image."""

    key: str
    feature: np.ndarray[Any, Any]
    stamp: SourceStamp | None = None
    note: str | None = None


class FeatureStore:
    """Features on disk, one namespace for each encoder identity; safe for many processes and threads, and after fork.

    Args:
        cache_dir: folder of `features.sqlite`; made when missing.
        embedding_dtype: `float16` or `float32`, how features are written.
        timeout_s: seconds to wait for another process's write.

    Raises:
        StoreError: the folder or the file cannot be used, or a newer version of this package made the file.
    """

    def __init__(self, cache_dir: str | os.PathLike[str], embedding_dtype: str = "float16", *, timeout_s: float = 30.0) -> None:
        if embedding_dtype not in _DTYPES:
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

    def read(self, identity: EncoderIdentity, keys: Sequence[str]) -> dict[str, StoredFeature]:
        """Return the stored features among `keys`, by key.

        A damaged row is left out with a warning; one that was stored as float16 is left out where float32 is asked for.

        Shape:
            feature: (F,) float16 or float32, as it is stored; read-only, a view of the row.

        Raises:
            StoreError: the file cannot be read.
        """
        found: dict[str, StoredFeature] = {}
        wanted = list(dict.fromkeys(keys))
        fingerprint = identity.fingerprint
        with self._file.use("read") as connection:
            for start in range(0, len(wanted), _KEYS_PER_SELECT):
                raw = {key_to_bytes(key): key for key in wanted[start : start + _KEYS_PER_SELECT]}
                for row in connection.execute(f"{_SELECT}({','.join('?' * len(raw))})", (fingerprint, *raw)):
                    feature = decode(row)
                    if feature is None:
                        logger.warning("[VLM] damaged feature left out: key %r in %s", raw[row[0]], self.path)
                        continue
                    if row[4] == "float16" and self.embedding_dtype == "float32":
                        # Asked for full precision: a rounded row would pass for it.
                        continue
                    found[raw[row[0]]] = StoredFeature(raw[row[0]], feature, stamp_of(row), row[9])
        return found

    def write(self, identity: EncoderIdentity, rows: Iterable[StoredFeature]) -> None:
        """Store features in one transaction: all of them, or none. A key that exists is replaced.

        Raises:
            FeatureError: NaN, infinity, a value that `embedding_dtype` cannot hold, or mixed widths.
            StoreError: the file cannot be written.
        """
        encoded = [self._encode(row) for row in rows]
        if not encoded:
            return
        with self._file.use("write") as connection, transaction(connection):
            facts = json.dumps(dict(identity.facts), sort_keys=True, default=str)
            insert_rows(connection, identity.fingerprint, facts, encoded)

    def keys(self, identity: EncoderIdentity) -> list[str]:
        """Return the keys stored for an identity, sorted."""
        with self._file.use("read") as connection:
            statement = "SELECT key FROM features WHERE namespace = (SELECT id FROM namespaces WHERE fingerprint = ?)"
            rows = connection.execute(statement, (identity.fingerprint,)).fetchall()
        return sorted(key_to_text(key) for (key,) in rows)

    def count(self, identity: EncoderIdentity) -> int:
        """Return how many features are stored for an identity."""
        with self._file.use("read") as connection:
            statement = "SELECT count(*) FROM features WHERE namespace = (SELECT id FROM namespaces WHERE fingerprint = ?)"
            return int(connection.execute(statement, (identity.fingerprint,)).fetchone()[0])

    def close(self) -> None:
        """Close this process's connections; doing it twice is fine."""
        self._file.close()

    def _encode(self, row: StoredFeature) -> Row:
        given = np.asarray(row.feature)
        if given.ndim != 1 or given.size == 0:
            raise FeatureError("cannot store a feature of this shape", {"key": repr(row.key), "found": given.shape, "expected": "(F,)"})
        if not np.isfinite(given).all():
            facts = {"key": repr(row.key), "found": f"{int((~np.isfinite(given)).sum())} NaN or infinite values", "expected": "finite values"}
            raise FeatureError("cannot store a feature that is not finite", facts, "run the encoder in float32, or check the image")
        with np.errstate(over="ignore"):
            kept = given.astype(_DTYPES[self.embedding_dtype])
        if not np.isfinite(kept).all():
            facts = {"key": repr(row.key), "found": f"largest magnitude {np.abs(given).max():g}", "expected": f"what {self.embedding_dtype} can hold"}
            raise FeatureError(f"cannot store a feature as {self.embedding_dtype}: too large", facts, "set `embedding_dtype` to float32")
        # SQLite's text has no lone surrogates; a note is for people to read.
        note = None if row.note is None else row.note.encode("utf-8", "replace").decode()
        key, data = key_to_bytes(row.key), kept.tobytes()
        stamp = (row.stamp.size, row.stamp.mtime_ns, _digest_and_place(row.stamp)) if row.stamp else (None, None, None)
        return (key, *stamp, self.embedding_dtype, kept.size, data, checksum(key, data, note), time.time(), note)


def insert_rows(connection: sqlite3.Connection, fingerprint: str, facts: str, rows: Sequence[Row]) -> None:
    """Insert or replace rows of one namespace, which is made when missing; the caller holds the transaction.

    Raises:
        FeatureError: the widths differ from each other, or from those in the namespace.
    """
    connection.execute(_NAMESPACE, (fingerprint, facts, time.time()))
    (namespace,) = connection.execute("SELECT id FROM namespaces WHERE fingerprint = ?", (fingerprint,)).fetchone()
    stored = connection.execute(_WIDTH, (namespace,)).fetchone()
    expected = stored[0] if stored else rows[0][5]
    for row in rows:
        if row[5] != expected:
            found = {"key": repr(key_to_text(row[0])), "found": f"({row[5]},)", "expected": f"({expected},)"}
            raise FeatureError("cannot store features of different widths in one namespace", found, "store the features of one encoder only")
    connection.executemany(_UPSERT, [(namespace, *row) for row in rows])


def decode(row: Row) -> np.ndarray[Any, Any] | None:
    """Return the feature (F,) of a row, a view in the dtype it is stored in, or None where the row is damaged."""
    key, data, note = row[0], row[6], row[9]
    # SQLite keeps any type in any column: a damaged row can hold a number where text was written.
    if not (isinstance(key, bytes) and isinstance(data, bytes) and (note is None or isinstance(note, str))):
        return None
    dtype = _DTYPES.get(row[4])
    if dtype is None or checksum(key, data, note) != row[7] or divmod(len(data), dtype.itemsize) != (row[5], 0):
        return None
    return np.frombuffer(data, dtype)


def stamp_of(row: Row) -> SourceStamp | None:
    """Return the stamp of a row's source file, or None where it came from a tensor."""
    if row[3] is None:
        return None
    digest, _, place = row[3].partition("@")
    return SourceStamp(row[1], row[2], digest, place or None)


def place_of(path: str | os.PathLike[str]) -> str:
    """Return 16 hex digits that name the absolute path of a file."""
    return hashlib.blake2b(os.fsencode(os.path.abspath(path)), digest_size=8).hexdigest()


def _digest_and_place(stamp: SourceStamp) -> str:
    return stamp.digest if stamp.place is None else f"{stamp.digest}@{stamp.place}"


def checksum(key: bytes, data: bytes, note: str | None) -> int:
    """Return the CRC-32 of key, data and note."""
    crc = zlib.crc32(data, zlib.crc32(key))
    return crc if note is None else zlib.crc32(note.encode(), crc)


def is_facts_of(facts: str, fingerprint: str) -> bool:
    """Tell whether facts as they are stored give this fingerprint (`EncoderIdentity.fingerprint`)."""
    return fingerprint.rsplit("-", 1)[-1] == hashlib.blake2b(facts.encode(), digest_size=8).hexdigest()


def key_to_bytes(key: str) -> bytes:
    """Return a key as it is stored."""
    return key.encode("utf-8", "surrogatepass")


def key_to_text(key: bytes) -> str:
    """Return a stored key as text; a damaged one legibly."""
    try:
        return key.decode("utf-8", "surrogatepass")
    except (UnicodeDecodeError, AttributeError):
        return key.decode("utf-8", "backslashreplace") if isinstance(key, bytes) else repr(key)
