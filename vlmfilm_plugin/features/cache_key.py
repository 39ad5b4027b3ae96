"""Name the image of each row of a batch: cache keys, splits and source files (reference.md, section 3).

Reads whatever a host or MONAI put into a batch and never fails on an odd one. Tensors are duck-typed: torch is not imported.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from vlmfilm_plugin.features.content_hash import attempt, content_hashes, row_count, row_vectors

FINGERPRINT = "fingerprint"
_NAME = "name"
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


@dataclass(frozen=True)
class CacheKeys:
    """The cache keys of a batch, `keys[i]` of row i, and where they came from.

    `source` is the expression that gave them, such as `batch['name']`, or `fingerprint`.
    """

    keys: tuple[str, ...]
    source: str


def cache_keys(batch: object, rows: int, *, dataset_root: str | os.PathLike[str] | None = None, image: object = None) -> CacheKeys:
    """Return one key a row, from the first source that names every row, else from the image's content.

    Args:
        batch: what the host's data loader gave; anything, None included.
        rows: the number of rows of the UNet's input.
        dataset_root: names under it are made relative to it.
        image: what fingerprints are taken of; default `batch["image"]`.

    Shape:
        image: (rows, C, H, W), any dtype, any device.

    Raises:
        ConditionError: nothing names the rows, and there is no image with `rows` rows.
    """
    splits = split_of(batch, rows)
    for label, field, held in _key_sources(batch):
        names = _names(held, rows, is_shared=field == _NAME)
        if names is None:
            continue
        cut = [_cut(name, is_name=field == _NAME) for name in names]
        if all(cut):
            return CacheKeys(tuple(f"{split}:{_relative(name, dataset_root)}" for split, name in zip(splits, cut, strict=True)), label)
    content = image if image is not None else _get(batch, "image")
    return CacheKeys(content_hashes(content, splits, _crops(batch, rows)), FINGERPRINT)


def content_keys(image: object, split: str | Sequence[str]) -> tuple[str, ...]:
    """Return one key a row by the content of the rows alone: equal rows have equal keys, wherever they stand.

    Args:
        split: of all rows, or one a row.

    Shape:
        image: (rows, C, H, W), any dtype, any device.

    Raises:
        ConditionError: `image` is not an array or tensor of rows, or `split` does not fit it.
    """
    splits = [split] * (row_count(image) or 0) if isinstance(split, str) else list(split)
    return content_hashes(image, splits, [b""] * len(splits))


def split_of(batch: object, rows: int) -> list[str]:
    """Return the split of each row: `batch["split"]`, else `stage`, else `mode`, else `unknown`; a text is shared by all rows."""
    for field in _SPLIT_FIELDS:
        held = _get(batch, field)
        splits = _names(getattr(held, "value", held) if isinstance(held, str) else held, rows, is_shared=True)
        if splits is not None:
            return splits
    return ["unknown"] * rows


def names_of(batch: object, rows: int) -> list[str] | None:
    """Return `batch["name"]`, uncut, when it holds one name a row, else None."""
    return _names(_get(batch, _NAME), rows)


def path_key(path: Path, split: str, dataset_root: str | os.PathLike[str] | None = None) -> str:
    """Return the cache key of an image that has a file but no name of its own."""
    return f"{split}:{_relative(path.as_posix(), dataset_root)}"


def source_paths(batch: object, rows: int, *, dataset_root: str | os.PathLike[str] | None = None) -> list[Path | None]:
    """Return the file on disk behind each row, or None where none is found.

    Order: `batch["image"].meta`, `batch["image_meta_dict"]`, the other path fields of the batch, then `dataset_root` / name.
    Relative paths are tried against the working directory, then against `dataset_root`. The file is the whole image,
    whatever crop of it the row holds.
    """
    found: list[Path | None] = [None] * rows
    for label, field, held in _path_sources(batch):
        # The meta of a MetaTensor may be that of one image: a plain text in it then names the only row.
        values = _names(held, rows, is_shared=field == _NAME or (rows == 1 and label.startswith(_TENSOR_META)))
        if values is None:
            continue
        for row, value in enumerate(values):
            if found[row] is None:
                found[row] = _existing(value, field, dataset_root)
        if None not in found:
            break
    return found


def _key_sources(batch: object) -> Iterator[_Source]:
    """Yield the sources A to E in order."""
    yield f"batch[{_NAME!r}]", _NAME, _get(batch, _NAME)
    yield from _meta_sources("batch['image_meta_dict']", _get(batch, "image_meta_dict"))
    for field in _C_FIELDS:
        held = _get(batch, field)
        yield f"batch[{field!r}]", field, held
        yield from _meta_sources(f"batch[{field!r}]", held)
    yield from _meta_sources(_TENSOR_META, _image_meta(batch))
    for field in _E_FIELDS:
        yield f"batch[{field!r}]", field, _get(batch, field)


def _path_sources(batch: object) -> Iterator[_Source]:
    yield f"{_TENSOR_META}['filename_or_obj']", "filename_or_obj", _get(_image_meta(batch), "filename_or_obj")
    yield from (source for source in _key_sources(batch) if source[1] in _PATH_FIELDS)
    yield f"batch[{_NAME!r}]", _NAME, _get(batch, _NAME)


def _meta_sources(label: str, meta: object) -> Iterator[_Source]:
    """Yield the fields of a metadata mapping, or of a list with one mapping a row, then the same under its `meta`."""
    for prefix, holder in ((label, meta), (f"{label}['meta']", _column(meta, "meta"))):
        for field in _META_FIELDS:
            yield f"{prefix}[{field!r}]", field, _column(holder, field)


def _column(holder: object, field: str) -> object:
    if isinstance(holder, list | tuple) and holder and all(isinstance(item, Mapping) for item in holder):
        return [_get(item, field) for item in holder]
    return _get(holder, field)


def _image_meta(batch: object) -> object:
    return getattr(_get(batch, "image"), "meta", None)


def _get(holder: object, field: str) -> object:
    if not isinstance(holder, Mapping):
        return None
    try:
        return holder[field]
    except Exception:  # a lazy mapping may fail in any way; a field that cannot be read names nothing
        return None


def _is_many(held: object) -> bool:
    return isinstance(held, list | tuple) or getattr(held, "ndim", None) == 1


def _names(held: object, rows: int, *, is_shared: bool = False) -> list[str] | None:
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


def _cut(name: str, *, is_name: bool) -> str:
    if is_name:
        name = name.split("@", 1)[0]
    return _SUFFIX.split(name, maxsplit=1)[0].strip()


def _relative(name: str, root: str | os.PathLike[str] | None) -> str:
    if root is None or not os.fspath(root):
        return name
    # By path components, so that /data/a does not count as a prefix of /data/ab/1.png.
    path, base = PurePath(name), PurePath(root)
    return path.relative_to(base).as_posix() if path != base and path.is_relative_to(base) else name


def _existing(value: str, field: str, root: str | os.PathLike[str] | None) -> Path | None:
    bases = [Path(root)] if root is not None else []
    if field != _NAME:
        bases.insert(0, Path())
    for text in dict.fromkeys((value, _cut(value, is_name=field == _NAME))):
        for base in bases if text else ():
            path = base / text
            try:
                if path.is_file():
                    return path
            except (OSError, ValueError):  # too long for the file system, or a NUL byte: no file has this name
                continue
    return None


def _crops(batch: object, rows: int) -> list[bytes]:
    """Return what the metadata says about the crop of each row, as bytes; empty where it says nothing."""
    parts = [b""] * rows
    meta = _get(batch, "image_meta_dict")
    holders = (batch, meta, _get(meta, "meta"), _get(batch, "meta_dict"), _get(batch, "metadata"), _get(batch, "meta"), _image_meta(batch))
    for field in _CROP_FIELDS:
        for holder in holders:
            values = row_vectors(_column(holder, field), rows, is_scalar_fine=field == "patch_index")
            if values is not None:
                parts = [part + f"{field}={value!r};".encode() for part, value in zip(parts, values, strict=True)]
                break
    return parts
