"""Mode `shuffle` for an image alone in its batch: draw another image, whose feature it gets instead of its own."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from vlmfilm_plugin.features.cache_key import name_key, split_in
from vlmfilm_plugin.features.images import read_image
from vlmfilm_plugin.features.provider import FeatureProvider, Sample, stack
from vlmfilm_plugin.features.store.protocol import SourceStamp

# Key and feature (F,) of another image.
Donor = tuple[str, Tensor]


class ShuffleDonors:
    """Draw donors for the images of one feature provider.

    From the files of the host's data sets, those of the same folder first: then a draw depends on seed and data set alone. Where the
    host's data sets are not known, from what the store holds at the first draw. Another image has other bytes, whatever its key.
    """

    def __init__(self, provider: FeatureProvider) -> None:
        self._provider = provider
        self._pool: list[str] | None = None

    def draw(self, sample: Sample, seed: int, files: Mapping[str, Path | None]) -> Donor | None:
        """Return a donor for `sample`; None where no other image is known.

        Args:
            files: the untouched file behind each name, as the host's data sets know it.
        """
        own = str(sample.path) if sample.path is not None else sample.key
        order = random.Random(f"{seed}:{own}")
        digest = SourceStamp.of(sample.path).digest if sample.path is not None else None
        named = sorted((name, path) for name, path in files.items() if path is not None and path != sample.path)
        if sample.path is not None and named:
            alike = [item for item in named if item[1].parent == sample.path.parent] or named
            order.shuffle(alike)
            return self._first_file(alike, digest)
        return self._first_stored(sample, digest, order)

    def _first_file(self, files: list[tuple[str, Path]], digest: str | None) -> Donor | None:
        for name, path in files:
            if SourceStamp.of(path).digest != digest:
                key = name_key(name, "unknown", self._provider.dataset_root)
                other = Sample(key, path, lambda path=path: read_image(path))  # type: ignore[misc]
                return key, self._provider.get([other])[0]
        return None

    def _first_stored(self, sample: Sample, digest: str | None, order: random.Random) -> Donor | None:
        store, identity = self._provider.store, self._provider.encoder.identity
        if self._pool is None:
            self._pool = store.keys(identity)
        split = split_in(sample.key)
        others = [key for key in self._pool if key != sample.key]
        # Images of the same split first: their features come from the same distribution.
        candidates = [key for key in others if split_in(key) == split] or others
        order.shuffle(candidates)
        for key in candidates:
            for stored in store.rows(identity, [key]):
                if digest is None or stored.stamp is None or stored.stamp.digest != digest:
                    return key, stack([stored])[0]
        # Nothing to draw from yet is no pool to keep.
        self._pool = None
        return None
