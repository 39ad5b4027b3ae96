"""`feature_control`: runs that are trained without the condition, through the same parameters and code. What such a run learns, FiLM learnt
without it: `constant` (one training image's feature for all), `random` (a vector of its own for each image, drawn) and `zero`.

A control takes the place of a feature after the transform, is recorded in the architecture, and never passes for FiLM.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch import Tensor, nn


class FeatureControl(nn.Module):
    """What takes the place of features (B, F) -> (B, F); what it holds is of the first training batch, and travels in state dicts.

    Attributes:
        name: of `settings.parsing.CONTROLS`.
    """

    name = ""

    def __init__(self, size: int) -> None:
        super().__init__()
        if size:
            self.register_buffer(self._buffer, torch.full((size,), torch.nan))
        self._is_known = size == 0

    # The name of what is held.
    _buffer = "held"

    @property
    def is_known(self) -> bool:
        """Tell whether what it holds is there; reads the device until it is."""
        if not self._is_known:
            self._is_known = not bool(torch.isnan(getattr(self, self._buffer)).any())
        return self._is_known

    def take(self, features: Tensor) -> None:
        """Hold what is needed of features (B, F): in every process that of the first one. All processes must call this."""
        held: list[list[float]] = [self._of(features.detach().double()).tolist()]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.broadcast_object_list(held, src=0)
        buffer: Tensor = getattr(self, self._buffer)
        with torch.no_grad():
            buffer.copy_(torch.tensor(held[0], dtype=buffer.dtype))

    def _of(self, features: Tensor) -> Tensor:
        raise NotImplementedError

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._is_known = not self._buffers

    def forward(self, features: Tensor, keys: Sequence[str]) -> Tensor:
        raise NotImplementedError


class ConstantFeature(FeatureControl):
    """Gives every image the feature of the first training image."""

    name, _buffer = "constant", "feature"

    def _of(self, features: Tensor) -> Tensor:
        return features[0]

    def forward(self, features: Tensor, keys: Sequence[str]) -> Tensor:
        feature: Tensor = self.feature  # type: ignore[assignment]
        return feature.to(features.device, features.dtype).expand(features.shape[0], -1)


class RandomFeature(FeatureControl):
    """Gives each image a vector that its key and a seed draw, the same in every process, run and version; its entries have the root mean square of
    those of the first training batch: one number for all, so that nothing of an image is left."""

    name, _buffer = "random", "scale"

    def __init__(self, width: int) -> None:
        super().__init__(1)
        self.width = width
        self.register_buffer("seed", torch.zeros(1, dtype=torch.int64))

    def _of(self, features: Tensor) -> Tensor:
        return features.square().mean().sqrt()[None]

    def forward(self, features: Tensor, keys: Sequence[str]) -> Tensor:
        scale: Tensor = self.scale  # type: ignore[assignment]
        seed: Tensor = self.seed  # type: ignore[assignment]
        drawn = torch.from_numpy(np.stack([vector_of(key, int(seed), self.width) for key in keys]))
        return drawn.to(features.device, features.dtype) * scale.to(features.device, features.dtype)


class ZeroFeature(FeatureControl):
    """Gives every image the feature of zeros: what FiLM's parameters add without any input."""

    name = "zero"

    def forward(self, features: Tensor, keys: Sequence[str]) -> Tensor:
        return torch.zeros_like(features)


def vector_of(key: str, seed: int, width: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the vector (width,) of a key: uniform, of mean 0 and deviation 1, by SHAKE-256, which no library changes."""
    drawn = hashlib.shake_256(f"{seed}:{key}".encode()).digest(4 * width)
    return (np.frombuffer(drawn, dtype="<u4") / 2.0**32 - 0.5) * math.sqrt(12)


def build_control(name: str, width: int) -> FeatureControl | None:
    """Return the control of this name for features of a width; None for `none`."""
    if name == "none":
        return None
    return ZeroFeature(0) if name == "zero" else ConstantFeature(width) if name == "constant" else RandomFeature(width)


def set_seed(control: FeatureControl | None, seed: int) -> None:
    """Set what draws the vectors of `random`; a checkpoint that is loaded brings its own."""
    if isinstance(control, RandomFeature):
        control.seed.fill_(seed)  # type: ignore[operator]
