"""The features of a batch without a UNet or a run: strategy, what is held, and what was counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vlmfilm_plugin.encoders.descriptor import DescriptorEncoder
from vlmfilm_plugin.errors import ConditionError
from vlmfilm_plugin.features.provider import FeatureProvider
from vlmfilm_plugin.features.store.store import FeatureStore
from vlmfilm_plugin.run.batch_strategy import BatchStrategy
from vlmfilm_plugin.run.feature_lookup import FeatureLookup

UNIT = (0.0, 1.0)


def lookup(folder: Path, *strategy: Any) -> FeatureLookup:
    return FeatureLookup(FeatureProvider(DescriptorEncoder(), FeatureStore(folder / "cache")), BatchStrategy(*strategy))


def batch(folder: Path, *names: str) -> tuple[dict[str, Any], torch.Tensor]:
    for number, name in enumerate(names):
        if not (folder / name).exists():
            Image.fromarray(np.full((20, 20), (97 * number + 60 * int(name[0])) % 256, dtype=np.uint8)).save(folder / name)
    return {"filepath": [str(folder / name) for name in names]}, torch.zeros(len(names), 1, 8, 8)


def test_each_sample_gets_its_own_feature_and_the_counts_are_of_this_batch_alone(tmp_path: Path) -> None:
    found = lookup(tmp_path)
    first = found.of_batch(*batch(tmp_path, "1.png", "2.png"), UNIT)
    again = found.of_batch(*batch(tmp_path, "2.png", "1.png"), UNIT)
    assert torch.equal(first.features, again.features[[1, 0]]) and not torch.equal(first.features[0], first.features[1])
    assert (first.cache.total, first.cache.miss, again.cache.total, again.cache.mem_hit) == (2, 2, 2, 2)
    assert first.used == first.samples and first.keys == again.keys[::-1] and not first.is_without_file


def test_a_held_feature_is_that_of_the_step_that_chose_it_and_evaluation_leaves_it_alone(tmp_path: Path) -> None:
    found = lookup(tmp_path, "first", "step_interval", 10)
    first = found.of_batch(*batch(tmp_path, "1.png", "2.png"), UNIT, step=0, is_train=True)
    own = found.of_batch(*batch(tmp_path, "3.png"), UNIT, step=1)
    held = found.of_batch(*batch(tmp_path, "3.png", "2.png", "1.png"), UNIT, step=1, is_train=True)
    assert held.features.shape[0] == 3 and torch.equal(held.features, first.features[:1].expand(3, -1))
    assert {sample.key for sample in held.used} == {first.keys[0]} and own.used == own.samples and held.cache.total == 0


def test_names_of_the_caller_decide_what_counts_as_the_same_image(tmp_path: Path) -> None:
    found = lookup(tmp_path, "first", "image_id", 1)
    crops = torch.rand(2, 1, 1, 8, 8)
    first, second, third = (
        found.of_samples(found.provider.samples_of(None, crops[min(step, 1)], UNIT), step=step, is_train=True, names=[name])
        for step, name in enumerate(("patient", "patient", "another"))
    )
    assert torch.equal(first.features, second.features) and not torch.equal(first.features, third.features)


def test_samples_with_and_without_a_file_are_told(tmp_path: Path) -> None:
    given, image = batch(tmp_path, "1.png", "2.png")
    (tmp_path / "2.png").unlink()
    found = lookup(tmp_path).of_batch(given, image, UNIT)
    assert found.has_mixed_keys and found.is_without_file


def test_nothing_is_held_after_a_step_that_failed(tmp_path: Path) -> None:
    found = lookup(tmp_path, "first", "step_interval", 10)
    given, image = batch(tmp_path, "1.png")
    (tmp_path / "1.png").write_bytes(b"no image")
    with pytest.raises(Exception, match="cannot read image"):
        found.of_batch(given, image, UNIT, step=0, is_train=True)
    with pytest.raises(ConditionError, match="cannot hold"):
        found.of_batch(given, image, UNIT, step=1, is_train=True)
