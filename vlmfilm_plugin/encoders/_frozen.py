"""What all encoders with weights share: weights that load on first use, and batches bounded by patches.

Knows nothing of checkpoints' files (`_loading`, `_weights`) or of what a forward computes.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from vlmfilm_plugin.encoders import _loading as loading
from vlmfilm_plugin.encoders import _preprocessing as preprocessing
from vlmfilm_plugin.encoders._folder_digest import FileStamp
from vlmfilm_plugin.encoders._identity import stamps_of, weights_of
from vlmfilm_plugin.encoders.base import EncoderIdentity
from vlmfilm_plugin.errors import EncoderError, FeatureError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from vlmfilm_plugin.settings.record import Settings

Result = TypeVar("Result")


@dataclass(frozen=True)
class Prepared:
    """One preprocessed image: what its model is given, by name (CPU), and how many patches it costs."""

    tensors: Mapping[str, Tensor]
    patches: int


# Preprocessed images that go through a model together.
Pack = Sequence[Prepared]


class LazyEncoder:
    """Hold one frozen module that is loaded by its first use; one thread at a time uses it.

    Args:
        settings: model, dtype, device and preprocessing.
        config: the model's configuration, read already.
    """

    def __init__(self, settings: Settings, config: Any) -> None:
        self.settings, self.config = settings, config
        self._module: torch.nn.Module | None = None
        self._stamps: Mapping[Path, FileStamp] | None = None
        self._lock = threading.RLock()

    @cached_property
    def image_processor(self) -> Any:
        """Return the image processor, read once."""
        return preprocessing.read_image_processor(self.settings)

    @cached_property
    def identity(self) -> EncoderIdentity:
        """Return what decides a feature; the compute dtype and the device are no part of it.

        Raises:
            EncoderError: there are no weights, they are quantised, or they changed since they were loaded.
        """
        weights = weights_of(self.settings, self.config, self._part)
        self._check_unchanged(weights.stamps)
        facts, more, processor = self._facts(), self._facts_of_files(), self.image_processor
        now = {**facts, **weights.facts, "preprocessing": preprocessing.processor_facts(processor, self.config.model_type), **more}
        # The first version knew fewer values of image processors, and no facts of other files.
        before = None if weights.former is None and weights.stamps else weights.former or weights.facts
        former = () if before is None else ({**facts, **before, "preprocessing": preprocessing.processor_facts_of_first_version(processor)},)
        return EncoderIdentity(now, former)

    def _check_unchanged(self, stamps: Mapping[Path, FileStamp]) -> None:
        """Check that the files are those that were identified, or loaded, before: a feature must not be stored under another model's name."""
        if self._stamps is None:
            self._stamps = stamps
        changed = sorted(str(path) for path in {*stamps, *self._stamps} if stamps.get(path) != self._stamps.get(path))
        if changed:
            facts = {
                "model": loading.name_of(self.settings),
                "changed": ", ".join(changed[:3]),
                "expected": "the files it was built from",
            }
            raise EncoderError("cannot use this encoder: the files of its model changed while it was in use", facts, "start the run again")

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """Return the dtype that features are computed in; None where no weights are in memory."""
        return None if self._module is None else loading.dtype_of(self._module)

    @property
    def is_loaded(self) -> bool:
        """Tell whether weights are in memory."""
        return self._module is not None

    def release(self) -> None:
        """Drop the weights from memory; the next use loads them again."""
        with self._lock:
            self._module = None
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    @contextmanager
    def using_module(self) -> Iterator[torch.nn.Module]:
        """Hand out the loaded module, alone, without gradients, and outside the host's autocast and inference mode."""
        with self._lock:
            if self._module is None:
                module = self._load()
                self._check_unchanged(stamps_of(self.settings, self.config))
                self._module = module
            device = loading.device_of(self._module).type
            # Tensors made under inference mode could not take part in autograd later; autocast would make features depend on the caller.
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
                yield self._module

    def run(self, images: Sequence[Image], compute: Callable[[torch.nn.Module, Pack], Sequence[Result]]) -> list[Result]:
        """Compute one result an image, in packs of at most `max_patches_per_batch` patches, halved where memory runs out."""
        results: list[Result] = []
        with self.using_module() as module:
            for pack in _packs(map(self._prepare, range(len(images)), images), self.settings.max_patches_per_batch):
                results.extend(_halving(pack, lambda part: compute(module, part)))
        return results

    def _prepare(self, index: int, image: Image) -> Prepared:
        try:
            done = self.image_processor(images=[image.convert("RGB")], return_tensors="pt")
        except ValueError as error:  # such as an aspect ratio above 200
            facts = {"found": f"{image.width} x {image.height} pixels", "processor said": " ".join(str(error).split())}
            raise EncoderError(f"cannot preprocess image {index}", facts, "crop or pad the image") from error
        tensors = {name: value for name, value in done.items() if isinstance(value, torch.Tensor) and value.ndim}
        return Prepared(tensors, self._patches(tensors["pixel_values"]))

    def _patches(self, pixels: Tensor) -> int:
        """Return the patches of one image: pixels (patches, values) as the Qwen family has them."""
        return len(pixels)

    def _part(self) -> loading.Part | None:
        """Return the part of the model that is loaded as it is, or None for the whole model."""
        return None

    def _facts_of_files(self) -> dict[str, object]:
        """Return facts of files besides weights, configuration and image processor; the first version had none."""
        return {}

    @abstractmethod
    def _load(self) -> torch.nn.Module:
        """Load the module."""

    @abstractmethod
    def _facts(self) -> dict[str, object]:
        """Return the facts of this encoder besides model and preprocessing: its name, mode, pooling, prompt."""


