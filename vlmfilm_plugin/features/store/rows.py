"""A row of the SQLite store: its columns by name, how a feature becomes one and is read back, and its checksum."""

from __future__ import annotations

import functools
import hashlib
import json
import time
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from vlmfilm_plugin.errors import FeatureError
from vlmfilm_plugin.features.store.protocol import SourceStamp, StoredFeature

DTYPES: dict[str, np.dtype[Any]] = {"float16": np.dtype("<f2"), "float32": np.dtype("<f4")}
_EXPONENTS: dict[str, tuple[np.dtype[Any], Any]] = {
    "float16": (np.dtype("<u2"), np.uint16(0x7C00)),
    "float32": (np.dtype("<u4"), np.uint32(0x7F80_0000)),
}


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
    source_ctime_ns: int | None
    source_inode: int | None


COLUMNS = ", ".join(Row._fields)

# Above the 32 bits of the sum itself: tells it from the sums of earlier versions, which covered neither encoder nor source.
_CHECKSUM_MARK = 1 << 32
_LARGEST = 1 << 63
# Unix seconds that calendars know: a date that does not print is no date.
_LATEST = 32_503_680_000.0


def encode(item: StoredFeature, dtype: str, fingerprint: str) -> Row:
    """Return the row that stores a feature in `dtype` in the namespace of a fingerprint.

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
    size, mtime_ns, digest, place, ctime_ns, inode = item.stamp if item.stamp is not None else (None, None, "", None, None, None)
    row = Row(
        key=key_to_bytes(item.key),
        source_size=size,
        source_mtime_ns=mtime_ns,
        source_digest=digest,
        source_place=place,
        dtype=dtype,
        width=kept.size,
        data=kept.tobytes(),
        checksum=0,
        created=time.time(),
        note=note,
        source_ctime_ns=ctime_ns,
        source_inode=inode,
    )
    return row._replace(checksum=checksum(row, fingerprint))


def decode(row: Row, fingerprint: str) -> np.ndarray[Any, Any] | None:
    """Return the feature (F,) of a row, a view in the dtype it is stored in, or None where the row is damaged.

    Sound is what `encode` could have written in the namespace of this fingerprint, and nothing else: SQLite keeps any type in any column.
    """
    return decode_all([row], fingerprint)[0]


def decode_all(rows: Sequence[Row], fingerprint: str) -> list[np.ndarray[Any, Any] | None]:
    """Return what `decode` does, of several rows."""
    features = [_decode(row, fingerprint) for row in rows]
    held = [row for row, feature in zip(rows, features, strict=True) if feature is not None]
    # Of all together: to ask of each takes NumPy half as long as everything else of a read.
    if all(_is_finite(dtype, [row.data for row in held if row.dtype == dtype]) for dtype in DTYPES):
        return features
    return [feature if feature is not None and _is_finite(row.dtype, [row.data]) else None for row, feature in zip(rows, features, strict=True)]


def _decode(row: Row, fingerprint: str) -> np.ndarray[Any, Any] | None:
    key, data, note, created = row.key, row.data, row.note, row.created
    # In place, cheapest first: this runs for every image of every batch that is not in memory.
    if type(key) is not bytes or type(data) is not bytes or not data or not (note is None or type(note) is str):
        return None
    dtype = DTYPES.get(row.dtype)
    if dtype is None or type(row.width) is not int or len(data) != row.width * dtype.itemsize:
        return None
    if type(row.source_digest) is not str or checksum(row, fingerprint) != row.checksum:
        return None
    if type(created) is not float or not 0.0 <= created < _LATEST or not _is_sound_source(row) or not _decodes(key):
        return None
    return np.frombuffer(data, dtype)


def _is_finite(dtype: str, data: Sequence[bytes]) -> bool:
    if not data:
        return True
    # All bits of the exponent are set in NaN and infinity alone; quicker than to ask whether numbers are finite.
    kind, exponent = _EXPONENTS[dtype]
    return bool((np.frombuffer(b"".join(data), kind) & exponent).max() < exponent)


def _is_sound_source(row: Row) -> bool:
    size, mtime_ns, ctime_ns, inode, place = row.source_size, row.source_mtime_ns, row.source_ctime_ns, row.source_inode, row.source_place
    if not row.source_digest:
        return all(value is None for value in (size, mtime_ns, ctime_ns, inode, place))
    return (
        type(size) is int
        and 0 <= size < _LARGEST
        and type(mtime_ns) is int
        and -_LARGEST <= mtime_ns < _LARGEST
        and (ctime_ns is None or (type(ctime_ns) is int and -_LARGEST <= ctime_ns < _LARGEST))
        and (inode is None or (type(inode) is int and 0 <= inode < _LARGEST))
        and (place is None or type(place) is str)
    )


def _decodes(key: bytes) -> bool:
    try:
        key.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return False
    return True


def stamp_of(row: Row) -> SourceStamp | None:
    """Return the stamp of a sound row's source file, or None where it came from a tensor."""
    if not row.source_digest:
        return None
    return SourceStamp(
        row.source_size,  # type: ignore[arg-type]
        row.source_mtime_ns,  # type: ignore[arg-type]
        row.source_digest,
        row.source_place,
        row.source_ctime_ns,
        row.source_inode,
    )


