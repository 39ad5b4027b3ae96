"""What a batch says about its rows: names, splits, source files (reference.md, section 3).

Reads whatever a host or MONAI put into a batch and never fails on an odd one. Tensors are duck-typed: torch is not imported.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vlmfilm_plugin.features.content_hash import attempt, row_vectors

NAME = "name"

_TENSOR_META = "batch['image'].meta"

_META_FIELDS = ("filename_or_obj", "filepath", "path", "filename", "image_id")

_C_FIELDS = ("meta_dict", "metadata", "meta", "image_path", "path", "image_id", "id", "filename")

_E_FIELDS = ("filepath", "path", "image_id", "id", "filename", "index", "idx", "case_id")

_SPLIT_FIELDS = ("split", "stage", "mode")

_PATH_FIELDS = frozenset({"filename_or_obj", "filepath", "path", "image_path", "filename"})

_SUFFIX = re.compile(r"::|[|#?]")

# Which crop of which image a row is. The last two are vectors, one a row.
_CROP_FIELDS = ("patch_index", "crop_center", "spatial_shape")

# A source: how it is written in a log line, its last field, and what the batch holds there.
_Source = tuple[str, str, object]


def split_of(batch: object, rows: int) -> list[str]:
    """Return the split of each row: `batch["split"]`, else `stage`, else `mode`, else `unknown`; a text is shared by all rows."""
    for field in _SPLIT_FIELDS:
        held = get_field(batch, field)
        splits = names_in(getattr(held, "value", held) if isinstance(held, str) else held, rows, is_shared=True)
        if splits is not None:
            return splits
    return ["unknown"] * rows


def names_of(batch: object, rows: int) -> list[str] | None:
    """Return `batch["name"]`, uncut, when it holds one name a row, else None."""
    return names_in(get_field(batch, NAME), rows)


def source_paths(batch: object, rows: int, *, dataset_root: str | os.PathLike[str] | None = None) -> list[Path | None]:
    """Return the file on disk behind each row, or None where none is found.

    Order: `batch["image"].meta`, `batch["image_meta_dict"]`, the other path fields of the batch, then `dataset_root` / name.
    Relative paths are tried against the working directory, then against `dataset_root`. The file is the whole image,
    whatever crop of it the row holds.
    """
    found: list[Path | None] = [None] * rows
    for label, field, held in _path_sources(batch):
        # The meta of a MetaTensor may be that of one image: a plain text in it then names the only row.
        values = names_in(held, rows, is_shared=field == NAME or (rows == 1 and label.startswith(_TENSOR_META)))
        if values is None:
            continue
        for row, value in enumerate(values):
            if found[row] is None:
                found[row] = _existing(value, field, dataset_root)
        if None not in found:
            break
    return found


def key_sources(batch: object) -> Iterator[_Source]:
    """Yield the sources A to E in order."""
    yield f"batch[{NAME!r}]", NAME, get_field(batch, NAME)
    yield from _meta_sources("batch['image_meta_dict']", get_field(batch, "image_meta_dict"))
    for field in _C_FIELDS:
        held = get_field(batch, field)
        yield f"batch[{field!r}]", field, held
        yield from _meta_sources(f"batch[{field!r}]", held)
    yield from _meta_sources(_TENSOR_META, _image_meta(batch))
    for field in _E_FIELDS:
        yield f"batch[{field!r}]", field, get_field(batch, field)


def _path_sources(batch: object) -> Iterator[_Source]:
    yield f"{_TENSOR_META}['filename_or_obj']", "filename_or_obj", get_field(_image_meta(batch), "filename_or_obj")
    yield from (source for source in key_sources(batch) if source[1] in _PATH_FIELDS)
    yield f"batch[{NAME!r}]", NAME, get_field(batch, NAME)


def _meta_sources(label: str, meta: object) -> Iterator[_Source]:
    """Yield the fields of a metadata mapping, or of a list with one mapping a row, then the same under its `meta`."""
    for prefix, holder in ((label, meta), (f"{label}['meta']", _column(meta, "meta"))):
        for field in _META_FIELDS:
            yield f"{prefix}[{field!r}]", field, _column(holder, field)


def _column(holder: object, field: str) -> object:
    if isinstance(holder, list | tuple) and holder and all(isinstance(item, Mapping) for item in holder):
        return [get_field(item, field) for item in holder]
    return get_field(holder, field)


def _image_meta(batch: object) -> object:
    return getattr(get_field(batch, "image"), "meta", None)


def get_field(holder: object, field: str) -> object:
    if not isinstance(holder, Mapping):
        return None
    try:
        return holder[field]
    except Exception:  # a lazy mapping may fail in any way; a field that cannot be read names nothing
        return None


def _is_many(held: object) -> bool:
    return isinstance(held, list | tuple) or getattr(held, "ndim", None) == 1


def names_in(held: object, rows: int, *, is_shared: bool = False) -> list[str] | None:
    """Return one non-empty text a row, or None where `held` does not give exactly that."""
    if isinstance(held, str | os.PathLike) and is_shared:
        text = _text(held)
        return [text] * rows if text else None
    if not _is_many(held):
        return None
    values: Any = held if isinstance(held, list | tuple) else attempt(held.tolist)  # type: ignore[attr-defined]
    if not isinstance(values, list | tuple) or len(values) != rows:
        return None
    texts = [_text(value) for value in values]
    return [text for text in texts if text] if all(texts) else None


def _text(value: object) -> str:
    """Return a name as text; empty where it is none (None, a float, a nested list)."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = attempt(value.item)
    if isinstance(value, os.PathLike):
        value = attempt(value.__fspath__)
    if isinstance(value, bytes):
        value = os.fsdecode(value)
    if isinstance(value, str):
        return value.strip()
    # 128 bits: an index or an identifier; Python refuses to print very long numbers.
    return str(value) if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() <= 128 else ""


def cut_name(name: str, *, is_name: bool) -> str:
    if is_name:
        name = name.split("@", 1)[0]
    return _SUFFIX.split(name, maxsplit=1)[0].strip()


def _existing(value: str, field: str, root: str | os.PathLike[str] | None) -> Path | None:
    bases = [Path(root)] if root is not None else []
    if field != NAME:
        bases.insert(0, Path())
    for text in dict.fromkeys((value, cut_name(value, is_name=field == NAME))):
        for base in bases if text else ():
            path = base / text
            try:
                if path.is_file():
                    return path
            except (OSError, ValueError):  # too long for the file system, or a NUL byte: no file has this name
                continue
    return None


def crops_of(batch: object, rows: int) -> list[bytes]:
    """Return what the metadata says about the crop of each row, as bytes; empty where it says nothing."""
    parts = [b""] * rows
    meta = get_field(batch, "image_meta_dict")
    holders = (
        batch,
        meta,
        get_field(meta, "meta"),
        *(get_field(batch, field) for field in ("meta_dict", "metadata", "meta")),
        _image_meta(batch),
    )
    for field in _CROP_FIELDS:
        for holder in holders:
            values = row_vectors(_column(holder, field), rows, is_scalar_fine=field == "patch_index")
            if values is not None:
                parts = [part + f"{field}={value!r};".encode() for part, value in zip(parts, values, strict=True)]
                break
    return parts
