"""The condition that a caller gives by hand: `handle.condition(...)`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlmfilm_plugin.errors import ConditionError
from vlmfilm_plugin.features.shuffle import Shuffle, distances_of, images_of
from vlmfilm_plugin.film.alarm import Advice, ConditionAlarm
from vlmfilm_plugin.film.feature_transform import unfitted
from vlmfilm_plugin.film.gate_view import GateView, MaskReader
from vlmfilm_plugin.film.gates import Gate, SpatialGate, check_gate, gate_of
from vlmfilm_plugin.forward.context import ForwardContext
from vlmfilm_plugin.forward.recompute import NO_TASK, graph_task
from vlmfilm_plugin.settings.record import Settings

if TYPE_CHECKING:
    from vlmfilm_plugin.film.module import FilmModule


@dataclass(eq=False)
class GivenFeatures:
    """The condition that a caller gives by hand: features (B, F), for every UNet of one `film_id` (a UNet and its copies).

    `names` are those of the rows, for the file of pairs alone: what tells images apart in mode `shuffle` is their features.
    `alarm` watches the forwards of a training.
    """

    film_id: str
    features: Tensor
    settings: Settings = field(default_factory=Settings)
    gate: Tensor | Gate | None = None
    step: int = 0
    shuffle: Shuffle = field(default_factory=Shuffle)
    names: Sequence[object] | None = None
    alarm: ConditionAlarm | None = None
    is_for_all: bool = False

    @cached_property
    def _shuffled(self) -> Tensor:
        """Return the features, exchanged between images; once for all forwards of the condition."""
        names = self.names if self.names is not None else [f"row {row}" for row in range(len(self.features))]
        rows = self.shuffle.exchange(images_of(self.features), self.step, names=names, distances=lambda: distances_of(self.features))
        if rows is None:
            raise ConditionError(
                "cannot shuffle the given features: they are of one image",
                {"features": tuple(self.features.shape), "expected": "features of two images or more"},
                "give the features of several images, or use mode on",
            )
        self.shuffle.pairs.write(((names[row], names[other]) for row, other in enumerate(rows)), self.step)
        return self.features[rows]

    def serves(self, film: FilmModule) -> bool:
        return film.film_id == self.film_id

    def open_context(self, film: FilmModule, x: Tensor, image: Tensor | None, masks: MaskReader | None) -> ForwardContext:
        if film.mode == "off":
            return ForwardContext(film, None)
        rows, given = x.shape[0], self.features.shape[0]
        if given not in (1, rows):
            raise ConditionError(
                "cannot map the rows of this UNet forward to the given features",
                {"features": given, "rows": rows, "expected": "one feature for each row, or one for all"},
                "repeat the features as the rows are repeated, e.g. features.repeat_interleave(num_patches, dim=0)",
            )
        if film.lacks_statistics:
            raise unfitted(film.architecture.feature_transform)
        features = film.transform(self._shuffled if film.mode == "shuffle" else self.features).to(x.device)
        index = None if given == rows else torch.zeros(rows, dtype=torch.long, device=x.device)
        if masks is not None:
            self._watch(film, features)
        gate = None if masks is None else self._gate(film, GateView(x, image, masks=masks))
        return ForwardContext(film, features, index, gate=gate)

    def _watch(self, film: FilmModule, features: Tensor) -> None:
        """Let the alarm see what conditions a forward of a training: one that is not run again in backward(). Controls are exempt."""
        is_training = film.training and torch.is_grad_enabled() and graph_task() == NO_TASK
        if self.alarm is None or not is_training or film.mode != "on" or film.architecture.feature_control != "none":
            return
        self.alarm.collect(None, features)
        if self.alarm.is_due():
            self.alarm.read(film, Advice.of(film, "`handle.fit(features)` before the first step"))

    def _gate(self, film: FilmModule, view: GateView) -> SpatialGate | None:
        if self.gate is None:
            return gate_of(self.settings, view, film.architecture.stages)
        values = self.gate(view) if callable(self.gate) else self.gate
        return None if values is None else SpatialGate(check_gate(values, view.x))
