"""FiLM's numbers of logged steps: in the host's own loggers and in `film_stats.jsonl`, right, once, and free on all other steps."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_alarm import Training, table
from torch.utils._python_dispatch import TorchDispatchMode

from vlmfilm_plugin.run.live_metrics import FILE


class Kept:
    """A logger of someone's own."""

    def __init__(self, folder: Path | None = None, *, fails: bool = False) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.log_dir, self.fails = folder, fails

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        if self.fails:
            raise RuntimeError("closed")
        self.rows.append((step, metrics))


class Reads(TorchDispatchMode):
    """Counts what reads the device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default,)
        return func(*args, **(kwargs or {}))


def rows_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / FILE).read_text().splitlines()]


def logged(tmp_path: Path, capsys: pytest.CaptureFixture[str], *loggers: Kept, **settings: Any) -> Training:
    run = Training(tmp_path, capsys, table(0.0), film_log_every_n_steps_train=5, **settings)
    run._trainer = SimpleNamespace(loggers=list(loggers), checkpoint_callbacks=[])  # type: ignore[attr-defined]
    return run


def test_loggers_and_the_file_get_the_same_numbers_on_logged_steps_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "version_0"
    first, second = Kept(folder), Kept()
    logged(tmp_path, capsys, first, second).train(11)
    rows = rows_in(folder)
    assert [row["step"] for row in rows] == [0, 5, 10] == [step for step, _ in first.rows] and first.rows == second.rows
    for row, (_, sent) in zip(rows, first.rows, strict=True):
        for name in ("cond_cos", "stored", "grad_norm"):
            assert sent[f"film/{name}"] == pytest.approx(row[name], abs=1e-7)
        for label in "012":
            assert sent[f"film/stage{label}/gamma_dev"] == pytest.approx(row["stages"][label]["gamma_dev"], abs=1e-7)
        assert set(row["stages"]["0"]) >= {"gamma_dev", "beta_norm", "rel_delta", "gamma_between_images"}
        assert row["film"] == 0 and row["film_mode"] == "on" and row["feature_control"] == "none" and row["phase"] == "train"
    assert rows[0]["stored"] < 1 and rows[2]["stages"]["0"]["gamma_dev"] > 0 == rows[0]["stages"]["0"]["gamma_dev"]


def test_the_gradient_norm_is_that_of_the_update(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, norms = logged(tmp_path, capsys, Kept(tmp_path / "own")), []
    run.optimizer.register_step_pre_hook(
        lambda *_: norms.append(torch.stack([p.grad.square().sum() for p in run.film.heads.parameters() if p.grad is not None]).sum().sqrt().item())
    )
    run.train(6, batches=2)
    assert [row["grad_norm"] for row in rows_in(tmp_path / "own")] == pytest.approx([norms[0], norms[5]], rel=1e-5) and norms[5] > 0


def test_other_steps_read_nothing_more_than_a_run_without_statistics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = {}
    for is_enabled in (False, True):
        run = logged(tmp_path, capsys, Kept(tmp_path / str(is_enabled)), film_debug_enabled=is_enabled).train(6, rows=range(8))
        counts[is_enabled] = []
        for _ in range(6):
            with Reads() as reads:
                run.step(range(8))  # stored: encoding reads, too
            counts[is_enabled].append(reads.count)
    assert counts[True][:4] == counts[False][:4] and counts[True][4] > counts[False][4], "step 10 is logged"


@pytest.mark.parametrize("lines", ["short", "full", "off"])
def test_the_line_is_short_full_or_left_out_and_the_numbers_stay(lines: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = logged(tmp_path, capsys, Kept(tmp_path / "own"), film_debug_lines=lines, feature_control="zero").train(6)
    found = run.lines("[FILM-DBG]")
    assert len(found) == {"short": 2, "full": 6, "off": 0}[lines] and len(rows_in(tmp_path / "own")) == 2
    if lines == "short":
        assert found[1].startswith("[FILM-DBG] train step 5 on feature_control=zero") and "2: gamma" in found[1] and len(found[1]) < 250
    assert rows_in(tmp_path / "own")[0]["feature_control"] == "zero"


def test_without_a_folder_it_is_said_once_and_a_setting_names_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = logged(tmp_path, capsys).train(11)
    assert len(run.lines("[VLM] live metrics: no folder of this run is known: set `film_stats_dir`")) == 1
    logged(tmp_path, capsys, film_stats_dir="stats").train(11)
    assert len(rows_in(tmp_path / "stats")) == 3, "relative to the folder at start"


def test_a_logger_that_refuses_is_said_once_and_ends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = logged(tmp_path, capsys, Kept(tmp_path / "own", fails=True), Kept()).train(11)
    assert len(run.lines("[VLM] live metrics: WARNING: Kept takes no numbers of FiLM: RuntimeError: closed")) == 1
    assert len(rows_in(tmp_path / "own")) == 3


def test_checkpoints_name_the_folder_where_no_logger_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = logged(tmp_path, capsys)
    run._trainer.checkpoint_callbacks.append(SimpleNamespace(dirpath=str(tmp_path / "checkpoints")))  # type: ignore[attr-defined]
    run.train(1)
    assert len(rows_in(tmp_path / "checkpoints")) == 1
