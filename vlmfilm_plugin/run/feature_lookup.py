"""The features that condition a batch: its samples, the strategy's choice among them, and what the strategy holds over steps.

Used by a host's running batch and by the soft-seg port's interface. Knows neither UNets nor log lines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vlmfilm_plugin.errors import ConditionError
from vlmfilm_plugin.features.provider import FeatureProvider
from vlmfilm_plugin.features.samples import CacheStats, Sample
from vlmfilm_plugin.run.batch_strategy import BatchStrategy

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class BatchFeatures:
    """The features (S, F) of a batch's samples, the sample whose image each came from, and what was counted for them."""

    features: Tensor
    samples: list[Sample]
    used: list[Sample]
    cache: CacheStats

    @property
    def keys(self) -> list[str]:
        """Return the samples' own keys."""
        return [sample.key for sample in self.samples]

    @property
    def is_without_file(self) -> bool:
        """Tell whether a sample has no untouched file, and was encoded as the host passed it."""
        return not all([sample.path for sample in self.samples])  # a list: no Python call a row

    @property
    def has_mixed_keys(self) -> bool:
        """Tell whether some samples have a file and others have none."""
        return len({sample.path is None for sample in self.samples}) > 1


class FeatureLookup:
    """Look up the features of batches; keeps the one feature (1, F) that a strategy holds over training steps."""

    def __init__(self, provider: FeatureProvider, strategy: BatchStrategy) -> None:
        self.provider, self.strategy = provider, strategy
        self.held: tuple[Sample, Tensor] | None = None

    def of_batch(
        self,
        batch: Any,
        image: Tensor,
        value_range: tuple[float, float],
        *,
        step: int | None = None,
        is_train: bool = False,
        files: Mapping[str, Path | None] | None = None,
        loaded: Callable[[], Sequence[Path | None]] | None = None,
        check: Callable[[Sequence[Sample]], None] | None = None,
        is_whole: bool = False,
    ) -> BatchFeatures:
        """Return one feature a sample of a batch: its own in evaluation, what the strategy chooses or holds in training.

        Args:
            batch: the mapping that names the samples.
            image: (S, C, H, W) in `value_range`.
            files: the untouched file behind a name, as the host's data sets know it.
            loaded: returns the file of each row as the row ledger knows it.
            check: is shown the samples before anything is encoded, and may raise.
            is_whole: `image` is neither cropped nor augmented.
        """
        samples = self.provider.samples_of(batch, image, value_range, files, loaded, is_whole=is_whole)
        if check is not None:
            check(samples)
        if is_train:
            self.provider.check_range([sample.path for sample in samples], files)
        return self.of_samples(samples, step=step, is_train=is_train, are_whole=is_whole)

    def of_samples(
        self,
        samples: list[Sample],
        *,
        step: int | None = None,
        is_train: bool = False,
        names: Sequence[str] | None = None,
        are_whole: bool = False,
    ) -> BatchFeatures:
        """Return one feature a sample: its own in evaluation, what the strategy chooses or holds in training.

        Args:
            names: what the strategy tells the samples apart by; their keys where None.
            are_whole: no sample is a random crop, so that each is worth storing at once.
        """
        before = replace(self.provider.stats)
        if is_train:
            self.provider.check_range([sample.path for sample in samples])
        choice = self.strategy.choose(names or [sample.key for sample in samples], step, is_train)
        if choice.rows is None:
            held, feature = self._held()
            features, used = feature.expand(len(samples), -1), [held] * len(samples)
        else:
            used = [samples[row] for row in choice.rows]
            features = self.provider.get(used, is_train=is_train and not are_whole, step=step)
            if is_train and self.strategy.batch_strategy != "per_sample":
                # Without its pixels, which nobody asks for again.
                self.held = replace(used[0], load=_not_kept), features[:1].clone()
        return BatchFeatures(features, samples, used, self.provider.stats.since(before))

    def _held(self) -> tuple[Sample, Tensor]:
        if self.held is None:
            facts = {"held key": self.strategy.held_key, "expected": "a feature that was looked up in an earlier step"}
            raise ConditionError("cannot hold a feature over steps: the step that chose it did not end", facts, "restart the run")
        return self.held


def _not_kept() -> Image:
    raise ConditionError("the pixels of a held image are not kept", {"expected": "its feature alone is held"}, "report this")
