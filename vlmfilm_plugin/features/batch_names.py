"""What a batch says about its rows: names, splits, source files (reference.md, section 3), found once a batch.

Reads whatever a host or MONAI put into a batch and never fails on an odd one, only on metadata of other rows. Tensors are duck-typed:
torch is not imported.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmfilm_plugin.errors import ConditionError
from vlmfilm_plugin.features.content_hash import attempt, row_vectors
from vlmfilm_plugin.features.reordered import is_reordered

NAME = "name"
_META = "meta"
_IMAGE_META = "image_meta_dict"
_TENSOR_META = "batch['image'].meta"
_META_FIELDS = ("filename_or_obj", "filepath", "path", "filename", "image_id")
_C_FIELDS = ("meta_dict", "metadata", _META, "image_path", "path", "image_id", "id", "filename")
_E_FIELDS = ("filepath", "path", "image_id", "id", "filename", "index", "idx", "case_id")
_SPLIT_FIELDS = ("split", "stage", "mode")
_PATH_FIELDS = frozenset({"filename_or_obj", "filepath", "path", "image_path", "filename"})
_ALL_FIELDS = tuple(dict.fromkeys((NAME, _IMAGE_META, *_C_FIELDS, *_E_FIELDS, *_SPLIT_FIELDS, "image")))
_SUFFIX = re.compile(r"::|[|#?]")
# Which crop of which image a row is. The last two are vectors, one a row.
_CROP_FIELDS = ("patch_index", "crop_center", "spatial_shape")


@dataclass(frozen=True)
class _Source:
    """A place that may name the rows: how it is written in a log line, its last field, and what the batch holds there."""

    label: str
    field: str
    held: object


@dataclass(frozen=True)
class RowNames:
    """What a batch says about its rows.

    Attributes:
        splits: one a row.
        names: one a row, cut (see `cut_name`), from the first source that names every row; None where there is none.
        source: the expression that gave them, such as `batch['name']`; empty where there is none.
        is_path: whether that source holds paths.
        paths: the untouched file of each row, or None: the whole image, whatever crop of it the row holds.
    """

    splits: tuple[str, ...]
    names: tuple[str, ...] | None
    source: str
    is_path: bool
    paths: tuple[Path | None, ...]

    @classmethod
    def find(
        cls,
        batch: object,
        rows: int,
        *,
        dataset_root: str | os.PathLike[str] | None = None,
        files: Mapping[str, Path | None] | None = None,
        loaded: Callable[[], Sequence[Path | None]] | None = None,
    ) -> RowNames:
        """Find names, splits and files of a batch.

        Files: `batch["image"].meta`, `batch["image_meta_dict"]`, the other path fields, `dataset_root` / name, then `files`. A relative
        path is tried against the working directory, then against `dataset_root`.

        Args:
            batch: what the host's data loader gave; anything, None included.
            files: the untouched file behind a name, as the host's data sets know it.
            loaded: returns the file of each row as the row ledger knows it; asked last, and where the image's own metadata names several
                rows: an indexed MetaTensor keeps its metadata in the old order.

        Raises:
            ConditionError: that metadata names other files than the ledger, which does not know every row.
        """
        fields = _fields(batch)
        sources = _sources(fields)
        read: dict[int, list[str] | None] = {}
        names, named_by = None, None
        for position, source in enumerate(sources):
            texts = read[position] = names_in(source.held, rows, is_shared=source.field == NAME)
            if texts is not None and (names := _cut(texts, is_name=source.field == NAME)) is not None:
                named_by = source
                break
        paths = _find_paths(sources, read, rows, dataset_root)
        if files and None in paths and (own := names_in(fields.get(NAME), rows)) is not None:
            paths = [path or files.get(name) for path, name in zip(paths, own, strict=True)]
        names_rows = rows > 1 and _names_rows(sources, rows)
        is_doubtful = loaded is not None and names_rows
        if names_rows and is_reordered(fields["image"]) and (loaded is None or not all(loaded())):
            _refuse_reordered(fields["image"])
        if loaded is not None and (is_doubtful or not all(paths)):
            known = loaded()
            if is_doubtful and all(known):
                paths = list(known)
                if names is not None and named_by is not None and named_by.label.startswith(_TENSOR_META):
                    names = _in_order_of(known, names)
            elif is_doubtful:
                _refuse_contradicted(paths, known)
            paths = [path or other for path, other in zip(paths, known, strict=True)]
        return cls(
            splits=tuple(_splits(fields, rows)),
            names=None if names is None else tuple(names),
            source="" if named_by is None else named_by.label,
            is_path=named_by is not None and named_by.field in _PATH_FIELDS,
            paths=tuple(paths),
        )


def split_of(batch: object, rows: int) -> list[str]:
    """Return the split of each row: `batch["split"]`, else `stage`, else `mode`, else `unknown`; a text is shared by all rows."""
    return _splits(_fields(batch), rows)


def source_paths(batch: object, rows: int, *, dataset_root: str | os.PathLike[str] | None = None) -> list[Path | None]:
    """Return the file on disk behind each row, or None where none is found (see `RowNames.find`)."""
    return _find_paths(_sources(_fields(batch)), {}, rows, dataset_root)


def _fields(batch: object) -> dict[str, Any]:
    """Return what the batch holds under the fields that can say something; a field that cannot be read says nothing."""
    held: dict[str, Any] = {}
    if type(batch) is dict:
        for field in _ALL_FIELDS:
            if field in batch:
                held[field] = batch[field]
    elif isinstance(batch, Mapping):
        for field in _ALL_FIELDS:
            value = get_field(batch, field)
            if value is not None:
                held[field] = value
    return held


def _splits(fields: Mapping[str, Any], rows: int) -> list[str]:
    for field in _SPLIT_FIELDS:
        held = fields.get(field)
        if held is None:
            continue
        splits = names_in(getattr(held, "value", held) if isinstance(held, str) else held, rows, is_shared=True)
        if splits is not None:
            return splits
    return ["unknown"] * rows


def _sources(fields: Mapping[str, Any]) -> list[_Source]:
    """Return the sources A to E that are there, in order."""
    found: list[_Source] = []
    if NAME in fields:
        found.append(_Source(f"batch[{NAME!r}]", NAME, fields[NAME]))
    if _IMAGE_META in fields:
        _add_meta(found, f"batch[{_IMAGE_META!r}]", fields[_IMAGE_META])
    for field in _C_FIELDS:
        if field in fields:
            held = fields[field]
            found.append(_Source(f"batch[{field!r}]", field, held))
            # Only a mapping, or a list of them, holds metadata; names and tensors are the common case.
            if not isinstance(held, str) and not hasattr(held, "shape"):
                _add_meta(found, f"batch[{field!r}]", held)
    if "image" in fields:
        meta = getattr(fields["image"], _META, None)
        if meta is not None:
            _add_meta(found, _TENSOR_META, meta)
    for field in _E_FIELDS:
        if field in fields:
            found.append(_Source(f"batch[{field!r}]", field, fields[field]))
    return found


def _add_meta(found: list[_Source], label: str, meta: object) -> None:
    """Add the fields of a metadata mapping, or of a list with one mapping a row, then the same under its `meta`."""
    for prefix, holder in ((label, meta), (f"{label}['meta']", _column(meta, _META))):
        if holder is None or isinstance(holder, str):
            continue
        for field in _META_FIELDS:
            held = _column(holder, field)
            if held is not None:
                found.append(_Source(f"{prefix}[{field!r}]", field, held))


def _names_rows(sources: list[_Source], rows: int) -> bool:
    """Tell whether the image's own metadata names each of several rows."""
    return any(source.label.startswith(_TENSOR_META) and names_in(source.held, rows) is not None for source in sources)


