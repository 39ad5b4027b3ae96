"""The demo's host runs plainly by its own scripts, and its dataset hides the cue from it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from processes import forked

from vlmfilm_plugin.demo.dataset import make_dataset
from vlmfilm_plugin.demo.run import HOST, DemoError, copy_host, digest, run_demo

pytest.importorskip("lightning")

SIZE = 16


def tiny_config(root: Path, arch: str, **changes: Any) -> Path:
    """Write a config of a few steps for `arch` and return its path."""
    config = yaml.safe_load((HOST / "configs" / "flow.yaml").read_text(encoding="utf-8"))
    config["output"] = str(root / "runs" / arch)
    config["model"].update(arch_name=arch, image_size=SIZE, patch_plan=[[SIZE // 2, 2]], timesteps=2, model_channels=8, dim=8, unknown_key=1)
    config["model"].update(channel_mult=[1, 1], attn_resolutions=[SIZE // 2])
    config["data"].update({f"{split}_dir": str(root / "data" / split) for split in ("train", "val", "test")}, train_bs=2)
    config["trainer"].update(max_epochs=3, check_val_every_n_epoch=1)
    config.update(changes)
    path = root / f"{arch}.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def run_script(root: Path, script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return forked(root / "host" / "scripts" / script, *arguments, cwd=root)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    copy_host(folder / "host")
    make_dataset(folder / "data", train=4, val=1, test=3, size=SIZE, seed=0)
    return folder


@pytest.mark.parametrize("arch", ["medsegdiff_flow", "medsegdiff_flow_multitask", "medsegdiff"])
def test_host_scripts_train_and_evaluate_without_the_plugin(root: Path, arch: str) -> None:
    before = digest(root / "host")
    trained = run_script(root, "train.py", "--config", tiny_config(root, arch))
    assert trained.returncode == 0, trained.stderr
    checkpoint = root / "runs" / arch / "checkpoints" / "last.ckpt"
    output = root / "results" / arch
    evaluated = run_script(root, "evaluate.py", "--data", "angio", "--models", arch, "--checkpoint", checkpoint, "--output", output)
    assert evaluated.returncode == 0, evaluated.stderr
    metrics = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
    assert set(metrics) == {"dice", "iou"}
    assert all(0.0 <= value <= 1.0 for value in metrics.values())
    assert digest(root / "host") == before


def test_host_refuses_an_unknown_architecture(root: Path) -> None:
    path = tiny_config(root, "no_such_arch", debug=True)
    failed = run_script(root, "train.py", "--config", path)
    assert failed.returncode != 0
    assert "no_such_arch" in failed.stderr


def read_split(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    names = sorted(path.name for path in (folder / "image").glob("*.png"))
    images, labels = (np.stack([np.asarray(Image.open(folder / kind / name)) for name in names]) for kind in ("image", "label"))
    return images.astype(np.float64), labels > 127


def normalised(images: np.ndarray) -> np.ndarray:
    low, high = images.min((1, 2), keepdims=True), images.max((1, 2), keepdims=True)
    return np.asarray((images - low) / (high - low))


def statistics(images: np.ndarray) -> np.ndarray:
    """Return moments and quantiles of each image, (N, F)."""
    flat = images.reshape(len(images), -1)
    return np.column_stack([flat.mean(1), flat.std(1), np.quantile(flat, np.linspace(0, 1, 11), axis=1).T])


def accuracy_of_a_linear_classifier(train: np.ndarray, train_cue: np.ndarray, test: np.ndarray, test_cue: np.ndarray) -> float:
    mean, std = train.mean(0), train.std(0) + 1e-9
    weights = np.linalg.lstsq(np.column_stack([(train - mean) / std, np.ones(len(train))]), np.where(train_cue, 1.0, -1.0), rcond=1e-6)[0]
    return float(((np.column_stack([(test - mean) / std, np.ones(len(test))]) @ weights > 0) == test_cue).mean())


def test_normalisation_removes_the_cue_and_the_raw_file_keeps_it(tmp_path: Path) -> None:
    cues = make_dataset(tmp_path, train=400, val=2, test=400, size=SIZE, seed=3)
    train, test = read_split(tmp_path / "train")[0], read_split(tmp_path / "test")[0]
    train_cue, test_cue = np.array(cues["train"]) == "bright", np.array(cues["test"]) == "bright"
    raw = accuracy_of_a_linear_classifier(statistics(train), train_cue, statistics(test), test_cue)
    seen = accuracy_of_a_linear_classifier(statistics(normalised(train)), train_cue, statistics(normalised(test)), test_cue)
    assert raw == 1.0
    assert abs(seen - 0.5) < 0.1  # four standard deviations of a coin thrown 400 times


def test_the_same_picture_under_both_exposures_is_normalised_to_the_same_bits() -> None:
    from vlmfilm_plugin.demo import dataset

    picture, masks = dataset._draw(np.random.default_rng(0), SIZE)
    exposed = [np.uint8(picture + offset + jitter) for offset in dataset._OFFSETS.values() for jitter in (-dataset._JITTER, dataset._JITTER)]
    assert all(np.array_equal(normalised(image[None].astype(float)), normalised(exposed[0][None].astype(float))) for image in exposed)
    assert not (masks["dark"] & masks["bright"]).any()


def test_every_split_is_balanced_labelled_and_made_again_from_its_seed(tmp_path: Path) -> None:
    cues = make_dataset(tmp_path / "a", train=10, val=4, test=6, size=SIZE, seed=1)
    assert cues == make_dataset(tmp_path / "b", train=10, val=4, test=6, size=SIZE, seed=1)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    for split, values in cues.items():
        assert values.count("bright") == values.count("dark")
        images, labels = read_split(tmp_path / "a" / split)
        assert images.min() > 0 and images.max() < 255
        assert labels.any((1, 2)).all()


def test_demo_refuses_a_folder_in_use(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(DemoError, match="in use"):
        run_demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
