"""A row of the SQLite store: its columns by name, how a feature becomes one and is read back, and its checksum."""

from __future__ import annotations

import hashlib
import json
import time
import zlib
from typing import Any, NamedTuple

import numpy as np

from vlmfilm_plugin.errors import FeatureError
from vlmfilm_plugin.features.store.protocol import SourceStamp, StoredFeature

DTYPES: dict[str, np.dtype[Any]] = {"float16": np.dtype("<f2"), "float32": np.dtype("<f4")}


class Row(NamedTuple):
    """Every column of a row but its namespace. `source_digest` is empty where the feature came from a tensor."""

    key: bytes
    source_size: int | None
    source_mtime_ns: int | None
    source_digest: str
    source_place: str | None
    dtype: str
    width: int
    data: bytes
    checksum: int
    created: float
    note: str | None


COLUMNS = ", ".join(Row._fields)


def encode(item: StoredFeature, dtype: str, fingerprint: str) -> Row:
    """Return the row that stores a feature of this encoder in `dtype`.

    Raises:
        FeatureError: it is no (F,), not finite, or too large for `dtype`.
    """
    given = np.asarray(item.feature)
    if given.ndim != 1 or given.size == 0:
        raise FeatureError("cannot store a feature of this shape", {"key": repr(item.key), "found": given.shape, "expected": "(F,)"})
    if not np.isfinite(given).all():
        facts = {"key": repr(item.key), "found": f"{int((~np.isfinite(given)).sum())} NaN or infinite values", "expected": "finite values"}
        raise FeatureError("cannot store a feature that is not finite", facts, "run the encoder in float32, or check the image")
    with np.errstate(over="ignore"):
        kept = given.astype(DTYPES[dtype])
    if not np.isfinite(kept).all():
        facts = {"key": repr(item.key), "found": f"largest magnitude {np.abs(given).max():g}", "expected": f"what {dtype} can hold"}
        raise FeatureError(f"cannot store a feature as {dtype}: too large", facts, "set `embedding_dtype` to float32")
    # SQLite's text has no lone surrogates; a note is for people to read.
    note = None if item.note is None else item.note.encode("utf-8", "replace").decode()
    key, data = key_to_bytes(item.key), kept.tobytes()
    size, mtime_ns, digest, place = item.stamp if item.stamp is not None else (None, None, "", None)
    return Row(
        key=key,
        source_size=size,
        source_mtime_ns=mtime_ns,
        source_digest=digest,
        source_place=place,
        dtype=dtype,
        width=kept.size,
        data=data,
        checksum=bound(checksum(key, data, note), fingerprint),
        created=time.time(),
        note=note,
    )


def decode(row: Row, fingerprint: str) -> np.ndarray[Any, Any] | None:
    """Return the feature (F,) of a row of this encoder, a view in the dtype it is stored in, or None where the row is damaged or another's."""
    key, data, note = row.key, row.data, row.note
    # SQLite keeps any type in any column: a damaged row can hold a number where text was written.
    if not (isinstance(key, bytes) and isinstance(data, bytes) and (note is None or isinstance(note, str))):
        return None
    size, place = row.source_size, row.source_place
    if not (isinstance(row.source_digest, str) and (size is None or isinstance(size, int)) and (place is None or isinstance(place, str))):
        return None
    if not (isinstance(row.created, float) and (row.source_mtime_ns is None or isinstance(row.source_mtime_ns, int))):
        return None
    dtype = DTYPES.get(row.dtype) if isinstance(row.dtype, str) else None
    if dtype is None or bound(checksum(key, data, note), fingerprint) != row.checksum or divmod(len(data), dtype.itemsize) != (row.width, 0):
        return None
    return np.frombuffer(data, dtype)


def stamp_of(row: Row) -> SourceStamp | None:
    """Return the stamp of a row's source file, or None where it came from a tensor."""
    if not row.source_digest or row.source_size is None or row.source_mtime_ns is None:
        return None
    return SourceStamp(row.source_size, row.source_mtime_ns, row.source_digest, row.source_place)


def checksum(key: bytes, data: bytes, note: str | None) -> int:
    """Return the CRC-32 of key, data and note."""
    crc = zlib.crc32(data, zlib.crc32(key))
    return crc if note is None else zlib.crc32(note.encode(), crc)


def bound(crc: Any, fingerprint: object) -> Any:
    """Return a checksum that is right in the namespace of this fingerprint alone; twice, it is the first one. What is no number stays as it is."""
    return crc ^ zlib.crc32(str(fingerprint).encode("utf-8", "replace")) if isinstance(crc, int) else crc


def is_facts_of(facts: str, fingerprint: str) -> bool:
    """Tell whether facts as they are stored give this fingerprint (`EncoderIdentity.fingerprint`); both may be anything that a file holds."""
    try:
        name = json.loads(facts).get("encoder", "encoder")
        return fingerprint == f"{name}-{hashlib.blake2b(facts.encode(), digest_size=8).hexdigest()}"
    except (AttributeError, TypeError, ValueError, RecursionError):
        return False


def key_to_bytes(key: str) -> bytes:
    """Return a key as it is stored."""
    return key.encode("utf-8", "surrogatepass")


def key_to_text(key: bytes) -> str:
    """Return a stored key as text; a damaged one legibly."""
    try:
        return key.decode("utf-8", "surrogatepass")
    except (UnicodeDecodeError, AttributeError):
        return key.decode("utf-8", "backslashreplace") if isinstance(key, bytes) else repr(key)