class OnePassEncoder(LazyEncoder):
    """An encoder whose feature of an image comes out of one pass through the module."""

    @property
    @abstractmethod
    def feature_dim(self) -> int:
        """Return F, the width of a feature; no weights are read for it."""

    def encode(self, images: Sequence[Image]) -> Tensor:
        """Encode images (RGB, 8 bit, any sizes).

        Shape:
            return: (N, F) float32, CPU, detached.

        Raises:
            FeatureError: a feature holds NaN or infinity.
            EncoderError: the weights cannot be loaded, a prompt cannot be used, or one image alone does not fit in memory.
        """
        return features_of(self.run(images, self._features), self.feature_dim, "image")

    @abstractmethod
    def _features(self, module: Any, pack: Pack) -> Sequence[Tensor]:
        """Return the feature (F,) of each image: float32, CPU."""


def in_groups(pack: Pack, key: Callable[[Prepared], Hashable], compute: Callable[[Pack], Sequence[Result]]) -> list[Result]:
    """Compute the images of one key together, and return the results in the order of `pack`."""
    groups: dict[Hashable, list[int]] = {}
    for index, item in enumerate(pack):
        groups.setdefault(key(item), []).append(index)
    results: dict[int, Result] = {}
    for members in groups.values():
        results.update(zip(members, compute([pack[index] for index in members]), strict=True))
    return [results[index] for index in range(len(pack))]


def features_of(rows: Sequence[Tensor], width: int, what: str) -> Tensor:
    """Stack rows (F,) into features (N, F): float32, CPU.

    Raises:
        FeatureError: a row has another width, or holds NaN or infinity; the message names its index.
    """
    for index, row in enumerate(rows):
        if row.shape != (width,):
            raise FeatureError(f"cannot use the feature of {what} {index}", {"found": tuple(row.shape), "expected": (width,)})
        if not bool(torch.isfinite(row).all()):
            facts = {"found": f"{int((~torch.isfinite(row)).sum())} of {width} values NaN or infinite", "expected": "finite values"}
            raise FeatureError(f"cannot use the feature of {what} {index}", facts, "set `dtype` to float32 or bfloat16")
    with torch.inference_mode(False):
        return torch.stack(list(rows)) if rows else torch.zeros(0, width)


def _packs(items: Iterator[Prepared], limit: int) -> Iterator[Pack]:
    """Yield packs bounded by patches, not images: an image of 4096 x 4096 costs as much as hundreds of small ones."""
    pack: list[Prepared] = []
    for item in items:
        if pack and sum(held.patches for held in pack) + item.patches > limit:
            yield pack
            pack = []
        pack.append(item)
    if pack:
        yield pack


def _halving(pack: Pack, compute: Callable[[Pack], Sequence[Result]]) -> list[Result]:
    try:
        return list(compute(pack))
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        if len(pack) == 1:
            facts = {"found": f"{pack[0].patches} patches", "device said": " ".join(str(error).split())[:200]}
            raise EncoderError("cannot encode an image: out of memory with this image alone", facts, "lower `max_pixels`") from error
    # Outside the handler: the traceback would keep the tensors of the failed try alive.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    middle = len(pack) // 2
    return [result for half in (pack[:middle], pack[middle:]) for result in _halving(half, compute)]


def _is_out_of_memory(error: BaseException) -> bool:
    # The CPU allocator has no class of its own for this.
    return isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or "can't allocate memory" in str(error)
