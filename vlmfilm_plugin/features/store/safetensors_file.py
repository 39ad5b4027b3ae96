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
from vlmfilm_plugin.features.store import scan
from vlmfilm_plugin.features.store.admin import Merged, Namespace, put
from vlmfilm_plugin.features.store.rows import Row, checksum, checksum_of_first_version, decode, is_facts_of, key_to_bytes, key_to_text
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
        stored = scan.namespace_of(connection, space.fingerprint)
        if not is_facts_of(stored.facts, stored.fingerprint):
            found = {"namespace": stored.fingerprint, "found": f"facts of another encoder, or none: {stored.facts[:100]}"}
            raise StoreError("cannot export: whose features these are is damaged", found, "encode the images again")
        name, facts, width = stored.fingerprint, stored.facts, scan.width_of(connection, stored.id)
        held = ((row, decode(row, name)) for row in scan.rows(connection, stored.id) if row.width == width)
        rows = sorted(((row, feature) for row, feature in held if feature is not None), key=lambda pair: (pair[0].key, pair[0].source_digest))
    if not rows:
        raise StoreError("cannot export: no sound feature in this namespace", {"namespace": space.fingerprint}, "choose another one")
    dtype = "<f4" if any(row.dtype == "float32" for row, _ in rows) else "<f2"
    features = np.stack([feature for _, feature in rows]).astype(dtype)
    kept = {"<f4": "float32", "<f2": "float16"}[dtype]
    described = [_describe(row._replace(dtype=kept, data=feature.tobytes()), name) for (row, _), feature in zip(rows, features, strict=True)]
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
        fingerprint, facts = metadata["fingerprint"], metadata["facts"]
        rows = [_row(entry, feature, dtype, fingerprint) for entry, feature in zip(described, features, strict=True)]
        if not is_facts_of(facts, fingerprint):
            raise ValueError(f"facts that are not those of {fingerprint}")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise _not_ours(Path(path), f"{type(error).__name__}: {error}") from error
    done = Merged()
    for start in range(0, len(rows), scan.STEP):
        put(file, fingerprint, facts, rows[start : start + scan.STEP], done)
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


def _describe(row: Row, fingerprint: str) -> dict[str, Any]:
    # Digest and place in one text, as the first files of this format have it.
    digest = row.source_digest if row.source_place is None else f"{row.source_digest}@{row.source_place}"
    stamp = [row.source_size, row.source_mtime_ns, digest] if digest else None
    return {"key": key_to_text(row.key), "stamp": stamp, "note": row.note, "created": row.created, "checksum": checksum(row, fingerprint)}


def _row(entry: dict[str, Any], feature: np.ndarray[Any, Any], dtype: str, fingerprint: str) -> Row:
    size, mtime_ns, text = entry["stamp"] or (None, None, "")
    digest, _, place = text.partition("@")
    row = Row(
        key=key_to_bytes(entry["key"]),
        source_size=size,
        source_mtime_ns=mtime_ns,
        source_digest=digest,
        source_place=place or None,
        dtype=dtype,
        width=feature.size,
        data=feature.tobytes(),
        checksum=entry["checksum"],
        created=float(entry["created"]),
        note=entry["note"],
        # Of another machine, or of a time when the file was another.
        source_ctime_ns=None,
        source_inode=None,
    )
    is_old = row.checksum == checksum_of_first_version(row.key, row.data, row.note)
    return row._replace(checksum=checksum(row, fingerprint)) if is_old else row


def _not_ours(path: Path, found: str) -> StoreError:
    facts = {"file": path, "found": found, "expected": f"a safetensors file that `vlmfilm cache export` wrote ({FORMAT})"}
    return StoreError("cannot import features from this file", facts, "export it again")
