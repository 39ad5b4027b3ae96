"""Which sample conditions which row, and for how long."""

from __future__ import annotations

import pytest

from vlmfilm_plugin.run.batch_strategy import BatchStrategy

KEYS = ["a", "b", "c", "d"]


def rows(strategy: BatchStrategy, keys: list[str], step: int | None, is_train: bool = True) -> list[int] | None:
    chosen = strategy.choose(keys, step, is_train).rows
    return None if chosen is None else list(chosen)


def test_per_sample_conditions_every_row_on_itself_at_every_step() -> None:
    strategy = BatchStrategy()
    assert [rows(strategy, KEYS, step) for step in (0, 0, 1)] == [[0, 1, 2, 3]] * 3


@pytest.mark.parametrize("strategy", ["first", "random", "per_sample"])
@pytest.mark.parametrize("reuse", ["step_interval", "image_id"])
def test_evaluation_conditions_each_image_on_itself_at_a_constant_step(strategy: str, reuse: str) -> None:
    strategy = BatchStrategy(strategy, reuse, 100)
    strategy.choose(KEYS, 7, True)
    assert [rows(strategy, [key], 7, is_train=False) for key in KEYS] == [[0]] * 4
    assert rows(strategy, KEYS, 7, is_train=False) == [0, 1, 2, 3]


def test_first_holds_for_exactly_the_interval() -> None:
    strategy = BatchStrategy("first", "step_interval", 3)
    assert [rows(strategy, KEYS, step) for step in range(7)] == [[0] * 4, None, None, [0] * 4, None, None, [0] * 4]


def test_gradient_accumulation_holds_within_a_step() -> None:
    strategy = BatchStrategy("first", "step_interval", 1)
    assert [rows(strategy, KEYS, step) for step in (0, 0, 1, 1)] == [[0] * 4, None, [0] * 4, None]


def test_a_step_that_goes_back_or_is_unknown_is_never_held() -> None:
    strategy = BatchStrategy("first", "step_interval", 100)
    rows(strategy, KEYS, 50)
    assert rows(strategy, KEYS, 3) == [0] * 4
    assert rows(strategy, KEYS, None) == [0] * 4
    assert rows(strategy, KEYS, None) == [0] * 4


def test_image_id_holds_while_the_first_image_is_the_same() -> None:
    strategy = BatchStrategy("first", "image_id", 100)
    assert rows(strategy, ["a", "b"], 0) == [0, 0]
    assert rows(strategy, ["a", "c"], 1) is None
    assert rows(strategy, ["c", "a"], 2) == [0, 0]
    assert rows(strategy, ["a", "b"], 3) == [0, 0]


def test_evaluation_does_not_disturb_what_training_holds() -> None:
    strategy = BatchStrategy("first", "image_id", 100)
    rows(strategy, ["a"], 0)
    rows(strategy, ["v"], 0, is_train=False)
    assert rows(strategy, ["a"], 1) is None
    assert rows(strategy, ["v"], 2) == [0]


def test_random_is_seeded_by_the_step_alone_and_moves() -> None:
    drawn = [rows(BatchStrategy("random", "step_interval", 1), KEYS, step) for step in range(40)]
    again = [rows(BatchStrategy("random", "step_interval", 1), KEYS, step) for step in range(40)]
    assert drawn == again
    assert all(row is not None and len(set(row)) == 1 and len(row) == 4 for row in drawn)
    assert {row[0] for row in drawn if row} == {0, 1, 2, 3}


def test_random_does_not_touch_the_global_stream() -> None:
    import random

    random.seed(3)
    expected = random.random()
    random.seed(3)
    BatchStrategy("random").choose(KEYS, 5, True)
    assert random.random() == expected
