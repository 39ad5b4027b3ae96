"""Which sample's feature conditions which row, and for how long it is held: the soft-seg port's strategies."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """What a batch is conditioned on: `rows`, one sample of the batch for each row; or, where None, what was held before."""

    rows: Sequence[int] | None


class BatchStrategy:
    """Choose the sample that conditions each row of a batch.

    `per_sample` conditions every row on itself. `first` and `random` condition a whole training batch on one sample of it, and hold
    that feature for `train_interval` steps (`step_interval`) or while the chosen sample stays the same (`image_id`).
    In evaluation every row is conditioned on itself, whatever the strategy: the step stands still there.
    """

    def __init__(self, batch_strategy: str = "per_sample", reuse_policy: str = "step_interval", train_interval: int = 100) -> None:
        self.batch_strategy, self.reuse_policy, self.train_interval = batch_strategy, reuse_policy, train_interval
        self._calls = 0
        self._held_step: int | None = None
        self.held_key: str | None = None

    def choose(self, keys: Sequence[str], step: int | None, is_train: bool) -> Choice:
        """Return the choice for a batch with these cache keys, at this step."""
        if self.batch_strategy == "per_sample" or not is_train:
            return Choice(range(len(keys)))
        self._calls += 1
        row = random.Random(self._calls if step is None else step).randrange(len(keys)) if self.batch_strategy == "random" else 0
        if self._is_held(keys[row], step):
            return Choice(None)
        self._held_step, self.held_key = step, keys[row]
        return Choice([row] * len(keys))

    def _is_held(self, key: str, step: int | None) -> bool:
        if self.reuse_policy == "image_id":
            return self.held_key == key
        return self._held_step is not None and step is not None and 0 <= step - self._held_step < self.train_interval
