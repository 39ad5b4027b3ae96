"""What is done to a feature before FiLM's projection: centring and the like, by statistics of training images.

Features of images of one kind are alike: their common part drives bounded heads to their bound before anything is learnt.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from vlmfilm_plugin.errors import ConditionError
from vlmfilm_plugin.film.feature_statistics import LEAST, Statistics, read_facts
from vlmfilm_plugin.settings.parsing import WITH_STATISTICS


class FeatureTransform(nn.Module):
    """Transform features step by step: `center` (minus the mean), `standardize` (the same, divided by the deviation), `l2norm` (to norm 1).

    Its buffers `mean` and `std` (F,) travel in state dicts; what they are of stands beside them as `_extra_state`. What acts, and what a
    state dict gets, is held apart from the buffers: EMA helpers average those, and would round them anew in every step.

    Args:
        steps: of `settings.parsing.TRANSFORM_STEPS`, at most one with statistics, which are of features after the steps before it.
        width: F.

    Shape:
        features (B, F), any float dtype -> (B, F), float32 or wider, detached.
    """

    def __init__(self, steps: Sequence[str], width: int) -> None:
        super().__init__()
        self.steps, self.width = tuple(steps), width
        self.statistics: Statistics | None = None
        self._placed: dict[torch.device, tuple[Tensor, Tensor | None]] = {}
        if self.needs_statistics:
            self.register_buffer("mean", torch.zeros(width))
        if "standardize" in self.steps:
            self.register_buffer("std", torch.ones(width))

    @property
    def needs_statistics(self) -> bool:
        """Tell whether a step takes statistics."""
        return any(step in WITH_STATISTICS for step in self.steps)

    @property
    def is_frozen(self) -> bool:
        """Tell whether its statistics never change again; true where it needs none."""
        return not self.needs_statistics or (self.statistics is not None and self.statistics.facts.is_frozen)

    @property
    def is_ready(self) -> bool:
        """Tell whether it can be used: statistics that are still being counted can be after `LEAST` different images."""
        return self.is_frozen or (self.statistics is not None and self.statistics.facts.count >= LEAST)

    def forward(self, features: Tensor) -> Tensor:
        x = features.detach()
        x = x if x.dtype == torch.float64 else x.float()
        for step in self.steps:
            if step == "l2norm":
                x = nn.functional.normalize(x, dim=1)
                continue
            mean, std = self._on(x.device)
            x = x - mean if std is None else (x - mean) / std
        return x

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        if self.statistics is None:
            raise unfitted(self.steps)
        if device not in self._placed:
            mean, std = self.statistics.mean, self.statistics.std
            self._placed[device] = mean.to(device), None if std is None else std.to(device)
        return self._placed[device]

    def take(self, statistics: Statistics) -> None:
        """Use these statistics from now on.

        Raises:
            ConditionError: it has some that are frozen.
        """
        if self.is_frozen:
            held = "no step takes any" if self.statistics is None else f"those of {self.statistics.facts}"
            raise ConditionError(
                "cannot set the statistics of `feature_transform`: they never change once they are there",
                {"found": held, "asked for": statistics.facts},
                "attach FiLM anew to fit it to other features",
            )
        self._hold(statistics)

    def reset(self) -> None:
        """Be without statistics, as a fresh transform."""
        self.statistics = None
        self._placed.clear()
        with torch.no_grad():
            for name, buffer in self.named_buffers():
                buffer.fill_(float(name == "std"))

    def _hold(self, statistics: Statistics) -> None:
        self.statistics = statistics
        self._placed.clear()
        with torch.no_grad():
            for name, buffer in self.named_buffers():
                buffer.copy_(getattr(statistics, name))

    def get_extra_state(self) -> Tensor:
        content = None if self.statistics is None else asdict(self.statistics.facts)
        # Bytes in a tensor: such a state dict loads with weights_only=True and fits safetensors.
        return torch.frombuffer(bytearray(json.dumps(content, sort_keys=True).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """Take what was just loaded into the buffers as statistics, with what they are of.

        Raises:
            CheckpointError: that cannot be understood.
        """
        facts = read_facts(state)
        if facts is None or not self.needs_statistics:
            self.reset()
            return
        loaded = {name: buffer.detach().to("cpu", torch.float32, copy=True) for name, buffer in self.named_buffers()}
        self._hold(Statistics(facts, **loaded))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.statistics is not None:
            for name, buffer in self.named_buffers():
                destination[prefix + name] = getattr(self.statistics, name).to(buffer.device, buffer.dtype, copy=True)

    def extra_repr(self) -> str:
        return ", ".join(self.steps) + ("" if self.statistics is None else f"; statistics of {self.statistics.facts}")


def unfitted(steps: Sequence[str]) -> ConditionError:
    """Return the error of a transform that is used without its statistics."""
    return ConditionError(
        "cannot transform features: `feature_transform` has no statistics",
        {"feature_transform": ", ".join(steps), "found": "no statistics", "expected": "those of training images"},
        "call `fit(features=...)` or `fit(images=...)` first, or set `feature_transform: none`",
    )
