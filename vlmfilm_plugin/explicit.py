"""The condition that a caller gives by hand: `handle.condition(...)`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlmfilm_plugin.conditioning import Frame
from vlmfilm_plugin.errors import ConditionError
from vlmfilm_plugin.gates import Gate, GateView, check_gate
from vlmfilm_plugin.permutation import derangement

if TYPE_CHECKING:
    from vlmfilm_plugin.film_module import FilmModule


@dataclass(eq=False)
class ExplicitCondition:
    """The condition that a caller gives by hand: features (B, F), for every UNet of one family (a UNet and its copies)."""

    family: str
    features: Tensor
    gate: Tensor | Gate | None = None
    is_for_all: bool = False

    def serves(self, film: FilmModule) -> bool:
        return film.family == self.family

    def open_frame(self, film: FilmModule, x: Tensor, image: Tensor | None) -> Frame:
        if film.mode == "off":
            return Frame(film, None)
        rows, given = x.shape[0], self.features.shape[0]
        if given not in (1, rows):
            raise ConditionError(
                "cannot map the rows of this UNet forward to the given features",
                {"features": given, "rows": rows, "expected": "one feature for each row, or one for all"},
                "repeat the features as the rows are repeated, e.g. features.repeat_interleave(num_patches, dim=0)",
            )
        features = self.features.to(x.device)
        if film.mode == "shuffle" and given > 1:
            features = features[derangement(given, 0).to(x.device)]
        gate = self.gate(GateView(x, image)) if callable(self.gate) else self.gate
        index = None if given == rows else torch.zeros(rows, dtype=torch.long, device=x.device)
        return Frame(film, features, index, gate=None if gate is None else check_gate(gate, x))