def _refuse_contradicted(paths: Sequence[Path | None], known: Sequence[Path | None]) -> None:
    """Check that the metadata's files are those of the rows that are known: a permuted MetaTensor keeps its metadata in the old order.

    Raises:
        ConditionError: they are not, so that they cannot be believed for the rows that are unknown.
    """
    for row, (path, other) in enumerate(zip(paths, known, strict=True)):
        if path is not None and other is not None and os.path.realpath(path) != os.path.realpath(other):
            raise ConditionError(
                "cannot tell which file each row of this batch is: the image's metadata does not belong to its rows",
                {"found": f"row {row} is {path} by the batch's metadata", "expected": f"{other}, from which the data loader made it"},
                "name the files in the batch (`filepath`) in the order of the rows, or permute before the image is put into the batch",
            )


def _refuse_reordered(image: object) -> None:
    raise ConditionError(
        "cannot tell which file each row of this batch is: its rows were put into another order than the image's metadata",
        {"found": f"a {type(image).__name__} that was indexed, flipped or rolled, with the metadata of before", "expected": "metadata of its rows"},
        "name the files in the batch (`filepath`) in the order of the rows, and hand the image over without metadata (`as_tensor()`)",
    )


def _in_order_of(paths: Sequence[Path | None], names: list[str]) -> list[str]:
    """Return names that are paths in the order of the rows' files, spelt as they are; the file itself where it has none."""
    spelt = {os.path.abspath(name): name for name in names}
    return [spelt.get(os.path.abspath(str(path)), str(path)) for path in paths]


