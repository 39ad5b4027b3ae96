"""What both Qwen2.5-VL encoders share: weights that load on first use, and batches bounded by patches.

Knows nothing of checkpoints' files (`_qwen_loading`) or of what a forward computes (`qwen2_5_vl`, `_qwen_text`).
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from vlmfilm_plugin.encoders import _qwen_loading as loading
from vlmfilm_plugin.encoders.base import Identity
from vlmfilm_plugin.errors import EncoderError, FeatureError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from vlmfilm_plugin.settings import Settings

Result = TypeVar("Result")


@dataclass(frozen=True)
class Pack:
    """Preprocessed images that go through the model together.

    Shape:
        patches: per image (patches_i, channels * temporal * patch * patch) float32, CPU.
        grids: per image (1, 3) int64, the (time, height, width) of its patches.
    """

    patches: tuple[Tensor, ...]
    grids: tuple[Tensor, ...]


class LazyQwen:
    """Hold one frozen Qwen2.5-VL module that is loaded by its first use; one thread at a time uses it.

    Args:
        settings: model, dtype, device and preprocessing.
        config: the model's configuration, read already.
    """

    def __init__(self, settings: Settings, config: Any) -> None:
        self.settings, self.config = settings, config
        self._module: torch.nn.Module | None = None
        self._lock = threading.RLock()

    @cached_property
    def image_processor(self) -> Any:
        """Return the image processor, read once."""
        return loading.read_image_processor(self.settings)

    @cached_property
    def identity(self) -> Identity:
        """Return what decides a feature; the compute dtype and the device are no part of it."""
        return Identity(
            {
                "encoder": "qwen2_5_vl",
                **loading.model_facts(self.settings, self.config),
                **self._mode_facts(),
                "preprocessing": loading.processor_facts(self.image_processor),
            }
        )

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
                self._module = self._load()
            device = loading.device_of(self._module).type
            # Tensors made under inference mode could not take part in autograd later; autocast would make features depend on the caller.
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
                yield self._module

    def run(self, images: Sequence[Image], compute: Callable[[torch.nn.Module, Pack], Sequence[Result]]) -> list[Result]:
        """Compute one result an image, in packs of at most `max_patches_per_batch` patches, halved where memory runs out."""
        results: list[Result] = []
        with self.using_module() as module:
            for pack in _packs(self.image_processor, images, self.settings.max_patches_per_batch):
                results.extend(_halving(pack, lambda part: compute(module, part)))
        return results

    @abstractmethod
    def _load(self) -> torch.nn.Module:
        """Load the module."""

    @abstractmethod
    def _mode_facts(self) -> dict[str, object]:
        """Return the facts of this mode: its name, pooling, prompt."""


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


def _packs(processor: Any, images: Sequence[Image], limit: int) -> Iterator[Pack]:
    """Yield packs bounded by patches, not images: an image of 4096 x 4096 costs as much as hundreds of small ones."""
    patches: list[Tensor] = []
    grids: list[Tensor] = []
    for index, image in enumerate(images):
        try:
            done = processor(images=[image.convert("RGB")], return_tensors="pt")
        except ValueError as error:  # such as an aspect ratio above 200
            facts = {"found": f"{image.width} x {image.height} pixels", "processor said": " ".join(str(error).split())}
            raise EncoderError(f"cannot preprocess image {index}", facts, "crop or pad the image") from error
        if patches and sum(map(len, patches)) + len(done["pixel_values"]) > limit:
            yield Pack(tuple(patches), tuple(grids))
            patches, grids = [], []
        patches.append(done["pixel_values"])
        grids.append(done["image_grid_thw"])
    if patches:
        yield Pack(tuple(patches), tuple(grids))


def _halving(pack: Pack, compute: Callable[[Pack], Sequence[Result]]) -> list[Result]:
    count = len(pack.patches)
    try:
        return list(compute(pack))
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        if count == 1:
            facts = {"found": f"{len(pack.patches[0])} patches", "device said": " ".join(str(error).split())[:200]}
            raise EncoderError("cannot encode an image: out of memory with this image alone", facts, "lower `max_pixels`") from error
    # Outside the handler: the traceback would keep the tensors of the failed try alive.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    middle = count // 2
    halves = (Pack(pack.patches[:middle], pack.grids[:middle]), Pack(pack.patches[middle:], pack.grids[middle:]))
    return [result for half in halves for result in _halving(half, compute)]


def _is_out_of_memory(error: BaseException) -> bool:
    # The CPU allocator has no class of its own for this.
    return isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or "can't allocate memory" in str(error)
