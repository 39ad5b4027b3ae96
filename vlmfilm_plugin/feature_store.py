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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmfilm_plugin.errors import FeatureError, ImageReadError, StoreError
from vlmfilm_plugin.store_file import FILE_NAME, StoreFile, transaction

if TYPE_CHECKING:
    from vlmfilm_plugin.encoders.base import Identity

logger = logging.getLogger("vlmfilm.store")

_KEYS_PER_SELECT = 500  # SQLite's old limit is 999 variables a statement
_DTYPES = {"float16": "<f2", "float32": "<f4"}
_UPSERT = "INSERT OR REPLACE INTO features VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"

# The width of a namespace is that of any sound row; a damaged one must not stop its own repair.
_WIDTH = "SELECT width FROM features WHERE namespace = ? AND length(data) = width * CASE dtype WHEN 'float16' THEN 2 ELSE 4 END LIMIT 1"


@dataclass(frozen=True)
class SourceStamp:
    """What a source file was when its feature was made: bytes, modification time in ns, blake2b-128 of the content."""

    size: int
    mtime_ns: int
    digest: str

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
        return cls(status.st_size, status.st_mtime_ns, state.hexdigest())


@dataclass(frozen=True, eq=False)
class StoredFeature:
    """A feature (F,), its cache key, and the stamp of its source file, or None where it came from a tensor."""

    key: str
    feature: np.ndarray[Any, Any]
    stamp: SourceStamp | None = None


class FeatureStore:
    """Features on disk, one namespace for each encoder identity; safe for many processes and threads, and after fork.

    Args:
        cache_dir: folder of `features.sqlite`; made when missing.
        embedding_dtype: `float16` or `float32`, how features are written; what is read is float32.
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
        self._namespaces: dict[str, int] = {}
        self._file = StoreFile(self.path, timeout_s)

    def __enter__(self) -> FeatureStore:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[object, ...]:
        # A spawned data-loader worker opens the file for itself.
        return type(self), (str(self.path.parent), self.embedding_dtype)

    def read(self, identity: Identity, keys: Sequence[str]) -> dict[str, StoredFeature]:
        """Return the stored features among `keys`, by key; a damaged row is left out with a warning.

        Shape:
            feature: (F,) float32, writable.

        Raises:
            StoreError: the file cannot be read.
        """
        found: dict[str, StoredFeature] = {}
        wanted = list(dict.fromkeys(keys))
        with self._file.use("read") as connection:
            namespace = self._namespace(connection, identity)
            for start in range(0, len(wanted) if namespace is not None else 0, _KEYS_PER_SELECT):
                raw = {_to_bytes(key): key for key in wanted[start : start + _KEYS_PER_SELECT]}
                statement = (
                    "SELECT key, source_size, source_mtime_ns, source_digest, dtype, width, data, checksum FROM features"
                    f" WHERE namespace = ? AND key IN ({','.join('?' * len(raw))})"
                )
                for row in connection.execute(statement, (namespace, *raw)):
                    feature = _decode(row)
                    if feature is None:
                        logger.warning("[VLM] damaged feature left out: key %r in %s", raw[row[0]], self.path)
                        continue
                    stamp = SourceStamp(row[1], row[2], row[3]) if row[3] is not None else None
                    found[raw[row[0]]] = StoredFeature(raw[row[0]], feature, stamp)
        return found

    def write(self, identity: Identity, rows: Iterable[StoredFeature]) -> None:
        """Store features in one transaction: all of them, or none. A key that exists is replaced.

        Raises:
            FeatureError: NaN, infinity, a value that `embedding_dtype` cannot hold, or mixed widths.
            StoreError: the file cannot be written.
        """
        encoded = [self._encode(row) for row in rows]
        if not encoded:
            return
        with self._file.use("write") as connection, transaction(connection):
            connection.execute(
                "INSERT OR IGNORE INTO namespaces (fingerprint, facts, created) VALUES (?, ?, ?)",
                (identity.fingerprint, json.dumps(dict(identity.facts), sort_keys=True, default=str), time.time()),
            )
            (namespace,) = connection.execute("SELECT id FROM namespaces WHERE fingerprint = ?", (identity.fingerprint,)).fetchone()
            stored = connection.execute(_WIDTH, (namespace,)).fetchone()
            _check_widths(encoded, stored[0] if stored else encoded[0][5])
            connection.executemany(_UPSERT, [(namespace, *values) for values in encoded])

    def keys(self, identity: Identity) -> list[str]:
        """Return the keys stored for an identity, sorted."""
        with self._file.use("read") as connection:
            rows = connection.execute("SELECT key FROM features WHERE namespace = ?", (self._namespace(connection, identity),)).fetchall()
        return sorted(_to_text(key) for (key,) in rows)

    def count(self, identity: Identity) -> int:
        """Return how many features are stored for an identity."""
        with self._file.use("read") as connection:
            statement = "SELECT count(*) FROM features WHERE namespace = ?"
            return int(connection.execute(statement, (self._namespace(connection, identity),)).fetchone()[0])

    def close(self) -> None:
        """Close this process's connections; doing it twice is fine."""
        self._file.close()

    def _namespace(self, connection: sqlite3.Connection, identity: Identity) -> int | None:
        fingerprint = identity.fingerprint
        if fingerprint not in self._namespaces:
            row = connection.execute("SELECT id FROM namespaces WHERE fingerprint = ?", (fingerprint,)).fetchone()
            if row is None:
                return None
            self._namespaces[fingerprint] = row[0]
        return self._namespaces[fingerprint]

    def _encode(self, row: StoredFeature) -> tuple[Any, ...]:
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
        key, data = _to_bytes(row.key), kept.tobytes()
        stamp = (row.stamp.size, row.stamp.mtime_ns, row.stamp.digest) if row.stamp else (None, None, None)
        return (key, *stamp, self.embedding_dtype, kept.size, data, _checksum(key, data), time.time())


def _check_widths(encoded: Sequence[tuple[Any, ...]], expected: int) -> None:
    for values in encoded:
        if values[5] != expected:
            facts = {"key": repr(_to_text(values[0])), "found": f"({values[5]},)", "expected": f"({expected},)"}
            raise FeatureError("cannot store features of different widths in one namespace", facts, "store the features of one encoder only")


def _decode(row: tuple[Any, ...]) -> np.ndarray[Any, Any] | None:
    key, _, _, _, dtype, width, data, checksum = row
    if dtype not in _DTYPES or not isinstance(data, bytes) or _checksum(key, data) != checksum:
        return None
    feature = np.frombuffer(data, dtype=_DTYPES[dtype]) if len(data) % np.dtype(_DTYPES[dtype]).itemsize == 0 else np.empty(0)
    return feature.astype(np.float32) if feature.size == width else None


def _checksum(key: bytes, data: bytes) -> int:
    return zlib.crc32(data, zlib.crc32(key))


def _to_bytes(key: str) -> bytes:
    return key.encode("utf-8", "surrogatepass")


def _to_text(key: bytes) -> str:
    return key.decode("utf-8", "surrogatepass")