def _find_paths(
    sources: list[_Source], read: Mapping[int, list[str] | None], rows: int, dataset_root: str | os.PathLike[str] | None
) -> list[Path | None]:
    """Return the file of each row from the first source that has one; the image's own metadata first, the name last."""
    tensor = f"{_TENSOR_META}['filename_or_obj']"
    order = [place for place, source in enumerate(sources) if source.label == tensor]
    order += [place for place, source in enumerate(sources) if source.field in _PATH_FIELDS]
    if dataset_root is not None:  # a name is no path of its own
        order += [place for place, source in enumerate(sources) if source.field == NAME]
    found: list[Path | None] = [None] * rows
    for place in order:
        source = sources[place]
        # The meta of a MetaTensor may be that of one image: a plain text in it then names the only row.
        is_shared = source.field == NAME or (rows == 1 and source.label.startswith(_TENSOR_META))
        values = read[place] if place in read and read[place] is not None else names_in(source.held, rows, is_shared=is_shared)
        if values is None:
            continue
        for row, value in enumerate(values):
            if found[row] is None:
                found[row] = _existing(value, source.field, dataset_root)
        if None not in found:
            break
    return found


def _existing(value: str, field: str, root: str | os.PathLike[str] | None) -> Path | None:
    cut = cut_name(value, is_name=field == NAME)
    for text in (value, cut) if cut and cut != value else (value,):
        if field != NAME and _is_file(text):
            return Path(text)
        if root is not None and _is_file(joined := os.path.join(root, text)):
            return Path(joined)
    return None


def _is_file(path: str) -> bool:
    try:
        return os.path.isfile(path)
    except (OSError, ValueError):  # too long for the file system, or a NUL byte: no file has this name
        return False


def _column(holder: object, field: str) -> object:
    if isinstance(holder, list | tuple):
        if not holder or not all(isinstance(item, Mapping) for item in holder):
            return None
        return [get_field(item, field) for item in holder]
    return get_field(holder, field)


def get_field(holder: object, field: str) -> Any:
    """Return what a mapping holds under a field, or None where it holds nothing, or is none."""
    if not isinstance(holder, Mapping):
        return None
    try:
        return holder[field]
    except Exception:  # a lazy mapping may fail in any way; a field that cannot be read names nothing
        return None


def names_in(held: object, rows: int, *, is_shared: bool = False) -> list[str] | None:
    """Return one non-empty text a row, or None where `held` does not give exactly that."""
    if isinstance(held, str | os.PathLike):
        text = _text(held) if is_shared else ""
        return [text] * rows if text else None
    if not isinstance(held, list | tuple) and getattr(held, "ndim", None) != 1:
        return None
    values: Any = held if isinstance(held, list | tuple) else attempt(held.tolist)  # type: ignore[attr-defined]
    if not isinstance(values, list | tuple) or len(values) != rows:
        return None
    texts = []
    for value in values:
        # Texts are read in place: this runs for every row of every batch.
        text = value.strip() if type(value) is str else _text(value)
        if not text:
            return None
        texts.append(text)
    return texts or None


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


def _cut(names: list[str], *, is_name: bool) -> list[str] | None:
    """Return names cut as in `cut_name`, or None where nothing is left of one."""
    cut = [_SUFFIX.split(name.partition("@")[0] if is_name else name, maxsplit=1)[0].strip() for name in names]
    return None if "" in cut else cut


def cut_name(name: str, *, is_name: bool) -> str:
    """Return a name up to the first of `::`, `|`, `#`, `?`, and, of `batch["name"]`, up to the first `@`."""
    return _SUFFIX.split(name.partition("@")[0] if is_name else name, maxsplit=1)[0].strip()


def crops_of(batch: object, rows: int) -> list[bytes]:
    """Return what the metadata says about the crop of each row, as bytes; empty where it says nothing."""
    parts = [b""] * rows
    meta = get_field(batch, _IMAGE_META)
    holders = (
        batch,
        meta,
        get_field(meta, _META),
        *(get_field(batch, field) for field in ("meta_dict", "metadata", _META)),
        getattr(get_field(batch, "image"), _META, None),
    )
    for field in _CROP_FIELDS:
        for holder in holders:
            values = row_vectors(_column(holder, field), rows, is_scalar_fine=field == "patch_index")
            if values is not None:
                parts = [part + f"{field}={value!r};".encode() for part, value in zip(parts, values, strict=True)]
                break
    return parts
