"""Features of images: memory, then the store, then the encoder; each image is encoded once.

Owns the encoder, which therefore lives outside every module, state dict, optimizer and copy. Knows nothing of hosts or UNets.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from vlmfilm_plugin.encoders.base import Encoder
from vlmfilm_plugin.encoders.registry import build_encoder
from vlmfilm_plugin.errors import MissingFeatureError
from vlmfilm_plugin.features.batch_names import RowNames
from vlmfilm_plugin.features.cache_key import content_keys, path_key, sample_keys
from vlmfilm_plugin.features.encoding import Encoding, rounded, stack
from vlmfilm_plugin.features.images import from_array, from_tensor, read_image
from vlmfilm_plugin.features.recurrence import Recurrence
from vlmfilm_plugin.features.samples import CacheStats, ImageId, Sample
from vlmfilm_plugin.features.store.protocol import SourceStamp, Store, StoredFeature
from vlmfilm_plugin.features.store.registry import open_store
from vlmfilm_plugin.features.stored import StoredFeatures, current
from vlmfilm_plugin.features.value_range import LOOKED_AT, refuse_narrow_range, siblings
from vlmfilm_plugin.log import film_logger
from vlmfilm_plugin.rows.data_set_items import VOLUMES
from vlmfilm_plugin.settings.record import Settings

if TYPE_CHECKING:
    from PIL.Image import Image

_logger = logging.getLogger("vlmfilm.features")


class FeatureProvider:
    """Give the features of images, encoding only what neither memory nor the store holds.

    A deepcopy is the same object: a copied model shares its provider and never copies an encoder.

    Raises:
        MissingFeatureError: a feature is missing and `on_missing_feature` is `error`.
        ImageReadError, EncoderError, StoreError: as their names say.
    """

    def __init__(
        self, encoder: Encoder, store: Store, *, on_missing: str = "encode", dataset_root: str | None = None, memory_items: int = 16384
    ) -> None:
        self.encoder, self.store = encoder, store
        self.on_missing, self.dataset_root = on_missing, dataset_root
        self.stats = CacheStats()
        self._memory_items = memory_items
        self._announced: set[str] = set()
        self._epoch: int | None = None
        self._missed_before_epoch = 0
        self._settings: Settings | None = None
        self._is_range_known = False
        self._memory: OrderedDict[ImageId, StoredFeature] = OrderedDict()
        self._lock = threading.RLock()
        self._stored, self._encoding = StoredFeatures(encoder, store), Encoding(encoder)
        self._recurrence = Recurrence()

    @classmethod
    def from_settings(cls, settings: Settings) -> FeatureProvider:
        """Build encoder and store from settings; no weights are read."""
        provider = cls(
            build_encoder(settings),
            open_store(settings),
            on_missing=settings.on_missing_feature,
            dataset_root=settings.dataset_root,
            memory_items=settings.mem_cache_size,
        )
        provider._settings = settings
        return provider

    def __deepcopy__(self, memo: dict[int, Any]) -> FeatureProvider:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if self._settings is None:
            raise TypeError("a FeatureProvider that was not built from settings cannot be pickled")
        return FeatureProvider.from_settings, (self._settings,)

    def samples_of(
        self,
        batch: Any,
        image: Tensor,
        value_range: tuple[float, float],
        files: Mapping[str, Path | None] | None = None,
        loaded: Callable[[], Sequence[Path | None]] | None = None,
        *,
        is_whole: bool = False,
    ) -> list[Sample]:
        """Return the samples of a batch.

        A row whose untouched file can be found is keyed by its name and read from that file. Any other is keyed by the content of its
        tensor: a random crop is never stored under its file's name.

        Args:
            batch: the mapping that the host's step received.
            image: (B, C, H, W) in value_range.
            files: the untouched file behind a name, as the host's data sets know it.
            loaded: returns the file of each row as the row ledger knows it.
            is_whole: the tensor shows each row's whole image or volume: it stands for a file of a volume, of which it is the view to encode.
        """
        found = RowNames.find(batch, image.shape[0], dataset_root=self.dataset_root, files=files, loaded=loaded)
        if is_whole:
            found = replace(found, paths=tuple([None if path is None or path.name.lower().endswith(VOLUMES) else path for path in found.paths]))
        named = sample_keys(found, image, self.dataset_root)
        self._announce(named.keys[0], named.source)
        loads: list[Callable[[], Image]] = [
            (lambda row=row: from_tensor(image[row], value_range)) if path is None else (lambda path=path: read_image(path))  # type: ignore[misc]
            for row, path in enumerate(found.paths)
        ]
        return [Sample(key, path, load) for key, path, load in zip(named.keys, found.paths, loads, strict=True)]

    def check_range(self, paths: Iterable[Path | None], files: Mapping[str, Path | None] | None = None) -> None:
        """Check once, before training, that the images of the data set use the range of their files.

        Args:
            paths: the files of the batch at hand.
            files: the files that the host's data sets know; where there are none, those beside the batch's.

        Raises:
            NarrowRangeError: they do not, and `accept_narrow_range` is false.
        """
        if self._is_range_known:
            return
        if self._settings is None or not self._settings.accept_narrow_range:
            own = [path for path in paths if path is not None]
            known = {path for path in (files or {}).values() if path is not None} | set(own)
            if not known:
                return  # images without files: their range is stated by the host adapter
            refuse_narrow_range(known if len(known) >= LOOKED_AT else known | set(siblings(own)))
        self._is_range_known = True

    def _announce(self, key: str, source: str) -> None:
        if source not in self._announced:
            self._announced.add(source)
            film_logger().info("[VLM] cache_key_example: %s", key)
            film_logger().info("[VLM] cache_key_source: %s", source)

    def get(self, samples: Sequence[Sample], *, is_train: bool = False, step: int | None = None) -> Tensor:
        """Return the features (N, F) of samples, row i of sample i: float32, CPU.

        Args:
            is_train: the feature of an image without a file, which may be a random crop, is stored only once another step asks for it.
            step: the training step; None where nobody counts them.
        """
        with self._lock:
            images = [sample.image for sample in samples]
            wanted = dict(zip(images, samples, strict=True))
            found = self._from_memory(wanted)
            in_memory, missed = set(found), set()
            if len(found) < len(wanted):
                found |= self._from_store({image: sample for image, sample in wanted.items() if image not in found})
            if len(found) < len(wanted):
                missing = [sample for image, sample in wanted.items() if image not in found]
                missed = {sample.image for sample in missing}
                found |= self._encode(missing, is_train, step)
            if self._recurrence.steps:
                self._store_what_comes_back(found, wanted, in_memory, step)
            is_hit = [image in in_memory for image in images]
            is_miss = [image in missed for image in images]
            self.stats.total += len(samples)
            self.stats.miss += sum(is_miss)
            self.stats.mem_hit += sum(is_hit)
            self.stats.disk_hit += len(samples) - sum(is_miss) - sum(is_hit)
            return stack([found[image] for image in images])

    def find(self, samples: Sequence[Sample]) -> set[ImageId]:
        """Return those of the samples (`Sample.image`) whose features the store holds, made from the files of now; nothing is kept in memory.

        A feature that is stored under another key is stored under the sample's own, too.

        Raises:
            ImageReadError: the file of a stored feature cannot be read.
        """
        return set(self._stored.find({sample.image: sample for sample in samples}))

    def enter_epoch(self, epoch: int | None) -> None:
        """Note that a training batch of `epoch` begins: after an epoch without a miss, validation included, the encoder leaves memory.

        A later miss loads it again. Does nothing where the host has no epochs (None).
        """
        with self._lock:
            if epoch is None or epoch == self._epoch:
                return
            if self._epoch is not None and self.stats.miss == self._missed_before_epoch and self.encoder.is_loaded:
                self.encoder.release()
                name = self.encoder.identity.facts.get("encoder", "encoder")
                film_logger().info("[VLM] encoder released: %s; epoch %d needed no encoding", name, self._epoch)
            self._epoch, self._missed_before_epoch = epoch, self.stats.miss

    def of_images(self, images: Sequence[Any], *, is_train: bool = False) -> Tensor:
        """Return the features (N, F) of PIL images, paths or arrays: what is stored for a path's file, whatever it is called there, and
        for pixels.

        Args:
            is_train: as for `get`.
        """
        return self.get([self._sample_of(image) for image in images], is_train=is_train)

    def _sample_of(self, image: Any) -> Sample:
        if isinstance(image, str | os.PathLike):
            # Under the key that a warm-up of its folder gives it.
            path = Path(os.path.abspath(image))
            return Sample(path_key(path, "unknown", self.dataset_root), path, lambda: read_image(path))
        picture = from_array(image)
        return Sample(content_keys(np.asarray(picture)[None], ["image"])[0], None, lambda: picture)

    def fits(self, stored: StoredFeature) -> bool:
        """Tell whether a stored feature has the width of the encoder's."""
        return self._stored.fits(stored)

    def note_of(self, sample: Sample) -> str | None:
        """Return the note of a feature that is in memory (a generated text, answers), or None."""
        stored = self._memory.get(sample.image)
        return None if stored is None else stored.note

    def _from_memory(self, wanted: Mapping[ImageId, Sample]) -> dict[ImageId, StoredFeature]:
        found = {}
        for image in wanted:
            stored = self._memory.get(image)
            if stored is not None and (now := current((stored,), image)) is not None:
                found[image] = now
        self._remember(found)
        return found

    def _from_store(self, wanted: Mapping[ImageId, Sample]) -> dict[ImageId, StoredFeature]:
        found = self._stored.find(wanted)
        self._remember(found)
        return found

    def _encode(self, samples: Sequence[Sample], is_train: bool, step: int | None) -> dict[ImageId, StoredFeature]:
        if self.on_missing == "error":
            raise MissingFeatureError(
                "cannot condition this batch: features are missing from the store",
                {"missing": ", ".join(sample.key for sample in samples[:5]) + (" ..." if len(samples) > 5 else ""), "store": self.store.path},
                "encode them first (vlmfilm warmup), or set `on_missing_feature` to encode",
            )
        # Stamp before reading: a file replaced in between is then noticed at the next look.
        stamps = [sample.stamp if sample.path is None else SourceStamp.of(sample.path) for sample in samples]
        rows = self._encoding.of(samples, stamps, [sample.load() for sample in samples])
        encoded = {sample.image: row for sample, row in zip(samples, rows, strict=True)}
        once = {sample.image for sample in samples if is_train and sample.path is None and not self._recurrence.comes_back(sample.image, step)}
        for image in once:
            self._recurrence.note(image, step)
        self._write({image: row for image, row in encoded.items() if image not in once})
        encoded = {image: rounded(row, self.store.embedding_dtype) for image, row in encoded.items()}
        self._remember(encoded)
        return encoded

    def _store_what_comes_back(
        self, found: Mapping[ImageId, StoredFeature], wanted: Mapping[ImageId, Sample], in_memory: set[ImageId], step: int | None
    ) -> None:
        back = [image for image, sample in wanted.items() if sample.path is None and image in in_memory and self._recurrence.comes_back(image, step)]
        self._write({image: found[image] for image in back})

    def encode(self, samples: Sequence[Sample], stamps: Sequence[SourceStamp | None], pictures: Sequence[Image]) -> list[StoredFeature]:
        """Encode pictures that were read already and store their features in one transaction; nothing is looked up.

        Args:
            stamps: of each sample's file, taken before it was read; None where it has no file.

        Returns:
            One row a sample, its feature (F,) as the store reads it back.
        """
        rows = self._encoding.of(samples, stamps, pictures)
        self.store.write(self.encoder.identity, rows)
        return [rounded(row, self.store.embedding_dtype) for row in rows]

    def _write(self, rows: Mapping[ImageId, StoredFeature]) -> None:
        if rows:
            self.store.write(self.encoder.identity, rows.values())
        for image in rows:
            self._recurrence.forget(image)

    def _remember(self, rows: Mapping[ImageId, StoredFeature]) -> None:
        for image, row in rows.items():
            self._memory[image] = row
            self._memory.move_to_end(image)
        while len(self._memory) > self._memory_items:
            self._memory.popitem(last=False)
