"""Donors of images that are alone in their batch: from the same split, whatever is stored, and found under the keys of a run."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from processes import environment
from small_unet import SmallUNet, inputs

from vlmfilm_plugin import ConditionError, SettingsError, StoreError, attach
from vlmfilm_plugin.features.provider import FeatureProvider
from vlmfilm_plugin.features.samples import Sample
from vlmfilm_plugin.features.shuffle import Shuffle
from vlmfilm_plugin.features.shuffle_donor import DataSets, ShuffleDonors, split_prefix
from vlmfilm_plugin.features.shuffle_pairs import PairsFile
from vlmfilm_plugin.host_spec import UNet
from vlmfilm_plugin.run.runtime import Runtime
from vlmfilm_plugin.settings.layers import resolve

IMAGE = torch.zeros(1, 1, 8, 8)
SPEC = UNet(cls=SmallUNet, targets={"post_block2": "ups.*.1"})


def write(path: Path, value: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((12, 12), value, dtype=np.uint8)).save(path)
    return path


def provider(cache: Path, **values: object) -> FeatureProvider:
    return FeatureProvider.from_settings(resolve([("arguments", {"encoder": "descriptor", "cache_dir": str(cache), **values})]))


def data_set(root: Path, split: str, count: int = 6) -> dict[str, Path]:
    base = {"train": 3, "test": 100}[split]
    return {f"{split}/image/{i}.png": write(root / split / "image" / f"{i}.png", base + 26 * i) for i in range(count)}


def known(*sets: dict[str, Path]) -> DataSets:
    result = DataSets()
    for files in sets:
        result.learn((name, str(path)) for name, path in files.items())
    return result


def sample(features: FeatureProvider, name: str, path: Path, split: str | None = None) -> Sample:
    batch: dict[str, Any] = {"image": IMAGE, "name": [name], "filepath": [str(path)]}
    if split is not None:
        batch["split"] = split
    return features.samples_of(batch, IMAGE, (0.0, 1.0))[0]


def draws(features: FeatureProvider, files: dict[str, Path], sets: DataSets, step: int = 0, split: str | None = None, seed: int = 0) -> list[str]:
    donors = ShuffleDonors(features, Shuffle(seed), sets)
    return [donors.donor(sample(features, name, path, split), step)[0] for name, path in files.items()]


# Known data sets


def test_the_pairing_is_the_same_in_every_folder_and_whatever_is_stored(tmp_path: Path) -> None:
    found = []
    for place, is_warm in (("a", False), ("b/c/d", True)):
        train, test = data_set(tmp_path / place, "train"), data_set(tmp_path / place, "test")
        features = provider(tmp_path / place / "cache")
        if is_warm:
            for name, path in reversed([*train.items(), *test.items()]):
                features.get([sample(features, name, path)])
        sets = known(train, test) if is_warm else known(test, test, train)
        found.append([draws(features, test, sets, step) for step in range(4)])
    assert found[0] == found[1]
    assert all(sorted(pairing) == sorted(f"unknown:{name}" for name in test) for pairing in found[0])
    assert len({tuple(pairing) for pairing in found[0]}) > 1


def test_the_seed_is_settable(tmp_path: Path) -> None:
    test = data_set(tmp_path, "test")
    features = provider(tmp_path / "cache")
    assert len({tuple(draws(features, test, known(test), seed=seed)) for seed in range(6)}) > 3


@pytest.mark.parametrize("split", [None, "test"])
def test_a_donors_feature_is_found_under_the_key_of_a_run(split: str | None, tmp_path: Path) -> None:
    test = data_set(tmp_path, "test")
    warm = provider(tmp_path / "cache")
    for name, path in test.items():
        warm.get([sample(warm, name, path, split)])
    features = provider(tmp_path / "cache", on_missing_feature="error")
    keys = draws(features, test, known(test), split=split)
    assert sorted(keys) == sorted(f"{split or 'unknown'}:{name}" for name in test)


def test_a_host_whose_batches_have_paths_alone_finds_donors_by_file(tmp_path: Path) -> None:
    test = data_set(tmp_path, "test")
    warm = provider(tmp_path / "cache", dataset_root=str(tmp_path))

    def by_path(features: FeatureProvider, path: Path) -> Sample:
        return features.samples_of({"image": IMAGE, "filepath": [str(path)], "split": "test"}, IMAGE, (0.0, 1.0))[0]

    for path in test.values():
        warm.get([by_path(warm, path)])
    features = provider(tmp_path / "cache", dataset_root=str(tmp_path), on_missing_feature="error")
    # The data set calls its images by another name than the batches do.
    donors = ShuffleDonors(features, Shuffle(), known({f"case {name}": path for name, path in test.items()}))
    key, _ = donors.donor(by_path(features, test["test/image/0.png"]), 0)
    assert key.startswith("test:test/image/") and not key.endswith("/0.png")


def test_two_data_sets_of_the_same_names_keep_to_themselves(tmp_path: Path) -> None:
    a, b = data_set(tmp_path / "xca", "test"), data_set(tmp_path / "octa", "test", 4)
    features = provider(tmp_path / "cache")
    donors = ShuffleDonors(features, Shuffle(), known(a, b))
    for name, path in b.items():
        drawn = donors.donor(sample(features, name, path), 1)
        expected = {tuple(features.get([sample(features, name, other)])[0].tolist()) for other in b.values()}
        assert tuple(drawn[1].tolist()) in expected


def test_a_copy_under_another_name_is_no_donor(tmp_path: Path) -> None:
    files = {f"test/{name}.png": write(tmp_path / f"{name}.png", value) for name, value in (("a", 10), ("b", 10), ("c", 200))}
    features = provider(tmp_path / "cache")
    for step in range(6):
        found = draws(features, files, known(files), step)
        assert found[:2] == ["unknown:test/c.png"] * 2 and found[2] in ("unknown:test/a.png", "unknown:test/b.png")
    twins = {name: path for name, path in files.items() if "c" not in name}
    with pytest.raises(ConditionError, match="no other image of its split"):
        draws(features, twins, known(twins))


def test_a_split_of_one_image_does_not_borrow_from_another(tmp_path: Path) -> None:
    train, test = data_set(tmp_path, "train"), data_set(tmp_path, "test", 1)
    with pytest.raises(ConditionError, match="no other image of its split"):
        draws(provider(tmp_path / "cache"), test, known(train, test))


def test_a_name_that_stands_for_two_files_of_a_data_set_still_has_donors(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{i}" / "x.png", 40 * i) for i in range(3)]
    sets = DataSets()
    sets.learn(("x.png", str(path)) for path in paths)
    features = provider(tmp_path / "cache")
    donors = ShuffleDonors(features, Shuffle(), sets)
    own = features.samples_of({"image": IMAGE, "filepath": [str(paths[0])]}, IMAGE, (0.0, 1.0))[0]
    assert donors.donor(own, 0)[0] in {f"unknown:{path}" for path in paths[1:]}


# From the store


@pytest.mark.parametrize(
    ("key", "prefix"),
    [
        ("test:images/1.png", "test:"),
        ("unknown:test/image/1.png", "unknown:test/"),
        ("unknown:/data/train/xca/Test/p1/1.png", "unknown:/data/train/xca/Test/"),
        ("unknown:p1/1.png", "unknown:"),
        ("unknown:test", "unknown:"),
        ("val:fp-00", "val:"),
    ],
)
def test_the_split_of_a_key(key: str, prefix: str) -> None:
    assert split_prefix(key) == prefix


def test_stored_training_images_are_no_donors_of_test_images(tmp_path: Path) -> None:
    train, test = data_set(tmp_path, "train"), data_set(tmp_path, "test", 3)
    features = provider(tmp_path / "cache")
    for name, path in [*train.items(), *test.items()]:
        features.get([sample(features, name, path)])
    for step in range(5):
        found = draws(features, test, DataSets(), step)
        assert sorted(found) == sorted(f"unknown:{name}" for name in test)
        assert all(not key.endswith(name) for key, name in zip(found, test, strict=True))


def test_the_order_of_a_store_shapes_no_draw(tmp_path: Path) -> None:
    test, found = data_set(tmp_path, "test"), []
    for order in (1, -1):
        features = provider(tmp_path / f"cache{order}")
        for name, path in list(test.items())[::order]:
            features.get([sample(features, name, path)])
        found.append(draws(features, test, DataSets(), 3))
    assert found[0] == found[1]


def test_a_first_image_without_donors_is_refused_and_a_later_one_is_served(tmp_path: Path) -> None:
    test = data_set(tmp_path, "test", 2)
    features = provider(tmp_path / "cache")
    donors = ShuffleDonors(features, Shuffle(), DataSets())
    samples = [sample(features, name, path) for name, path in test.items()]
    features.get(samples[:1])
    with pytest.raises(ConditionError, match="fix: "):
        donors.donor(samples[0], 0)
    features.get(samples[1:])
    assert donors.donor(samples[0], 0)[0] == samples[1].key


# In a run


def runtime(tmp_path: Path, **variables: object) -> Runtime:
    environ = {"VLM_FILM_ENCODER": "descriptor", "VLM_FILM_CACHE_DIR": "cache", "VLM_FILM_COND_DIM": "4", "VLM_FILM_FEATURE_TRANSFORM": "none"}
    return Runtime("shuffle", environ | {f"VLM_FILM_{name.upper()}": str(value) for name, value in variables.items()}, str(tmp_path))


def step_of(run: Runtime, unet: torch.nn.Module, files: dict[str, Path], step: int, phase: str = "test", batch_idx: int = 0) -> None:
    batch = {"image": torch.zeros(len(files), 1, 8, 8), "name": list(files), "filepath": [str(path) for path in files.values()]}
    with torch.no_grad(), run.batch(batch, phase=phase, value_range=(0.0, 1.0), step=step, batch_idx=batch_idx):
        unet(*inputs(len(files)))


def test_a_run_writes_every_pair(tmp_path: Path) -> None:
    test = data_set(tmp_path, "test", 4)
    run = runtime(tmp_path, shuffle_pairs_file="pairs.csv", shuffle_seed=3)
    run.learn_image_files((name, str(path)) for name, path in test.items())
    unet = SmallUNet()
    run.attach(unet, SPEC)
    step_of(run, unet, test, 7, "train")
    # Where in the evaluation an image comes says nothing of its donor.
    for place, name in enumerate(reversed(test)):
        step_of(run, unet, {name: test[name]}, 7, batch_idx=place)
    rows = [tuple(line.split(",")) for line in (tmp_path / "pairs.csv").read_text().splitlines()]
    keys = [f"unknown:{name}" for name in test]
    permutation = Shuffle(3).derangement(4, 7)
    assert rows[:4] == [(key, keys[other], "7") for key, other in zip(keys, permutation, strict=True)]
    alone = dict(zip(keys, draws(provider(tmp_path / "cache"), test, known(test), 7, seed=3), strict=True))
    assert rows[4:] == [(key, alone[key], "7") for key in reversed(keys)]


def test_two_names_of_one_image_do_not_exchange_with_each_other(tmp_path: Path) -> None:
    files = {name: write(tmp_path / name, value) for name, value in (("a.png", 10), ("copy.png", 10), ("b.png", 200), ("c.png", 90))}
    run = runtime(tmp_path, shuffle_pairs_file="pairs.csv")
    unet = SmallUNet()
    run.attach(unet, SPEC)
    for step in range(6):
        step_of(run, unet, files, step)
    pairs = [set(line.split(",")[:2]) for line in (tmp_path / "pairs.csv").read_text().splitlines()]
    assert len(pairs) == 24
    assert {"unknown:a.png", "unknown:copy.png"} not in pairs and all(len(pair) == 2 for pair in pairs)


def test_given_features_are_exchanged_by_the_same_rule_and_written_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM_FILM_MODE", "shuffle")
    handle = attach(SmallUNet(), feature_dim=3, shuffle_seed=5, shuffle_pairs_file=str(tmp_path / "pairs.csv"))
    with torch.no_grad(), handle.condition(torch.randn(6, 3), step=2):
        handle.unet(*inputs(6))
        handle.unet(*inputs(6))
    rows = [line.split(",") for line in (tmp_path / "pairs.csv").read_text().splitlines()]
    assert [[f"row {row}", f"row {other}", "2"] for row, other in enumerate(Shuffle(5).derangement(6, 2))] == rows


@pytest.mark.parametrize("bad", [{"shuffle_seed": -1}, {"shuffle_seed": "x"}, {"shuffle_seed": None}])
def test_a_bad_seed_is_a_settings_error(bad: dict[str, object]) -> None:
    with pytest.raises(SettingsError, match="shuffle_seed"):
        resolve([("argument", bad)])


# The file of pairs


def test_pairs_are_appended_and_odd_names_are_read_back(tmp_path: Path) -> None:
    import csv

    path = tmp_path / "pairs.csv"
    odd = [('a,"b', "ü"), ("line", "x\ny")]
    PairsFile(str(path)).write(odd, 1)
    PairsFile(str(path)).write([("a", "b")], 2)
    with path.open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [*[[*pair, "1"] for pair in odd], ["a", "b", "2"]]


def test_other_ranks_write_no_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    PairsFile(str(tmp_path / "pairs.csv")).write([("a", "b")], 1)
    assert not (tmp_path / "pairs.csv").exists()


def test_a_file_of_pairs_that_cannot_be_written_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"fix: +correct `shuffle_pairs_file`"):
        PairsFile(str(tmp_path / "no" / "pairs.csv")).write([("a", "b")], 1)


def test_a_killed_run_loses_no_pair(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    code = f"""
import os, signal
from vlmfilm_plugin.features.shuffle_pairs import PairsFile
pairs = PairsFile({str(path)!r})
for step in range(50):
    pairs.write([(f"image {{row}}", f"donor {{row}}") for row in range(8)], step)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), check=False)
    assert done.returncode == -signal.SIGKILL
    rows = path.read_text().splitlines()
    assert len(rows) == 400 and rows[-1] == "image 7,donor 7,49"
