"""The alarm of a run whose condition no longer reaches the decoder: gamma and beta that are the same for every image.

Notes
-----
1. A wired run may die all the same: features that are alike drive bounded heads to their bounds, gradients vanish there, and the loss
   falls since the network learns by heart. A spread pooled over channels does not see it: channels differ, images do not.
2. Nothing is computed in a step. The features of the last different images are kept, by reference; at a few steps the heads of that moment
   are asked what they make of them. So batches of one image, gradient accumulation and a weight decay that moves everything alike
   change nothing about the verdict.
3. Every process asks its heads at the same steps, inside a forward: under FSDP their parameters are gathered together there.
   The first one reads the answer, one transfer for all stages, and writes.
4. A share of entries at their bound is a likely cause and no verdict: healthy runs have 80 to 90 % there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmfilm_plugin.film.module import FilmModule
from vlmfilm_plugin.film.statistics import differing_energy, share_at_bound, spread_between_images
from vlmfilm_plugin.log import film_logger, is_rank_zero
from vlmfilm_plugin.settings.record import Settings

READ_AT = (1, 2, 25, 50, 100)
"""Training steps of this process in which the heads are asked, beside every logged one; the first two for the energy, where it takes two
batches to see two images."""
LEAST_SPREAD = 1e-4
"""Of how far gamma and beta are from the identity: a spread between images below it reaches nothing.

Measured on runs of 400 steps: dead ones had 1e-4 to 1e-8 at step 100 and stayed there; the slowest that recovered 1e-3; healthy ones 0.1 to 1.
"""
_KEPT = 32
# How far gamma and beta must be from the identity before their spread is judged: gamma is 1 and something, in steps of 1.2e-7.
_MOVED = {"gamma": 1e-3, "beta": 1e-5}


@dataclass(frozen=True)
class StageVerdict:
    """What the heads of a stage make of different images.

    Attributes:
        spread: root mean square over channels of gamma's and beta's spread between images, in their own unit.
        moved: how far they are from the identity at most.
        at_bound: share of their entries at their bounds; None where there is none.
    """

    spread: Mapping[str, float]
    moved: Mapping[str, float]
    at_bound: Mapping[str, float | None]

    @property
    def is_dead(self) -> bool:
        """Tell whether gamma and beta have left the identity, and are the same for every image."""
        if not all(map(math.isfinite, (*self.spread.values(), *self.moved.values()))):
            return False  # diverged: another fault, which every loss shows
        is_moved = any(self.moved[name] > least for name, least in _MOVED.items())
        return is_moved and all(self.spread[name] <= LEAST_SPREAD * self.moved[name] for name in _MOVED)

    def fields(self) -> dict[str, Any]:
        """Return it as fields of a `[FILM-DBG]` line."""
        spread = {f"{name}_between_images": value for name, value in self.spread.items()}
        return spread | {f"{name}_at_bound": value for name, value in self.at_bound.items()}


class ConditionAlarm:
    """Watches the condition of one UNet, and of its copies, over training steps."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._kept: dict[str, tuple[Tensor, int]] = {}
        self._steps = 0
        self._last: object = None
        self._has_written_energy = False
        self._dead: frozenset[int | str] = frozenset()

    def collect(self, keys: Sequence[str], features: Tensor) -> None:
        """Keep the transformed features (S, F) of a training batch, one key a row; of an image that is kept already, the later ones."""
        for row, key in list(enumerate(keys))[-_KEPT:]:
            self._kept.pop(key, None)
            self._kept[key] = features, row
        while len(self._kept) > _KEPT:
            del self._kept[next(iter(self._kept))]

    def is_due(self, step: int | None) -> bool:
        """Count a training batch of this step; tell whether the heads are to be asked in it, the same in every process."""
        if step is not None and step == self._last:
            return False  # accumulation
        self._last = step
        self._steps += 1
        every, is_enabled = self._settings.film_log_every_n_steps_train, self._settings.film_debug_enabled
        return self._steps in READ_AT or (is_enabled and step is not None and step % every == 0)

    def read(self, film: FilmModule, step: int | None) -> dict[int | str, StageVerdict]:
        """Ask the heads, and write what there is to say; return the verdict of each stage, nothing where it cannot be known.

        Call it inside a forward of the UNet.
        """
        rows = [features[row] for features, row in self._kept.values() if features.device == next(film.parameters()).device]
        if not rows:
            return {}
        with torch.no_grad(), _evaluating(film):
            cond_vec = film.project(torch.stack(rows))
            numbers = [differing_energy(cond_vec), *(number for head in film.all_heads() for number in _numbers(head, cond_vec))]
        if len(rows) < 2 or not is_rank_zero():
            return {}
        values: list[float] = torch.stack(numbers).tolist()
        energy, size = values[0], len(_NUMBERS)
        verdicts = {stage.key: _verdict(values[1 + place * size : 1 + (place + 1) * size]) for place, stage in enumerate(film.architecture.stages)}
        if not self._has_written_energy:
            self._has_written_energy = True
            self._write_energy(energy, len(rows), step)
        self._write_changes(verdicts, energy, len(rows), step)
        return verdicts

    def _write_energy(self, energy: float, images: int, step: int | None) -> None:
        alike = ": the features are alike, and bounded heads may reach their bounds before they tell images apart" if energy < 0.1 else ""
        film_logger().info(
            "[VLM] condition at step %s: %.1f %% of the energy of the condition vectors differs between images (%d images)%s",
            step,
            100 * energy,
            images,
            alike,
        )

    def _write_changes(self, verdicts: Mapping[int | str, StageVerdict], energy: float, images: int, step: int | None) -> None:
        dead = frozenset(stage for stage, verdict in verdicts.items() if verdict.is_dead)
        before, self._dead = self._dead, dead
        if before - dead:
            film_logger().info("[VLM] condition at step %s: it reaches decoder %s again", step, _named(before - dead))
        if dead - before:
            film_logger().warning("[FILM-WARN] %s", self._words(verdicts, dead, energy, images, step))

    def _words(self, verdicts: Mapping[int | str, StageVerdict], dead: frozenset[int | str], energy: float, images: int, step: int | None) -> str:
        alive = frozenset(verdicts) - dead
        rest = f" (it does reach {_named(alive)})" if alive else ", at none of those that carry FiLM"
        spread = max(verdicts[stage].spread[name] / max(verdicts[stage].moved[name], 1e-30) for stage in dead for name in _MOVED)
        shares = [share for stage in dead for share in verdicts[stage].at_bound.values() if share is not None]
        share = sum(shares) / len(shares) if shares else 0.0
        cause = ""
        if share > 0.5:
            cause = f" Likely cause: {100 * share:.0f} % of their entries lie at their bounds (`gamma_scale`, `beta_scale`), where gradients vanish."
        return (
            f"step {step}: the condition no longer reaches the decoder at {_named(dead)}{rest}: gamma and beta are the same for {images} different "
            f"images (their spread between images is {spread:.1g} of their distance from the identity, and {100 * energy:.2g} % of the condition "
            f"vectors' energy differs).{cause} The loss may fall all the same. {self._advice()}"
        )

    def _advice(self) -> str:
        settings = self._settings
        is_centred = any(step in settings.feature_transform for step in ("center", "standardize"))
        steps = [] if is_centred else ["`feature_transform: center`, which takes out what all features share"]
        if settings.gamma_scale is not None or settings.beta_scale is not None:
            steps.append("`gamma_scale: null` and `beta_scale: null`, which lift the bounds")
        steps.append("a smaller `film_lr_scale`")
        return f"Start anew with {', else '.join(steps)}."


