"""Encoders that draw at random, or look at the other images of a call: refused before a feature is stored."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_encoders
import torch
import transformers
from PIL import Image
from torch import Tensor

from vlmfilm_plugin.encoders import hf
from vlmfilm_plugin.encoders.base import EncoderIdentity
from vlmfilm_plugin.encoders.determinism import prove_deterministic
from vlmfilm_plugin.encoders.registry import build_encoder
from vlmfilm_plugin.errors import EncoderError, UnsteadyEncoderError
from vlmfilm_plugin.features.provider import FeatureProvider
from vlmfilm_plugin.features.store.store import FeatureStore
from vlmfilm_plugin.settings.layers import resolve
from vlmfilm_plugin.warmup.encode import _Warmup
from vlmfilm_plugin.warmup.processes import Ranks, WarmupProgress

IMAGES = tiny_encoders.noise([(32, 32), (40, 30), (32, 32)])


class Theirs:
    """A third party's encoder: each image's mean colour, spread over 12 numbers, plus what `add` says about a call."""

    feature_dim, is_loaded = 12, True

    def __init__(self, add: Callable[[Tensor], Tensor]) -> None:
        self.add, self.calls = add, 0
        self.identity = EncoderIdentity({"encoder": "theirs"})

    def encode(self, images: Sequence[Image.Image]) -> Tensor:
        self.calls += 1
        means = torch.stack([torch.from_numpy(np.asarray(image, dtype=np.float32)).mean((0, 1)) for image in images])
        return self.add(means.repeat(1, 4))

    def release(self) -> None: ...


BAD: dict[str, Callable[[Tensor], Tensor]] = {
    "torch's random numbers": lambda x: x + x.norm() * 1e-3 * torch.randn_like(x),
    "numpy's random numbers": lambda x: x * (1 + 0.01 * np.random.random()),
    "python's random numbers": lambda x: x * (1 + 0.01 * random.random()),
    "the batch's mean": lambda x: x - x.mean(0),
    "the batch's norm": lambda x: x / x.norm(),
    "the order of rows": lambda x: x.flip(0),
    "half precision with noise": lambda x: (x * (1 + 0.05 * torch.randn_like(x))).half().float(),
}
GOOD: dict[str, Callable[[Tensor], Tensor]] = {
    "exact": lambda x: x,
    "rounding": lambda x: x * (1 + 1e-6 * torch.randn_like(x)),
    "rounding of half precision": lambda x: (x * (1 + 5e-4 * torch.randn_like(x))).half().float(),
    "zeros": torch.zeros_like,
}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", BAD)
def test_an_unsteady_encoder_is_refused_and_nothing_is_stored(tmp_path: Path, name: str, count: int) -> None:
    provider = FeatureProvider(Theirs(BAD[name]), FeatureStore(tmp_path))
    for _ in range(2):
        with pytest.raises(UnsteadyEncoderError, match="the same image gets different") as caught:
            provider.of_images(IMAGES[:count])
        assert "Theirs" in str(caught.value) and "expected" in caught.value.facts
    assert provider.store.keys(provider.encoder.identity) == []


@pytest.mark.parametrize("name", GOOD)
def test_rounding_is_let_through(tmp_path: Path, name: str) -> None:
    provider = FeatureProvider(Theirs(GOOD[name]), FeatureStore(tmp_path))
    assert provider.of_images(IMAGES).shape == (3, 12)


def test_the_proof_is_made_once(tmp_path: Path) -> None:
    encoder = Theirs(GOOD["exact"])
    provider = FeatureProvider(encoder, FeatureStore(tmp_path))
    provider.of_images(IMAGES[:2])
    first = encoder.calls
    provider.of_images(IMAGES[2:])
    assert encoder.calls == first + 1 and first <= 4


def test_an_encoder_may_say_what_it_computes_in() -> None:
    encoder: Any = Theirs(lambda x: x * (1 + 2e-3 * torch.randn_like(x)))
    with pytest.raises(UnsteadyEncoderError):
        prove_deterministic(encoder, IMAGES, encoder.encode(IMAGES))
    encoder.compute_dtype = torch.bfloat16
    prove_deterministic(encoder, IMAGES, encoder.encode(IMAGES))


def _vit_mae(folder: Path) -> Path:
    transformers.ViTMAEModel(transformers.ViTMAEConfig(**tiny_encoders.VISION)).save_pretrained(folder)
    tiny_encoders.pil_class("ViTImageProcessor")(size=tiny_encoders.SIZE).save_pretrained(folder)
    return folder


def test_vit_mae_is_refused_by_name_and_by_its_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = resolve([("arguments", {"encoder": "hf", "model_name": str(_vit_mae(tmp_path / "mae")), "cache_dir": str(tmp_path / "cache")})])
    with pytest.raises(EncoderError, match="at random"):
        build_encoder(settings)
    monkeypatch.setattr(hf, "_DRAWS_AT_RANDOM", frozenset())
    provider = FeatureProvider.from_settings(settings)
    with pytest.raises(UnsteadyEncoderError):
        provider.of_images(IMAGES)
    assert provider.store.keys(provider.encoder.identity) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_family_passes(tmp_path: Path, dtype: str) -> None:
    for name in ("clip", "dinov2", "convnext", "qwen2_vl", "siglip"):
        folder = tiny_encoders.build(name, tmp_path / name)
        values = {"encoder": "hf", "model_name": str(folder), "cache_dir": str(tmp_path / "cache"), "dtype": dtype}
        FeatureProvider.from_settings(resolve([("arguments", values)])).of_images(IMAGES)


def test_a_warm_up_stops_at_the_encoder_and_blames_no_image(tmp_path: Path) -> None:
    from vlmfilm_plugin.features.images import read_image
    from vlmfilm_plugin.features.samples import Sample

    samples = []
    for number, image in enumerate(IMAGES):
        path = tmp_path / f"{number}.png"
        image.save(path)
        samples.append(Sample(path.name, path, lambda path=path: read_image(path)))  # type: ignore[misc]
    encoder = Theirs(BAD["torch's random numbers"])
    provider = FeatureProvider(encoder, FeatureStore(tmp_path / "cache"))
    with WarmupProgress(Ranks(), 3, False) as progress, pytest.raises(UnsteadyEncoderError):
        _Warmup(provider, 64, 1, progress).run(samples)
    assert encoder.calls <= 5


def test_the_hosts_random_numbers_do_not_move(tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    FeatureProvider(Theirs(lambda x: x + 0 * torch.rand(1)), FeatureStore(tmp_path)).of_images(IMAGES)
    assert torch.equal(torch.rand(1), expected)
