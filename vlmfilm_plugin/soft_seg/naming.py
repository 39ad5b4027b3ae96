"""How the conditioner names the rows of a batch: by what its caller says, else by what the batch says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from vlmfilm_plugin.errors import ConditionError
from vlmfilm_plugin.features.batch_names import source_paths
from vlmfilm_plugin.features.cache_key import CacheKeys, cache_keys, content_keys, content_named_key, split_in
from vlmfilm_plugin.features.images import from_tensor, read_image
from vlmfilm_plugin.features.samples import Sample
from vlmfilm_plugin.features.store.protocol import SourceStamp


def names_of_rows(image: Tensor, image_id: str | Sequence[str] | None, batch: Any, dataset_root: str | None) -> CacheKeys:
    """Return a name a row of image (B, C, H, W): `image_id`, else what the batch says, else the content.

    Raises:
        ConditionError: `image_id` is not a name, or one a row.
    """
    if image_id is None:
        return cache_keys(batch, image.shape[0], dataset_root=dataset_root, image=image)
    found = cache_keys({**(batch if isinstance(batch, Mapping) else {}), "name": image_id}, image.shape[0], dataset_root=dataset_root, image=image)
    if not found.source.endswith("['name']"):
        facts = {"found": image_id, "expected": f"a name, or one for each of {image.shape[0]} rows"}
        raise ConditionError("cannot use image_id", facts, "give one name a row")
    return CacheKeys(found.keys, "image_id")


def named_samples(names: CacheKeys, image: Tensor, batch: Any, value_range: tuple[float, float], dataset_root: str | None) -> list[Sample]:
    """Return the samples of rows that the caller has named: stored under those names, and encoded anew where their content is another.

    One name for several images, such as the crops of one, gets their content appended.
    """
    paths = source_paths(batch, image.shape[0], dataset_root=dataset_root)
    contents = content_keys(image, [split_in(key) for key in names.keys])
    images_of: dict[str, set[object]] = {}
    for key, path, content in zip(names.keys, paths, contents, strict=True):
        images_of.setdefault(key, set()).add(path or content)
    samples = []
    for row, (key, path, content) in enumerate(zip(names.keys, paths, contents, strict=True)):
        digest = content.rpartition(":")[2]
        if len(images_of[key]) > 1:
            key = content_named_key(key, content)
        if path is not None:
            samples.append(Sample(key, path, lambda path=path: read_image(path)))  # type: ignore[misc]
        else:
            stamp = SourceStamp(image[row].numel() * image.element_size(), 0, digest)
            samples.append(Sample(key, None, lambda row=row: from_tensor(image[row], value_range), stamp))  # type: ignore[misc]
    return samples


def source_of_keys(names: CacheKeys, samples: Sequence[Sample]) -> str:
    """Return what gave the stored keys: the source of the names, `file` or `content`."""
    if names.source == "image_id" or {sample.key for sample in samples} <= set(names.keys):
        return names.source
    return "content" if samples[0].path is None else "file"
