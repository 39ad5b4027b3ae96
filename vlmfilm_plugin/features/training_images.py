"""Which images the statistics of `feature_transform` are made of: those of the training split, as the host's data sets list them, else as a
warm-up has stored them.

At most 256, spread evenly over the split in the order of its names, whether they are stored or not: a run is the same with a full store.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from vlmfilm_plugin.features.cache_key import split_in
from vlmfilm_plugin.features.encoding import stack
from vlmfilm_plugin.features.images import read_image
from vlmfilm_plugin.features.provider import FeatureProvider
from vlmfilm_plugin.features.samples import Sample
from vlmfilm_plugin.features.shuffle_donor import DataSets, key_like, split_prefix

MOST = 256
LEAST_STORED = 64
"""Stored features of a split that are enough to stand for it, where the split itself cannot be listed."""
_AT_ONCE = 32  # images in memory

T = TypeVar("T")


@dataclass(frozen=True)
class Listed:
    """Images of a training split: cache key and file of each, how many the split has, and a name of this set of images."""

    images: Sequence[tuple[str, str]]
    total: int
    digest: str

    def __str__(self) -> str:
        """Return it in words."""
        return f"evenly from the {self.total} of the training split, such as {self.images[0][0]}"


class TrainingImages:
    """The training split that a batch belongs to.

    Args:
        provider: of the features.
        data_sets: those of the host.
    """

    def __init__(self, provider: FeatureProvider, data_sets: DataSets) -> None:
        self._provider, self._data_sets = provider, data_sets

    def listed(self, samples: Sequence[Sample]) -> Listed | None:
        """Return images of the host's data sets that hold the samples of a training batch; None where none does."""
        # By file, its name and the sample whose data set it is of.
        found: dict[str, tuple[str, Sample, str]] = {}
        for sample in samples:
            known = None if sample.path is None or os.path.abspath(sample.path) in found else self._data_sets.of(sample.path)
            if known is None or sample.path is None:
                continue
            own_name = known.files[known.member_of[os.path.abspath(sample.path)]][0]
            found |= {str(path): (name, sample, own_name) for name, path in known.files.values()}
        if not found:
            return None
        chosen = evenly(sorted((name, path) for path, (name, _, _) in found.items()), MOST)
        sizes = (f"{name}\0{os.path.getsize(path) if os.path.isfile(path) else None}" for name, path in chosen)
        digest = hashlib.blake2b("\n".join([str(len(found)), *sizes]).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
        root = self._provider.dataset_root
        images = [(key_like(found[path][1], found[path][2], name, Path(path), root), path) for name, path in chosen]
        return Listed(images, len(found), digest)

    def features_of(self, images: Sequence[tuple[str, str]]) -> list[Tensor]:
        """Return the features (F,) of listed images, in their order: stored ones, else encoded and stored."""
        samples = [Sample(key, Path(path), lambda path=path: read_image(path)) for key, path in images]  # type: ignore[misc]
        return [row for start in range(0, len(samples), _AT_ONCE) for row in self._provider.get(samples[start : start + _AT_ONCE])]

    def stored(self, samples: Sequence[Sample]) -> tuple[Tensor, str] | None:
        """Return stored features (N, F) of the split that the batch's keys name, and in words which they are.

        None where the keys name no split, or fewer than `LEAST_STORED` are stored: too few to stand for it.
        """
        prefix = split_prefix(samples[0].key)
        if prefix == "unknown:" or any(split_prefix(sample.key) != prefix for sample in samples):
            return None
        store, identity = self._provider.store, self._provider.encoder.identity
        keys = [key for key in store.keys(identity) if key.startswith(prefix)]
        if len(keys) < LEAST_STORED:
            return None
        newest = {row.key: row for row in store.rows(identity, evenly(keys, MOST)) if self._provider.fits(row)}
        return stack(list(newest.values())), f"evenly from the {len(keys)} that are stored as {prefix}... (split {split_in(prefix)})"


def evenly(items: Sequence[T], most: int) -> list[T]:
    """Return at most so many items, spread evenly."""
    count = min(len(items), most)
    return [items[number * len(items) // count] for number in range(count)]
