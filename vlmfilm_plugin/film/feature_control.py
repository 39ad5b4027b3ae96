"""`feature_control: constant`: a run in which every image is conditioned on the feature of one training image. What such a run learns, FiLM
learnt without the condition."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn


class ConstantFeature(nn.Module):
    """Gives every image the feature of the first training image, as it is after the transform; it travels in state dicts.

    Shape:
        features (B, F) -> (B, F), B times the one that is held.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("feature", torch.full((width,), torch.nan))
        self._is_known = False

    @property
    def is_known(self) -> bool:
        """Tell whether there is one; reads the device until there is."""
        if not self._is_known:
            self._is_known = not bool(torch.isnan(self.feature).any())  # type: ignore[arg-type]
        return self._is_known

    def take(self, features: Tensor) -> None:
        """Hold the first of features (B, F): in every process that of the first one. All processes must call this."""
        held: list[list[float]] = [features[0].detach().double().tolist()]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.broadcast_object_list(held, src=0)
        feature: Tensor = self.feature  # type: ignore[assignment]
        with torch.no_grad():
            feature.copy_(torch.tensor(held[0], dtype=feature.dtype))

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._is_known = False

    def forward(self, features: Tensor) -> Tensor:
        feature: Tensor = self.feature  # type: ignore[assignment]
        return feature.to(features.device, features.dtype).expand(features.shape[0], -1)