def checksum(row: Row, fingerprint: str) -> int:
    """Return the sum over whose feature of which image a row is: encoder, key, content of the source, dtype, data and note.

    Not over where and when the source file was seen: that is only believed where it agrees with the file.
    """
    source = f"{row.dtype}\0{row.source_size}\0{row.source_digest}\0".encode("utf-8", "surrogatepass")
    crc = zlib.crc32(row.data, zlib.crc32(row.key, zlib.crc32(source, _start_of(fingerprint))))
    return _CHECKSUM_MARK | (crc if row.note is None else zlib.crc32(row.note.encode("utf-8", "surrogatepass"), crc))


@functools.lru_cache(maxsize=64)
def _start_of(fingerprint: str) -> int:
    return zlib.crc32(fingerprint.encode("utf-8", "surrogatepass") + b"\0")


def checksum_of_first_version(key: bytes, data: bytes, note: str | None) -> int:
    """Return the CRC-32 of key, data and note: the sum of rows before schema 4, and of exported files of then."""
    crc = zlib.crc32(data, zlib.crc32(key))
    return crc if note is None else zlib.crc32(note.encode("utf-8", "surrogatepass"), crc)


def bound(crc: Any, fingerprint: object) -> Any:
    """Return a sum of the first version as schema 4 held it, right under one fingerprint alone; what is no number stays as it is."""
    return crc ^ zlib.crc32(str(fingerprint).encode("utf-8", "replace")) if isinstance(crc, int) else crc


def is_facts_of(facts: object, fingerprint: object) -> bool:
    """Tell whether facts as they are stored give this fingerprint (`EncoderIdentity.fingerprint`)."""
    if not isinstance(facts, str) or not isinstance(fingerprint, str):
        return False
    name = facts_in(facts).get("encoder", "encoder")
    return fingerprint == f"{name}-{hashlib.blake2b(facts.encode('utf-8', 'surrogatepass'), digest_size=8).hexdigest()}"


def facts_in(text: object) -> dict[str, Any]:
    """Return facts as they are stored, or what is there in their place under `unreadable`."""
    try:
        facts = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        facts = None
    return facts if isinstance(facts, dict) else {"unreadable": text if isinstance(text, str) else repr(text)}


def key_to_bytes(key: str) -> bytes:
    """Return a key as it is stored."""
    return key.encode("utf-8", "surrogatepass")


def key_to_text(key: bytes) -> str:
    """Return a stored key as text; a damaged one legibly."""
    try:
        return key.decode("utf-8", "surrogatepass")
    except (UnicodeDecodeError, AttributeError):
        return key.decode("utf-8", "backslashreplace") if isinstance(key, bytes) else repr(key)
