"""Images without a file: a random crop is held in memory alone; what comes back in another step is stored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_unet import SmallUNet

from vlmfilm_plugin import attach
from vlmfilm_plugin.encoders.descriptor import DescriptorEncoder
from vlmfilm_plugin.features import recurrence
from vlmfilm_plugin.features.provider import FeatureProvider
from vlmfilm_plugin.features.store.store import FeatureStore
from vlmfilm_plugin.run.batch_strategy import BatchStrategy
from vlmfilm_plugin.run.feature_lookup import FeatureLookup

UNIT = (0.0, 1.0)


class Counting(DescriptorEncoder):
    calls = 0

    def encode(self, images: Sequence[Any]) -> torch.Tensor:
        self.calls += len(images)
        return super().encode(images)


def lookup(folder: Path, **given: Any) -> FeatureLookup:
    return FeatureLookup(FeatureProvider(Counting(), FeatureStore(folder), **given), BatchStrategy("per_sample", "step_interval", 1))


def stored(held: FeatureLookup) -> int:
    return len(held.provider.store.keys(held.provider.encoder.identity))


def crops(seed: int, count: int = 4) -> torch.Tensor:
    return torch.rand(count, 1, 12, 12, generator=torch.Generator().manual_seed(seed))


def step(held: FeatureLookup, number: int, image: torch.Tensor, *, is_train: bool = True) -> torch.Tensor:
    return held.of_batch({"image": image}, image, UNIT, step=number, is_train=is_train).features


def test_random_crops_are_not_stored(tmp_path: Path) -> None:
    held = lookup(tmp_path, memory_items=16)
    for number in range(50):
        step(held, number, crops(number))
    assert stored(held) == 0 and len(held.provider._memory) == 16


def test_a_fixed_data_set_without_files_is_stored_in_its_second_epoch_and_encoded_once(tmp_path: Path) -> None:
    held = lookup(tmp_path)
    first = step(held, 0, crops(0))
    held.provider.encoder.calls = 0  # type: ignore[attr-defined]
    assert stored(held) == 0
    assert torch.equal(step(held, 1, crops(0)), first) and stored(held) == 4
    assert held.provider.encoder.calls == 0  # type: ignore[attr-defined]
    again = lookup(tmp_path, on_missing="error")
    assert torch.equal(step(again, 0, crops(0)), first)


def test_a_data_set_that_memory_does_not_hold_is_stored_all_the_same(tmp_path: Path) -> None:
    held = lookup(tmp_path, memory_items=4)
    for number in range(6):
        step(held, number, crops(number % 3))
    assert stored(held) == 12


def test_two_models_that_ask_for_one_crop_in_one_step_do_not_have_it_stored(tmp_path: Path) -> None:
    held = lookup(tmp_path)
    for number in range(5):
        for _ in range(2):
            step(held, number, crops(number))
    assert stored(held) == 0


def test_what_an_evaluation_sees_is_stored_at_once(tmp_path: Path) -> None:
    held = lookup(tmp_path)
    step(held, 0, crops(0), is_train=False)
    assert stored(held) == 4


def test_what_has_a_file_is_stored_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 12), dtype=np.uint8)).save(path)
    held = lookup(tmp_path / "cache")
    held.of_batch({"image": crops(0, 1), "filepath": [str(path)]}, crops(0, 1), UNIT, step=0, is_train=True)
    assert stored(held) == 1


def test_what_is_remembered_of_crops_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recurrence, "_MOST", 10)
    held = lookup(tmp_path, memory_items=4)
    for number in range(20):
        step(held, number, crops(number))
    assert len(held.provider._recurrence.steps) == 10


def test_given_arrays_in_training_are_stored_once_they_come_back_and_given_paths_at_once(tmp_path: Path) -> None:
    unet = SmallUNet().train()
    handle = attach(unet, encoder="descriptor", cache_dir=str(tmp_path / "cache"), accept_narrow_range=True)
    arrays = [np.random.default_rng(number).integers(0, 256, (12, 12), dtype=np.uint8) for number in range(3)]
    path = tmp_path / "a.png"
    Image.fromarray(arrays[2]).save(path)

    def count() -> int:
        with FeatureStore(tmp_path / "cache") as store:
            return store.count(DescriptorEncoder().identity)

    for images, expected in (([arrays[0]], 0), ([arrays[1]], 0), ([str(path)], 1), ([arrays[0]], 2)):
        with handle.condition(images=images):
            pass
        assert count() == expected
    handle.remove()
