"""What the heads of a stage make of different images, and when that is nothing: the rule of the alarm, without its steps and words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmfilm_plugin.film.statistics import share_at_bound, spread_between_images

SAME = 1e-6
"""Of the largest gamma and beta: where the spread between images is below it in every channel, they are the same for every image.

In float32 it is a few roundings of gamma, which is 1 and something; no run that was measured came back from it within 100 steps.
"""
FAINT = 1e-3
"""Of how far gamma and beta are from the identity at most: a spread (root mean square over channels) below it that lasts reaches nothing.

`SAME` alone is too strict for the runs that it is about: tanh comes close to its bound and does not always round to it. Measured with a net of
three stages, 384 features and default bounds (learning rates 1e-3 and 5e-3, seeds 0 to 2, at steps 25, 50 and 100, the lowest stage of each run):
features of cosine 0.97 as given: 1.9e-4 to 1.4e-3, then 0 to 4.3e-4, then 0 to 1.5e-4, of which five never learnt and one did after step 200;
cosines of 0.60 to 0.88, runs that did not learn: 0 to 1.4e-3, then 0 to 9.5e-4, then 0 to 6.2e-4. Centred, all of which learnt: 0.32 to 0.83 at
every step, with 80 to 90 % of entries at their bound.
"""
LASTING = 25
"""Training steps that a faint spread must last: a run that learnt (cosine 0.88) had 5e-4 at step 50 in one stage, and 0.66 at step 100."""
# Up to here gamma's rounding, 1.2e-7, is no small part of its distance from the identity: heads whose beta is none have not moved.
_MOVED = {"gamma": 1e-4, "beta": 0.0}
_WHAT = ("spread", "most", "moved", "scale", "at_bound")
NUMBERS = tuple((name, what) for name in _MOVED for what in _WHAT)
"""What is read of a stage, in this order."""


@dataclass(frozen=True)
class StageVerdict:
    """What the heads of a stage make of different images; each by `gamma` and `beta`, in their own unit.

    Attributes:
        spread: root mean square over channels of the spread between images.
        most: the largest spread of a channel.
        moved: how far an entry is from the identity at most.
        scale: the largest entry.
        at_bound: share of entries at their bounds; None where there is none.
    """

    spread: Mapping[str, float]
    most: Mapping[str, float]
    moved: Mapping[str, float]
    scale: Mapping[str, float]
    at_bound: Mapping[str, float | None]

    @property
    def is_same(self) -> bool:
        """Tell whether gamma and beta have left the identity, and are the same for every image."""
        return self._is_judged and all(self.most[name] <= SAME * self.scale[name] for name in _MOVED)

    @property
    def is_faint(self) -> bool:
        """Tell whether gamma and beta have left the identity, and what differs between images is nearly nothing of it."""
        return self.is_same or (self._is_judged and all(self.spread[name] <= FAINT * self.moved[name] for name in _MOVED))

    @property
    def _is_judged(self) -> bool:
        # A diverged head is another fault, which every loss shows.
        is_finite = all(map(math.isfinite, (*self.most.values(), *self.moved.values())))
        return is_finite and any(self.moved[name] > least for name, least in _MOVED.items())

    @property
    def relative_spread(self) -> float:
        """Return the larger one of gamma's and beta's spread, of their distance from the identity."""
        return max(self.spread[name] / max(self.moved[name], 1e-30) for name in _MOVED)

    def fields(self) -> dict[str, Any]:
        """Return it as fields of a `[FILM-DBG]` line."""
        spread = {f"{name}_between_images": value for name, value in self.spread.items()}
        return spread | {f"{name}_at_bound": value for name, value in self.at_bound.items()}


def numbers_of(head: nn.Module, cond_vec: Tensor) -> Iterator[Tensor]:
    """Yield `NUMBERS` of a head for cond_vec (images, D), as scalars on the device; NaN stands for what does not exist."""
    pair: Mapping[str, Tensor] = dict(zip(_MOVED, head(cond_vec), strict=True))
    for name, values in pair.items():
        centre, spread = float(name == "gamma"), spread_between_images(values)
        # A head of someone's own need not have bounds, whatever the settings say.
        bound = getattr(head, f"{name}_scale", None)
        share = share_at_bound(values, centre, bound if isinstance(bound, int | float) else None)
        yield from (spread.square().mean().sqrt(), spread.max(), (values.float() - centre).abs().max(), values.float().abs().max())
        yield cond_vec.new_full((), math.nan, dtype=torch.float32) if share is None else share


def verdict_of(values: Sequence[float]) -> StageVerdict:
    """Return the verdict of a stage whose `NUMBERS` were read."""
    read = dict(zip(NUMBERS, values, strict=True))
    spread, most, moved, scale, shares = ({name: read[name, what] for name in _MOVED} for what in _WHAT)
    return StageVerdict(spread, most, moved, scale, {name: None if math.isnan(share) else share for name, share in shares.items()})
