"""`shuffle_donor`: whose feature an image gets, inside a batch and from its data set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_unet import SmallUNet, inputs, randomise

from vlmfilm_plugin.errors import ConditionError, SettingsError
from vlmfilm_plugin.features.provider import FeatureProvider
from vlmfilm_plugin.features.samples import Sample
from vlmfilm_plugin.features.shuffle import Shuffle
from vlmfilm_plugin.features.shuffle_classes import Classes
from vlmfilm_plugin.features.shuffle_donor import DataSets, ShuffleDonors
from vlmfilm_plugin.forward.attach import attach
from vlmfilm_plugin.settings.layers import resolve


def csv_file(folder: Path, text: str) -> Path:
    path = folder / "classes.csv"
    path.write_text(text)
    return path


def rule(folder: Path, text: str = "image,class\na.png,x\nb.png,x\nc.png,y\nd.png,y\n") -> Shuffle:
    file = csv_file(folder, text)
    return Shuffle.from_settings(resolve([("argument", {"shuffle_donor": "other_class", "shuffle_classes_file": str(file)})]))


def test_in_a_batch_every_row_gets_one_of_another_class_and_steps_draw_anew(tmp_path: Path) -> None:
    shuffle, names = rule(tmp_path), ["test:a.png", "b.png", "/data/c.png", "d.png", "test:a.png"]
    images, drawn = ["a", "b", "c", "d", "a"], set()
    for step in range(20):
        rows = shuffle.exchange(images, step, names=names)
        assert rows is not None and all((row in (0, 1, 4)) != (other in (0, 1, 4)) for row, other in enumerate(rows)) and rows[0] == rows[4]
        assert rows == shuffle.exchange(images, step, names=names)
        drawn.add(tuple(rows))
    assert len(drawn) == 2


def test_a_batch_of_one_class_and_an_image_without_one_are_errors(tmp_path: Path) -> None:
    shuffle = rule(tmp_path)
    with pytest.raises(ConditionError, match="no row of the batch is of another class"):
        shuffle.exchange(["a", "b"], 0, names=["a.png", "b.png"])
    with pytest.raises(ConditionError, match="the class of an image is not known"):
        shuffle.exchange(["a", "e"], 0, names=["a.png", "e.png"])
    assert shuffle.exchange(["a", "a"], 0, names=["a.png", "a.png"]) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,x\nb,x\n", "1 class"),
        ("a,x\nb\n", "line 2"),
        ("a,x\nb,y\na,y\n", "line 3"),
        ("", "0 class"),
        ("image,class\n", "0 class"),
        ("a,x\nb, \n", "line 2"),
    ],
)
def test_a_file_that_says_no_classes_is_refused(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=said):
        Classes(str(csv_file(tmp_path, text)), "argument")


def test_other_class_without_a_file_and_an_absent_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="nothing says the classes"):
        Shuffle.from_settings(resolve([("argument", {"shuffle_donor": "other_class"})]))
    with pytest.raises(SettingsError, match="shuffle_classes_file"):
        Classes(str(tmp_path / "absent.csv"), "argument")


def test_a_bare_name_that_stands_for_two_classes_stands_for_none(tmp_path: Path) -> None:
    classes = Classes(str(csv_file(tmp_path, "p/1.png,x\nq/1.png,y\n")), "argument")
    assert classes.of("train:q/1.png") == "y" and classes.of(str(tmp_path / "p" / "1.png")) == "x"
    with pytest.raises(ConditionError):
        classes.of("1.png")


def test_in_a_batch_the_most_distant_gives_its_feature() -> None:
    features = torch.tensor([[0.0, 0.0], [1.0, 0.0], [5.0, 0.0], [-4.0, 0.0]])
    distances = torch.cdist(features, features).tolist()
    assert Shuffle(donor="most_distant").exchange("abcd", 7, distances=lambda: distances) == [2, 3, 3, 2]


def data_set(folder: Path) -> tuple[FeatureProvider, DataSets, list[Sample]]:
    """Return six images of rising brightness, the last two of which have the same bytes."""
    samples = []
    for number, level in enumerate((10, 60, 110, 160, 230, 230)):
        path = folder / f"{number}.png"
        Image.fromarray(np.tile(np.arange(32, dtype=np.uint8) // 2 + level - 8, (32, 1))).save(path)
        samples.append(Sample(f"test:{number}.png", path, lambda path=path: Image.open(path)))  # type: ignore[misc]
    data_sets = DataSets()
    data_sets.learn([(f"{number}.png", str(sample.path)) for number, sample in enumerate(samples)])
    settings = resolve([("argument", {"encoder": "descriptor", "cache_dir": str(folder / "cache")})])
    return FeatureProvider.from_settings(settings), data_sets, samples


@pytest.mark.parametrize("is_listed", [True, False])
def test_from_a_data_set_or_a_store_the_donor_is_of_another_class(is_listed: bool, tmp_path: Path) -> None:
    provider, data_sets, samples = data_set(tmp_path)
    provider.get(samples)
    shuffle = rule(tmp_path, "".join(f"{number}.png,{'low' if number < 3 else 'high'}\n" for number in range(6)))
    donors = ShuffleDonors(provider, shuffle, data_sets if is_listed else DataSets())
    assert not donors.is_within_batch
    for number, sample in enumerate(samples):
        drawn = {donors.donor(sample, step)[0] for step in range(30)}
        assert drawn == {f"test:{other}.png" for other in range(6) if (other < 3) != (number < 3)}


@pytest.mark.parametrize("is_listed", [True, False])
def test_from_a_data_set_or_a_store_the_donor_is_the_most_distant(is_listed: bool, tmp_path: Path) -> None:
    provider, data_sets, samples = data_set(tmp_path)
    features = provider.get(samples).double()
    donors = ShuffleDonors(provider, Shuffle(donor="most_distant"), data_sets if is_listed else DataSets())
    for number, sample in enumerate(samples):
        key, feature = donors.donor(sample, number)
        farthest = float((features - features[number]).norm(dim=1).max())
        assert float((feature.double() - features[number]).norm()) == pytest.approx(farthest) and key != sample.key
        assert donors.donor(sample, 99)[0] == key


def test_by_hand_the_swap_gives_what_the_other_feature_gives(tmp_path: Path) -> None:
    _, _, samples = data_set(tmp_path)
    paths, file = [samples[0].path, samples[4].path], csv_file(tmp_path, "0.png,low\n4.png,high\n")
    unet = SmallUNet()
    kwargs = {"encoder": "descriptor", "cache_dir": str(tmp_path / "cache"), "feature_transform": "none"}
    handle = attach(unet, mode="shuffle", shuffle_donor="other_class", shuffle_classes_file=file, **kwargs)  # type: ignore[arg-type]
    randomise(handle.film)
    with handle.condition(images=paths):
        swapped = unet(*inputs(2))
    with handle.mode("on"), handle.condition(images=paths[::-1]):
        assert torch.equal(swapped, unet(*inputs(2)))
