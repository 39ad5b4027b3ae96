"""Cache keys: the only place that writes one (reference.md, section 3).

A key is `split:name`. It finds a feature quickly and tells people what it is of; which file's feature a row may get is decided by the
file's content (`features.store.protocol`). Tensors are duck-typed: torch is not imported.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from vlmfilm_plugin.features.batch_names import RowNames, crops_of, cut_name, get_field
from vlmfilm_plugin.features.content_hash import content_hashes, row_count

FILE = "file"
CONTENT = "content"


@dataclass(frozen=True)
class CacheKeys:
    """The cache keys of a batch, `keys[i]` of row i, and where they came from.

    `source` is the expression that gave them, such as `batch['name']`, or `file`, or `content`.
    """

    keys: tuple[str, ...]
    source: str


def cache_keys(batch: object, rows: int, *, dataset_root: str | os.PathLike[str] | None = None, image: object = None) -> CacheKeys:
    """Return one key a row, from the first source that names every row, else from the image's content: what a batch calls its rows.

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
    found = RowNames.find(batch, rows, dataset_root=dataset_root)
    if found.names is not None:
        return CacheKeys(tuple(_named(found, dataset_root)), found.source)
    content = image if image is not None else get_field(batch, "image")
    return CacheKeys(_with_splits(found.splits, content_hashes(content, crops_of(batch, rows))), CONTENT)


def sample_keys(found: RowNames, image: Any, dataset_root: str | os.PathLike[str] | None = None) -> CacheKeys:
    """Return the key under which the feature of each row is stored.

    A row with a file has its name as the key, or its file where it has none, or shares its name with another file of the batch. A row
    without one is keyed by the content of its tensor: a random crop is never stored under its file's name.

    Args:
        image: (rows, C, H, W); read for rows without a file alone.
    """
    paths = found.paths
    if not any(paths):
        return CacheKeys(content_keys(image, found.splits), CONTENT)
    keys = [""] * len(paths) if found.names is None else _named(found, dataset_root)
    # One name for several files: the file names the image.
    is_ambiguous = len(set(keys)) < len(keys)
    for row, path in enumerate(paths):
        if path is None:
            keys[row] = content_keys(image[row : row + 1], found.splits[row])[0]
        elif found.names is None or (is_ambiguous and _has_another_file(found, row)):
            keys[row] = path_key(path, found.splits[row], dataset_root)
    return CacheKeys(tuple(keys), FILE if found.names is None else found.source)


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
    return _with_splits(splits, content_hashes(image, [b""] * len(splits)))


def path_key(path: Path, split: str, dataset_root: str | os.PathLike[str] | None = None) -> str:
    """Return the cache key of an image that has a file but no name of its own."""
    return f"{split}:{_relative_file(path.as_posix(), _absolute(dataset_root))}"


def name_key(name: str, split: str, dataset_root: str | os.PathLike[str] | None = None) -> str:
    """Return the cache key of an image that a batch would call `name` under `batch["name"]`."""
    return f"{split}:{_relative(cut_name(name, is_name=True), dataset_root)}"


def content_named_key(key: str, content: str) -> str:
    """Return the key of one of several images that share `key`, by its content key."""
    return f"{key}#{content.rpartition(':')[2]}"


def split_in(key: str) -> str:
    """Return the split that a key names."""
    return key.partition(":")[0]


def _named(found: RowNames, root: str | os.PathLike[str] | None) -> list[str]:
    names = found.names or ()
    if found.is_path:
        absolute = _absolute(root)
        # The text of a file that exists says where it is, however it is spelt; any other text is a name like any other.
        names = tuple(
            [_relative(name, root) if path is None else _relative_file(name, absolute) for name, path in zip(names, found.paths, strict=True)]
        )
    elif root:
        names = tuple([_relative(name, root) for name in names])
    return [f"{split}:{name}" for split, name in zip(found.splits, names, strict=True)]


def _has_another_file(found: RowNames, row: int) -> bool:
    mine = (found.splits[row], (found.names or ())[row])
    named = zip(found.splits, found.names or (), strict=True)
    return any(key == mine and path != found.paths[row] for key, path in zip(named, found.paths, strict=True))


def _with_splits(splits: Sequence[str], digests: Sequence[str]) -> tuple[str, ...]:
    return tuple([f"{split}:fp-{digest}" for split, digest in zip(splits, digests, strict=True)])


def _absolute(root: str | os.PathLike[str] | None) -> str | None:
    """Return a folder as an absolute path that ends in a separator, or None where there is none."""
    return os.path.join(os.path.abspath(root), "") if root is not None and os.fspath(root) else None


def _relative_file(text: str, root: str | None) -> str:
    """Return the path of an existing file, relative to the folder `root` (absolute, with a separator at its end) where it is below it."""
    if root is not None and (absolute := os.path.normpath(os.path.join(os.getcwd(), text))).startswith(root):
        text = absolute[len(root) :]
    else:
        text = os.path.normpath(text)
    return text if os.sep == "/" else text.replace(os.sep, "/")


def _relative(name: str, root: str | os.PathLike[str] | None) -> str:
    """Return a name, without the folder `root` where that is a prefix of it."""
    if root is None or not os.fspath(root):
        return name
    if os.fspath(root).rstrip("/").rpartition("/")[2] not in name:  # cannot be a prefix; pathlib is slow
        return name
    # By path components, so that /data/a does not count as a prefix of /data/ab/1.png.
    path, base = PurePath(name), PurePath(root)
    return path.relative_to(base).as_posix() if path != base and path.is_relative_to(base) else name
