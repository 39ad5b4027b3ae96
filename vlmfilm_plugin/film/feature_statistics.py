"""Statistics of features, for `feature_transform`: made of all images at once or counted image by image, and what they are of.

Values that are never written to. Knows neither the module that uses them nor where features come from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vlmfilm_plugin.errors import CheckpointError, FeatureError
from vlmfilm_plugin.settings.parsing import WITH_STATISTICS

LEAST = 8
"""Different images that a mean which is still being counted must have seen before FiLM acts."""
MOST = 256
"""Different images after which it is frozen."""
SPLITS = ("train", "given")
"""Whose images statistics may be of: those of the training split, or what a caller gave by hand."""
# Of a dimension's mean: a standard deviation below it is rounding.
_CONSTANT = 1e-6


@dataclass(frozen=True)
class Facts:
    """What statistics are of.

    Attributes:
        encoder: fingerprint of the encoder whose features they are of; None where that is not known.
        split: one of `SPLITS`.
        source: in words, for people.
        images: names the set of images, where it is known as a whole.
        count: images; of features that a caller gave, rows.
        width: F.
        is_frozen: False while different images are still being counted.
        counted: what tells the images apart that were counted, while they are.
    """

    encoder: str | None
    split: str
    source: str
    images: str | None = None
    count: int = 0
    width: int = 0
    is_frozen: bool = True
    counted: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return it in the words of a log line."""
        return f"{self.count} images{'' if self.is_frozen else ' so far'}, {self.source}"


@dataclass(frozen=True, eq=False)
class Statistics:
    """Mean (F,) and, for `standardize`, standard deviation (F,) of features: float32 on the CPU; and what they are of."""

    facts: Facts
    mean: Tensor
    std: Tensor | None = None


def made_of(features: Tensor, facts: Facts, steps: Sequence[str]) -> Statistics:
    """Return the statistics of features (N, F) for these steps; `facts` without count and width.

    Raises:
        FeatureError: values that are not finite, fewer than two different images, or, under `standardize`, a dimension in which they are
            all alike.
    """
    x = _before_statistics(_checked(features, features.shape[-1] if features.dim() else 0), steps)
    different = len(set(marks_of(features)))
    if different < 2:
        raise FeatureError(
            "cannot make the statistics of `feature_transform`: the mean of one image is that image",
            {"found": f"{different} different image among {features.shape[0]}", "expected": "two different images or more", "of": facts.source},
            "give features of more images, or set `feature_transform: none`",
        )
    std = x.std(0, correction=0).float() if "standardize" in steps else None
    return _not_constant(Statistics(replace(facts, count=features.shape[0], width=features.shape[1]), x.mean(0).float(), std))


def counted(held: Statistics | None, features: Tensor, facts: Facts, steps: Sequence[str]) -> Statistics | None:
    """Return statistics with the different images among features (N, F) counted in, up to `MOST`; None where all of them were before.

    What is held is rounded to float32 after each image, so that a run which is resumed counts on from the very values.

    Raises:
        FeatureError: as `made_of`, once `LEAST` are counted.
    """
    width = features.shape[-1] if features.dim() else 0
    done = list(held.facts.counted) if held else []
    before = len(done)
    mean = held.mean if held else torch.zeros(width)
    std = held.std if held and held.std is not None else torch.zeros(width)
    for mark, row in zip(marks_of(features), _before_statistics(_checked(features, mean.shape[0]), steps), strict=True):
        if mark in done or len(done) == MOST:
            continue
        done.append(mark)
        old, n = mean.double(), len(done)
        mean = (old + (row - old) / n).float()
        std = ((std.double().square() * (n - 1) + (row - old) * (row - mean.double())) / n).clamp_min(0).sqrt().float()
    if len(done) == before:
        return None
    is_full = len(done) == MOST
    facts = replace(facts, count=len(done), width=width, is_frozen=is_full, counted=() if is_full else tuple(done))
    made = Statistics(facts, mean, std if "standardize" in steps else None)
    return _not_constant(made) if len(done) >= LEAST else made


