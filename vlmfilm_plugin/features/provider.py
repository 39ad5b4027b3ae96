"""Features of images: memory, then the store, then the encoder; each image is encoded once.

Owns the encoder, which therefore lives outside every module, state dict, optimizer and copy. Knows nothing of hosts or UNets.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vlmfilm_plugin.encoders.base import Encoder, encode_annotated
from vlmfilm_plugin.encoders.registry import build_encoder
from vlmfilm_plugin.errors import FeatureError, MissingFeatureError
from vlmfilm_plugin.features.batch_names import names_of, source_paths, split_of
from vlmfilm_plugin.features.cache_key import FINGERPRINT, cache_keys, content_keys, path_key
from vlmfilm_plugin.features.images import from_array, from_tensor, read_image
from vlmfilm_plugin.features.store.store import FeatureStore, SourceStamp, StoredFeature, place_of
from vlmfilm_plugin.log import film_logger
from vlmfilm_plugin.settings.record import Settings

if TYPE_CHECKING:
    from PIL.Image import Image

_logger = logging.getLogger("vlmfilm.features")


@dataclass(frozen=True)
class Sample:
    """One image whose feature is wanted: its cache key, its untouched file where there is one, and how to get its pixels."""

    key: str
    path: Path | None
    load: Callable[[], Image]


@dataclass
class CacheStats:
    """Where features came from, counted in samples."""

    total: int = 0
    mem_hit: int = 0
    disk_hit: int = 0
    miss: int = 0

    @property
    def hit(self) -> int:
        """Return hits in memory and in the store together."""
        return self.mem_hit + self.disk_hit

    @property
    def hit_rate(self) -> float:
        """Return hits / total, 0 where nothing was asked for."""
        return self.hit / self.total if self.total else 0.0

    def __str__(self) -> str:
        return f"total={self.total} hit={self.hit} miss={self.miss} hit_rate={self.hit_rate:.4f} mem_hit={self.mem_hit} disk_hit={self.disk_hit}"


class FeatureProvider:
    """Give the features of images, encoding only what neither memory nor the store holds.

    A deepcopy is the same object: a copied model shares its provider and never copies an encoder.

    Raises:
        MissingFeatureError: a feature is missing and `on_missing_feature` is `error`.
        ImageReadError, EncoderError, StoreError: as their names say.
    """

    def __init__(
        self, encoder: Encoder, store: FeatureStore, *, on_missing: str = "encode", dataset_root: str | None = None, memory_items: int = 16384
    ) -> None:
        self.encoder, self.store = encoder, store
        self.on_missing, self.dataset_root = on_missing, dataset_root
        self.stats = CacheStats()
        self._memory_items = memory_items
        self._announced: set[str] = set()
        self._epoch: int | None = None
        self._missed_before_epoch = 0
        self._settings: Settings | None = None
        self._memory: OrderedDict[str, StoredFeature] = OrderedDict()
        self._lock = threading.RLock()

    @classmethod
    def from_settings(cls, settings: Settings) -> FeatureProvider:
        """Build encoder and store from settings; no weights are read."""
        store = FeatureStore(settings.cache_dir, settings.embedding_dtype)
        provider = cls(
            build_encoder(settings),
            store,
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

    def samples_of(self, batch: Any, image: Tensor, value_range: tuple[float, float], files: Mapping[str, Path | None] | None = None) -> list[Sample]:
        """Return the samples of a batch.

        A row whose untouched file can be found is keyed by its name and read from that file. Any other is keyed by the content of its
        tensor: a random crop is never stored under its file's name.

        Args:
            batch: the mapping that the host's step received.
            image: (B, C, H, W) in value_range.
            files: the untouched file behind a name, as the host's data sets know it.
        """
        rows = image.shape[0]
        paths = source_paths(batch, rows, dataset_root=self.dataset_root)
        if files and not all(paths):
            names = names_of(batch, rows) or [""] * rows
            paths = [path or files.get(name) for path, name in zip(paths, names, strict=True)]
        keys, key_source = self._keys(batch, image, paths)
        self._announce(keys[0], key_source)
        loads: list[Callable[[], Image]] = [
            (lambda row=row: from_tensor(image[row], value_range)) if path is None else (lambda path=path: read_image(path))  # type: ignore[misc]
            for row, path in enumerate(paths)
        ]
        return [Sample(key, path, load) for key, path, load in zip(keys, paths, loads, strict=True)]

    def _keys(self, batch: Any, image: Tensor, paths: Sequence[Path | None]) -> tuple[list[str], str]:
        """Return one key a row, and where the first came from."""
        splits = split_of(batch, len(paths))
        if not any(paths):
            return list(content_keys(image, splits)), "content"
        named = cache_keys(batch, len(paths), dataset_root=self.dataset_root, image=image)
        keys = list(named.keys)
        files_of: dict[str, set[Path | None]] = {}
        for key, path in zip(keys, paths, strict=True):
            files_of.setdefault(key, set()).add(path)
        for row, path in enumerate(paths):
            if path is None:
                keys[row] = content_keys(image[row : row + 1], splits[row])[0]
            elif named.source == FINGERPRINT or len(files_of[keys[row]]) > 1:
                # No name of its own, or one name for several files: the file names the image.
                keys[row] = path_key(path, splits[row], self.dataset_root)
        return keys, "file" if named.source == FINGERPRINT else named.source

    def _announce(self, key: str, source: str) -> None:
        if source not in self._announced:
            self._announced.add(source)
            film_logger().info("[VLM] cache_key_example: %s", key)
            film_logger().info("[VLM] cache_key_source: %s", source)

    def get(self, samples: Sequence[Sample]) -> Tensor:
        """Return the features (N, F) of samples, row i of sample i: float32, CPU."""
        with self._lock:
            wanted = {sample.key: sample for sample in samples}
            found = self._from_memory(wanted)
            in_memory = set(found)
            rest = {key: sample for key, sample in wanted.items() if key not in found}
            found.update(self._from_store(rest))
            missing = [sample for key, sample in rest.items() if key not in found]
            missed = {sample.key for sample in missing}
            if missing:
                found.update(self._encode(missing))
            self.stats.total += len(samples)
            self.stats.miss += sum(sample.key in missed for sample in samples)
            self.stats.mem_hit += sum(sample.key in in_memory for sample in samples)
            self.stats.disk_hit += sum(sample.key not in in_memory and sample.key not in missed for sample in samples)
            return stack([found[sample.key] for sample in samples])

    def find(self, samples: Sequence[Sample]) -> set[str]:
        """Return the keys of the samples whose features the store holds, made from the files of now; nothing is kept in memory.

        Raises:
            ImageReadError: the file of a stored feature cannot be read.
        """
        wanted = {sample.key: sample for sample in samples}
        stored = self.store.read(self.encoder.identity, list(wanted))
        width = (self.encoder.feature_dim,)
        return {key for key, row in stored.items() if row.feature.shape == width and _current(row, wanted[key]) is not None}

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

    def of_images(self, images: Sequence[Any]) -> Tensor:
        """Return the features (N, F) of PIL images, paths or arrays, keyed by their pixels."""
        pictures = [from_array(image) for image in images]
        arrays = [np.asarray(picture) for picture in pictures]
        keys = [content_keys(array[None], ["image"])[0] for array in arrays]
        return self.get([Sample(key, None, lambda picture=picture: picture) for key, picture in zip(keys, pictures, strict=True)])  # type: ignore[misc]

    def note_of(self, key: str) -> str | None:
        """Return the note of a feature that is in memory (a generated text, answers), or None."""
        stored = self._memory.get(key)
        return None if stored is None else stored.note

    def _from_memory(self, wanted: Mapping[str, Sample]) -> dict[str, StoredFeature]:
        found = {}
        for key, sample in wanted.items():
            stored = self._memory.get(key)
            if stored is not None and (current := _current(stored, sample)) is not None:
                found[key] = current
        self._remember(found.values())
        return found

    def _from_store(self, wanted: Mapping[str, Sample]) -> dict[str, StoredFeature]:
        if not wanted:
            return {}
        found = {}
        for key, stored in self.store.read(self.encoder.identity, list(wanted)).items():
            current = _current(stored, wanted[key])
            if current is None:
                _logger.warning("the file behind %s is not the one its feature was made from; it is encoded again: %s", key, wanted[key].path)
            elif stored.feature.shape != (self.encoder.feature_dim,):
                width = self.encoder.feature_dim
                _logger.warning("the stored feature of %s has shape %s, expected (%d,); it is encoded again", key, stored.feature.shape, width)
            else:
                found[key] = current
        self._remember(found.values())
        return found

    def _encode(self, samples: Sequence[Sample]) -> dict[str, StoredFeature]:
        if self.on_missing == "error":
            raise MissingFeatureError(
                "cannot condition this batch: features are missing from the store",
                {"missing": ", ".join(sample.key for sample in samples[:5]) + (" ..." if len(samples) > 5 else ""), "store": self.store.path},
                "encode them first (vlmfilm warmup), or set `on_missing_feature` to encode",
            )
        # Stamp before reading: a file replaced in between is then noticed at the next look.
        stamps = [None if sample.path is None else SourceStamp.of(sample.path) for sample in samples]
        rows = self.encode(samples, stamps, [sample.load() for sample in samples])
        self._remember(rows)
        return {row.key: row for row in rows}

    def encode(self, samples: Sequence[Sample], stamps: Sequence[SourceStamp | None], pictures: Sequence[Image]) -> list[StoredFeature]:
        """Encode pictures that were read already and store their features in one transaction; nothing is looked up.

        Args:
            stamps: of each sample's file, taken before it was read; None where it has no file.

        Returns:
            One row a sample, its feature (F,) as the store reads it back.
        """
        # The host may be in inference mode (validation) and has its own random stream: neither may reach the encoder.
        cuda = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=cuda):
            features, given = encode_annotated(self.encoder, pictures)
        check_features(features, self.encoder.feature_dim, [sample.key for sample in samples])
        arrays = features.detach().to("cpu", torch.float32).numpy()
        notes: Sequence[str | None] = given if given is not None else [None] * len(samples)
        rows = [StoredFeature(sample.key, array, stamp, note) for sample, array, stamp, note in zip(samples, arrays, stamps, notes, strict=True)]
        self.store.write(self.encoder.identity, rows)
        # What the store rounds (float16) is rounded from the first use on, so that a run is the same with a full and an empty store.
        dtype = np.dtype(self.store.embedding_dtype)
        return [row._replace(feature=row.feature.astype(dtype)) for row in rows]

    def _remember(self, rows: Iterable[StoredFeature]) -> None:
        for row in rows:
            self._memory[row.key] = row
            self._memory.move_to_end(row.key)
        while len(self._memory) > self._memory_items:
            self._memory.popitem(last=False)


def stack(rows: Sequence[StoredFeature]) -> Tensor:
    """Return the features (N, F) of N > 0 rows of one width: float32, CPU, memory of their own."""
    # By torch: NumPy takes three times as long from float16 to float32.
    return torch.from_numpy(np.stack([row.feature for row in rows])).float()


def _current(stored: StoredFeature, sample: Sample) -> StoredFeature | None:
    """Return the stored feature when it was made from the file the sample names (by place, size and time, else by content), else None."""
    if sample.path is None or stored.stamp is None:
        return stored if sample.path is None and stored.stamp is None else None
    try:
        status = sample.path.stat()
    except OSError:
        SourceStamp.of(sample.path)  # raises with the path and a fix
        raise
    is_same_place = stored.stamp.place == place_of(sample.path)
    if is_same_place and (status.st_size, status.st_mtime_ns) == (stored.stamp.size, stored.stamp.mtime_ns):
        return stored
    if status.st_size != stored.stamp.size or (now := SourceStamp.of(sample.path)).digest != stored.stamp.digest:
        return None
    # A copied data set: same bytes, other time or place. Remember the new ones, or every step would read the file again.
    return stored._replace(stamp=now)


def check_features(features: Tensor, feature_dim: int, keys: Sequence[str] | None = None) -> None:
    """Check features (N, F).

    Raises:
        FeatureError: the shape is not (N, feature_dim), or a row holds NaN or infinite values (checked on the CPU alone).
    """
    if features.dim() != 2 or features.shape[1] != feature_dim:
        raise FeatureError(
            "cannot use these features: wrong width or shape",
            {"got": tuple(features.shape), "expected": f"(N, {feature_dim})"},
            "use the encoder that FiLM was built for, or build FiLM with this width",
        )
    if features.device.type == "cpu" and not bool(torch.isfinite(features).all()):
        row = int((~torch.isfinite(features)).any(dim=1).nonzero()[0])
        raise FeatureError(
            f"the feature of {keys[row] if keys else f'row {row}'} holds NaN or infinite values",
            {"row": row, "expected": "finite values"},
            "look at that image, or run the encoder with dtype float32",
        )