# What is read of a stage, in this order.
_NUMBERS = tuple((name, what) for name in _MOVED for what in ("spread", "moved", "at_bound"))


def _numbers(head: Any, cond_vec: Tensor) -> Iterator[Tensor]:
    """Yield what is read of a head, as scalars on the device; NaN stands for what does not exist."""
    pair: Mapping[str, Tensor] = dict(zip(_MOVED, head(cond_vec), strict=True))
    for name, what in _NUMBERS:
        values, centre = pair[name], float(name == "gamma")
        if what == "spread":
            yield spread_between_images(values).square().mean().sqrt()
        elif what == "moved":
            yield (values.float() - centre).abs().max()
        else:
            # A head of someone's own need not have bounds, whatever the settings say.
            bound = getattr(head, f"{name}_scale", None)
            share = share_at_bound(values, centre, bound if isinstance(bound, int | float) else None)
            yield cond_vec.new_full((), math.nan, dtype=torch.float32) if share is None else share


def _verdict(values: Sequence[float]) -> StageVerdict:
    read = dict(zip(_NUMBERS, values, strict=True))
    shares = {name: read[name, "at_bound"] for name in _MOVED}
    return StageVerdict(
        {name: read[name, "spread"] for name in _MOVED},
        {name: read[name, "moved"] for name in _MOVED},
        {name: None if math.isnan(share) else share for name, share in shares.items()},
    )


@contextmanager
def _evaluating(film: FilmModule) -> Iterator[None]:
    """Let a head of someone's own neither draw random numbers nor count: a run that is watched is the run that is not."""
    training = [module for module in film.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def _named(stages: Sequence[int | str] | frozenset[int | str]) -> str:
    numbers = ", ".join(map(str, sorted(stages, key=lambda stage: [int(part) for part in str(stage).split(".")])))
    return f"stage {numbers}" if len(stages) == 1 else f"stages {numbers}"
