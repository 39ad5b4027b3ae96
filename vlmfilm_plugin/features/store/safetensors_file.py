"""Features out of a store and into one: a safetensors file of one namespace, readable without this package.

Tensors: `features` (N, F), float16 or float32, and `rows`, UTF-8 JSON with one object a feature (key, stamp, note, checksum, date). Metadata:
`format`, `fingerprint` and `facts`. Nothing in the file is executed when it is read.
"""

from __future__ import annotations

import glob
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from vlmfilm_plugin.errors import StoreError
from vlmfilm_plugin.features.store.admin import ROWS, Merged, Namespace, put, rows_of
from vlmfilm_plugin.features.store.rows import Row, bound, checksum, decode, is_facts_of, key_to_bytes, key_to_text
from vlmfilm_plugin.features.store.sqlite_file import StoreFile
from vlmfilm_plugin.files import new_file, refuse_to_replace

FORMAT = "vlmfilm-features-1"


def export(file: StoreFile, space: Namespace, path: str | os.PathLike[str], *, force: bool = False) -> int:
    """Write the sound features of a namespace to a safetensors file; return their number. All are in memory meanwhile.

    Args:
        force: replace the file where it exists; never the store itself.

    Raises:
        StoreError: there are none, or the file exists, or cannot be written.
    """
    from safetensors.numpy import save

    what, store = "features", list(file.path.parent.glob(f"{glob.escape(file.path.name)}*"))
    refuse_to_replace(path, what, inputs=store, force=force, error=StoreError)
    with file.use("read") as connection:
        facts, stored = rows_of(connection, space.fingerprint)
        if not is_facts_of(facts, space.fingerprint):
            found = {"namespace": space.fingerprint, "found": f"facts of another encoder, or none: {str(facts)[:100]}"}
            raise StoreError("cannot export: whose features these are is damaged", found, "encode the images again")
        rows = [(row, feature) for row in stored if (feature := decode(row, space.fingerprint)) is not None]
    if not rows:
        raise StoreError("cannot export: no sound feature in this namespace", {"namespace": space.fingerprint}, "choose another one")
    dtype = "<f4" if any(row.dtype == "float32" for row, _ in rows) else "<f2"
    features = np.stack([feature for _, feature in rows]).astype(dtype)
    described = [_describe(row, feature.tobytes()) for (row, _), feature in zip(rows, features, strict=True)]
    tensors = {"features": features, "rows": np.frombuffer(json.dumps(described).encode(), dtype=np.uint8)}
    data = save(tensors, metadata={"format": FORMAT, "fingerprint": space.fingerprint, "facts": facts})
    with new_file(path, what, inputs=store, force=force, error=StoreError) as exported:
        exported.write(data)
    return len(rows)


def import_file(file: StoreFile, path: str | os.PathLike[str]) -> tuple[str, Merged]:
    """Take the features of an exported file into a store; of two with one key and content the newer stays. Return the namespace and what was done.

    Raises:
        StoreError: the file was not written by `export`, or is damaged.
        FeatureError: the store's namespace holds another width.
    """
    metadata, tensors = _load(Path(path))
    try:
        features, described = tensors["features"], json.loads(tensors["rows"].tobytes())
        dtype = {"float16": "float16", "float32": "float32"}[str(features.dtype)]
        rows = [_row(entry, feature, dtype, metadata["fingerprint"]) for entry, feature in zip(described, features, strict=True)]
        fingerprint, facts = metadata["fingerprint"], metadata["facts"]
        if not is_facts_of(facts, fingerprint):
            raise ValueError(f"facts that are not those of {fingerprint}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _not_ours(Path(path), f"{type(error).__name__}: {error}") from error
    done = Merged()
    for start in range(0, len(rows), ROWS):
        put(file, fingerprint, facts, rows[start : start + ROWS], done)
    return fingerprint, done


def _load(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="np") as content:
            metadata = content.metadata() or {}
            tensors = {name: content.get_tensor(name) for name in content.keys()} if metadata.get("format") == FORMAT else {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise _not_ours(path, " ".join(str(error).split())) from error
    if not tensors:
        raise _not_ours(path, f"format {metadata.get('format')!r}")
    return metadata, tensors


def _describe(row: Row, data: bytes) -> dict[str, Any]:
    # Digest and place in one text, as the first files of this format have it.
    digest = row.source_digest if row.source_place is None else f"{row.source_digest}@{row.source_place}"
    stamp = [row.source_size, row.source_mtime_ns, digest] if digest else None
    return {"key": key_to_text(row.key), "stamp": stamp, "note": row.note, "created": row.created, "checksum": checksum(row.key, data, row.note)}


def _row(entry: dict[str, Any], feature: np.ndarray[Any, Any], dtype: str, fingerprint: str) -> Row:
    size, mtime_ns, text = entry["stamp"] or (None, None, "")
    digest, _, place = text.partition("@")
    return Row(
        key=key_to_bytes(entry["key"]),
        source_size=size,
        source_mtime_ns=mtime_ns,
        source_digest=digest,
        source_place=place or None,
        dtype=dtype,
        width=feature.size,
        data=feature.tobytes(),
        checksum=bound(entry["checksum"], fingerprint),
        created=float(entry["created"]),
        note=entry["note"],
    )


def _not_ours(path: Path, found: str) -> StoreError:
    facts = {"file": path, "found": found, "expected": f"a safetensors file that `vlmfilm cache export` wrote ({FORMAT})"}
    return StoreError("cannot import features from this file", facts, "export it again")
