"""The learning proof: FiLM from the encoder solves a task that the host alone cannot, and only with the right image's feature."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmfilm_plugin.demo.run import DemoError, run_demo


def prove(folder: Path, seed: int) -> None:
    result = run_demo(folder, seed=seed)
    on, shuffle = result.scores["on"].dice, result.scores["shuffle"].dice
    assert on >= 0.9, result.table()
    assert on - shuffle >= 0.3, result.table()


def test_on_solves_the_task_and_clearly_beats_shuffle(tmp_path: Path) -> None:
    prove(tmp_path / "demo", 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_on_beats_shuffle_over_three_seeds(tmp_path: Path, seed: int) -> None:
    prove(tmp_path / "demo", seed)


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(DemoError, match="folder is in use"):
        run_demo(tmp_path)