def marks_of(features: Tensor) -> list[str]:
    """Return what tells the images of rows (N, F) apart, in every process and run; reads the device."""
    rows = features.detach().to("cpu", torch.float32).contiguous().numpy()
    return [hashlib.blake2b(row.tobytes(), digest_size=8).hexdigest() for row in rows]


def _checked(features: Tensor, width: int) -> Tensor:
    """Return features (N, F) as float64 on the CPU."""
    what = "cannot make the statistics of `feature_transform`"
    if features.dim() != 2 or features.shape[1] != width:
        raise FeatureError(
            f"{what}: wrong width or shape", {"got": tuple(features.shape), "expected": f"(N, {width})"}, "give the encoder's features"
        )
    x = features.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(x).all()):
        row = int((~torch.isfinite(x)).any(dim=1).nonzero()[0])
        facts = {"row": row, "found": "NaN or infinite values", "expected": "finite values"}
        raise FeatureError(f"{what}: a feature is not finite", facts, "look at that image")
    return x


def _before_statistics(x: Tensor, steps: Sequence[str]) -> Tensor:
    """Return features (N, F) after the steps before the one that takes statistics."""
    for step in steps:
        if step in WITH_STATISTICS:
            break
        x = nn.functional.normalize(x, dim=1)
    return x


def _not_constant(made: Statistics) -> Statistics:
    if made.std is None or not (alike := (made.std <= _CONSTANT * made.mean.abs()).nonzero().flatten().tolist()):
        return made
    raise FeatureError(
        "cannot standardize features: they are constant in a dimension",
        {
            "found": f"{len(alike)} of {made.facts.width} dimensions, such as {alike[0]}: {float(made.mean[alike[0]]):g} for every image",
            "expected": "values that differ between images in every dimension",
            "of": made.facts,
        },
        "set `feature_transform: center`",
    )


def read_facts(state: Any) -> Facts | None:
    """Read what statistics in a state dict are of; None where it has none.

    Raises:
        CheckpointError: it cannot be understood, or no version writes such.
    """
    what, fix = "cannot use the statistics of `feature_transform` in this checkpoint", "load a checkpoint that this plugin wrote"
    try:
        content = json.loads(bytes(state.cpu().tolist()))
        facts = None if content is None else Facts(**{**content, "counted": tuple(content["counted"])})
    except (AttributeError, TypeError, ValueError, KeyError, RecursionError) as error:
        raise CheckpointError(what, {"error": error, "expected": "what they are of"}, fix) from error
    if facts is not None and not _is_sound(facts):
        expected = f"two images or more, of the split {' or '.join(SPLITS)}, and a width"
        raise CheckpointError(what, {"found": str(content)[:300], "expected": expected}, fix)
    return facts


def _is_sound(facts: Facts) -> bool:
    numbers, texts = (facts.count, facts.width), (facts.encoder, facts.images)
    if not all(isinstance(number, int) and not isinstance(number, bool) for number in numbers) or facts.width < 1:
        return False
    if not all(text is None or isinstance(text, str) for text in texts) or facts.split not in SPLITS or not isinstance(facts.source, str):
        return False
    if not all(isinstance(mark, str) for mark in facts.counted):
        return False
    return facts.count >= 2 if facts.is_frozen is True else facts.is_frozen is False and facts.count == len(facts.counted) >= 1


def check_facts(facts: Facts, fingerprint: str | None, width: int, former: Sequence[str] = ()) -> None:
    """Check that statistics are of the features that FiLM gets.

    Args:
        former: fingerprints that the encoder had in earlier versions.

    Raises:
        CheckpointError: they are of another encoder, or of another width.
    """
    what = "cannot use the statistics of `feature_transform` in this checkpoint"
    if facts.encoder is not None and fingerprint is not None and facts.encoder not in (fingerprint, *former):
        found = {"found": facts.encoder, "expected": fingerprint, "statistics of": facts}
        raise CheckpointError(f"{what}: they are of the features of another encoder", found, "load a checkpoint of this encoder")
    if facts.width != width:
        found = {"found": f"width {facts.width}", "expected": width, "statistics of": facts}
        raise CheckpointError(f"{what}: they are of features of another width", found, "load a checkpoint of this encoder")
