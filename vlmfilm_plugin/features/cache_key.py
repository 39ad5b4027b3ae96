"""Name the image of each row of a batch: cache keys, splits and source files (reference.md, section 3).

Reads whatever a host or MONAI put into a batch and never fails on an odd one. Tensors are duck-typed: torch is not imported.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from vlmfilm_plugin.features.batch_names import (
    NAME,
    crops_of,
    cut_name,
    get_field,
    key_sources,
    names_in,
    split_of,
)
from vlmfilm_plugin.features.content_hash import content_hashes, row_count

FINGERPRINT = "fingerprint"


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
        image: what content hashes are taken of; default `batch["image"]`.

    Shape:
        image: (rows, C, H, W), any dtype, any device.

    Raises:
        ConditionError: nothing names the rows, and there is no image with `rows` rows.
    """
    splits = split_of(batch, rows)
    for label, field, held in key_sources(batch):
        names = names_in(held, rows, is_shared=field == NAME)
        if names is None:
            continue
        cut = [cut_name(name, is_name=field == NAME) for name in names]
        if all(cut):
            return CacheKeys(tuple(f"{split}:{_relative(name, dataset_root)}" for split, name in zip(splits, cut, strict=True)), label)
    content = image if image is not None else get_field(batch, "image")
    return CacheKeys(content_hashes(content, splits, crops_of(batch, rows)), FINGERPRINT)


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


def path_key(path: Path, split: str, dataset_root: str | os.PathLike[str] | None = None) -> str:
    """Return the cache key of an image that has a file but no name of its own."""
    return f"{split}:{_relative(path.as_posix(), dataset_root)}"


def _relative(name: str, root: str | os.PathLike[str] | None) -> str:
    if root is None or not os.fspath(root):
        return name
    # By path components, so that /data/a does not count as a prefix of /data/ab/1.png.
    path, base = PurePath(name), PurePath(root)
    return path.relative_to(base).as_posix() if path != base and path.is_relative_to(base) else name
