"""Data sets whose images would reach an encoder nearly black: stopped before anything is stored or trained, unless accepted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_unet import SmallUNet, inputs

from vlmfilm_plugin import attach
from vlmfilm_plugin.errors import NarrowRangeError
from vlmfilm_plugin.features.provider import FeatureProvider
from vlmfilm_plugin.features.value_range import refuse_narrow_range
from vlmfilm_plugin.run.batch_strategy import BatchStrategy
from vlmfilm_plugin.run.feature_lookup import FeatureLookup
from vlmfilm_plugin.settings.layers import resolve
from vlmfilm_plugin.warmup.encode import warm_up

Draw = Callable[[np.random.Generator], np.ndarray[Any, Any]]


def twelve_bit(rng: np.random.Generator) -> np.ndarray[Any, Any]:
    return rng.integers(0, 4096, (12, 12)).astype(np.uint16)


def sixteen_bit(rng: np.random.Generator) -> np.ndarray[Any, Any]:
    return rng.integers(0, 65536, (12, 12)).astype(np.uint16)


def eight_bit(low: int, high: int) -> Draw:
    return lambda rng: rng.integers(low, high, (12, 12)).astype(np.uint8)


def written(folder: Path, count: int, draw: Draw, suffix: str = "png", start: int = 0) -> list[Path]:
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{number:03}.{suffix}" for number in range(start, start + count)]
    for number, path in enumerate(paths):
        Image.fromarray(draw(np.random.default_rng(number + start))).save(path)
    return paths


@pytest.mark.parametrize(("draw", "suffix"), [(twelve_bit, "png"), (twelve_bit, "tif"), (eight_bit(0, 60), "png"), (eight_bit(200, 255), "bmp")])
@pytest.mark.parametrize("count", [1, 3, 100])
def test_a_narrow_set_is_refused_with_its_figures(tmp_path: Path, draw: Draw, suffix: str, count: int) -> None:
    with pytest.raises(NarrowRangeError, match="accept_narrow_range") as caught:
        refuse_narrow_range(written(tmp_path / "images", count, draw, suffix))
    assert ("65535" if draw is twelve_bit else "255") in str(caught.value.facts["found"]) and "%" in str(caught.value.facts["found"])


def test_a_wide_set_with_dark_images_is_fine_whatever_their_place(tmp_path: Path) -> None:
    wide = written(tmp_path / "images", 40, eight_bit(0, 256))
    refuse_narrow_range(wide)
    refuse_narrow_range([*wide, *written(tmp_path / "images", 20, eight_bit(0, 9), start=40)])
    refuse_narrow_range(written(tmp_path / "dark_first", 7, eight_bit(0, 9)) + written(tmp_path / "dark_first", 60, sixteen_bit, start=7))
    refuse_narrow_range(written(tmp_path / "flat", 9, lambda rng: np.full((9, 9), rng.integers(0, 256), dtype=np.uint8)))
    refuse_narrow_range([tmp_path / "not there.png", *wide])


def test_one_odd_image_does_not_make_a_narrow_set_wide(tmp_path: Path) -> None:
    narrow = written(tmp_path / "images", 40, twelve_bit)
    with pytest.raises(NarrowRangeError):
        refuse_narrow_range([*narrow, *written(tmp_path / "images", 2, sixteen_bit, start=40)])
    with pytest.raises(NarrowRangeError):
        refuse_narrow_range([*narrow, *written(tmp_path / "images", 2, eight_bit(0, 256), start=42)])


def provider(cache: Path, **values: object) -> FeatureProvider:
    return FeatureProvider.from_settings(resolve([("arguments", {"encoder": "descriptor", "cache_dir": str(cache), **values})]))


def test_warm_up_stops_before_it_stores_anything_unless_accepted(tmp_path: Path) -> None:
    written(tmp_path / "images", 5, twelve_bit)
    settings = {"encoder": "descriptor", "cache_dir": str(tmp_path / "cache")}
    with pytest.raises(NarrowRangeError):
        warm_up(tmp_path / "images", (), settings, show_progress=False)
    assert provider(tmp_path / "cache").store.keys(provider(tmp_path / "cache").encoder.identity) == []
    assert warm_up(tmp_path / "images", (), {**settings, "accept_narrow_range": True}, show_progress=False).encoded == 5


def look_up(lookup: FeatureLookup, paths: list[Path], *, is_train: bool) -> Any:
    batch = {"image": torch.zeros(len(paths), 1, 8, 8), "filepath": [str(path) for path in paths]}
    return lookup.of_batch(batch, batch["image"], (0.0, 1.0), step=0, is_train=is_train, files={})


def test_training_stops_at_its_first_look_up_and_evaluation_goes_on(tmp_path: Path) -> None:
    paths = written(tmp_path / "images", 5, twelve_bit)
    strategy = BatchStrategy("per_sample", "step_interval", 1)
    lookup = FeatureLookup(provider(tmp_path / "cache"), strategy)
    look_up(lookup, paths[:2], is_train=False)
    for _ in range(2):  # caught once is not accepted
        with pytest.raises(NarrowRangeError):
            look_up(lookup, paths[:2], is_train=True)
    look_up(FeatureLookup(provider(tmp_path / "cache", accept_narrow_range=True), strategy), paths[:2], is_train=True)


def test_a_dark_first_batch_of_a_wide_set_trains(tmp_path: Path) -> None:
    dark = written(tmp_path / "images", 1, eight_bit(0, 9))
    written(tmp_path / "images", 20, eight_bit(0, 256), start=1)
    look_up(FeatureLookup(provider(tmp_path / "cache"), BatchStrategy("per_sample", "step_interval", 1)), dark, is_train=True)


def test_attach_by_hand_stops_in_training_alone(tmp_path: Path) -> None:
    paths = written(tmp_path / "images", 2, twelve_bit)
    unet = SmallUNet()
    handle = attach(unet, encoder="descriptor", cache_dir=str(tmp_path / "cache"))
    arguments = inputs(2)
    with pytest.raises(NarrowRangeError), handle.condition(images=paths):
        unet(*arguments)
    unet.eval()
    with torch.no_grad(), handle.condition(images=paths):
        unet(*arguments)
