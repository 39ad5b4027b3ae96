"""The descriptor encoder: deterministic, absolute in brightness, and blind to what else is in the call."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from vlmfilm_plugin.encoders.base import Encoder
from vlmfilm_plugin.encoders.descriptor import FEATURE_DIM, DescriptorEncoder, luminance
from vlmfilm_plugin.encoders.registry import build_encoder
from vlmfilm_plugin.settings.layers import resolve


def _noise(seed: int, mean: float = 0.5, size: tuple[int, int] = (64, 64), spread: float = 0.08) -> Image.Image:
    values = np.random.default_rng(seed).normal(mean, spread, size)
    return Image.fromarray((np.clip(values, 0, 1) * 255).astype(np.uint8)).convert("RGB")


def _feature(image: Image.Image) -> torch.Tensor:
    return DescriptorEncoder().encode([image])[0]


def test_it_is_an_encoder_and_the_registry_builds_it() -> None:
    encoder = build_encoder(resolve([("arguments", {"encoder": "descriptor"})]))
    assert isinstance(encoder, DescriptorEncoder) and isinstance(encoder, Encoder)
    assert encoder.identity.facts["encoder"] == "descriptor" and encoder.identity.facts["version"] == 1
    assert encoder.identity.fingerprint == DescriptorEncoder().identity.fingerprint


def test_shape_dtype_and_no_grad() -> None:
    features = DescriptorEncoder().encode([_noise(0), _noise(1, size=(7, 900))])
    assert features.shape == (2, FEATURE_DIM) == (2, DescriptorEncoder().feature_dim)
    assert features.dtype == torch.float32 and not features.requires_grad and features.device.type == "cpu"
    assert DescriptorEncoder().encode([]).shape == (0, FEATURE_DIM)


def test_alone_or_in_a_batch_is_bit_identical() -> None:
    images = [_noise(seed, size=(40 + 17 * seed, 90 - 7 * seed)) for seed in range(6)]
    together = DescriptorEncoder().encode(images)
    for image, row in zip(images, together, strict=True):
        assert torch.equal(_feature(image), row)
    assert torch.equal(DescriptorEncoder().encode(images[::-1]).flip(0), together)


def test_another_process_gives_the_same_bits() -> None:
    code = "from test_descriptor import _noise, _feature; print(_feature(_noise(3)).numpy().tobytes().hex())"
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=Path(__file__).parent,
            env={**os.environ, "OMP_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads in ("1", "2")
    }
    assert seen == {_feature(_noise(3)).numpy().tobytes().hex() + "\n"}


@pytest.mark.parametrize(
    "image",
    [
        Image.new("RGB", (1, 1), (255, 255, 255)),
        Image.new("RGB", (5000, 1)),
        Image.new("RGB", (1, 3000), (9, 9, 9)),
        Image.new("L", (50, 50), 77),
        Image.fromarray((np.indices((200, 200)).sum(0) % 2 * 255).astype(np.uint8)),
        Image.fromarray((np.indices((96, 96))[0] // 2 % 2 * 255).astype(np.uint8)),
        Image.fromarray(np.random.default_rng(0).random((96, 96)) > 0.5),
    ],
)
def test_extreme_images_give_finite_moderate_numbers(image: Image.Image) -> None:
    feature = _feature(image)
    assert torch.isfinite(feature).all() and feature.abs().max() < 20


def test_usual_images_give_numbers_in_about_unit_range() -> None:
    features = DescriptorEncoder().encode([_noise(seed, mean) for seed, mean in enumerate((0.1, 0.35, 0.5, 0.65, 0.9))])
    assert features.abs().max() < 2.5


def test_global_brightness_shows_in_a_third_of_the_numbers() -> None:
    dark, bright = _feature(_noise(0, 0.35)), _feature(_noise(0, 0.65))
    assert ((dark - bright).abs() > 0.3).sum() >= FEATURE_DIM / 3


def test_brightness_is_not_normalised_away_by_contrast() -> None:
    values = np.random.default_rng(0).random((96, 96))
    full, half = (Image.fromarray((values * scale).astype(np.uint8)) for scale in (255, 127))
    assert (_feature(full) - _feature(half)).abs().mean() > 0.2


def test_two_valued_background_is_separable_after_projection_and_layernorm() -> None:
    labels = torch.arange(40) % 2
    features = DescriptorEncoder().encode([_noise(100 + i, (0.35, 0.65)[int(label)]) for i, label in enumerate(labels)])
    torch.manual_seed(0)
    conditions = nn.LayerNorm(16)(nn.Linear(FEATURE_DIM, 16)(features)).detach()
    ones = torch.ones(20, 1)
    solution = torch.linalg.lstsq(torch.cat([conditions[:20], ones], 1), labels[:20].float()[:, None] * 2 - 1).solution
    scores = torch.cat([conditions[20:], ones], 1) @ solution
    assert torch.equal((scores[:, 0] > 0).long(), labels[20:])
    assert scores.abs().min() > 0.5


def test_dark_and_bright_ridges_are_told_apart() -> None:
    plane = np.full((96, 96), 128, dtype=np.uint8)
    dark, bright = plane.copy(), plane.copy()
    dark[:, 46:49], bright[:, 46:49] = 60, 196
    dark_numbers, bright_numbers = (_feature(Image.fromarray(p))[-18:].reshape(3, 2, 3) for p in (dark, bright))
    assert (dark_numbers[0, 0] > dark_numbers[0, 1]).any() and (bright_numbers[0, 1] > bright_numbers[0, 0]).any()
    torch.testing.assert_close(dark_numbers[:, 0], bright_numbers[:, 1], atol=1e-5, rtol=1e-4)


def test_orientation_of_edges_is_seen() -> None:
    stripes = (np.indices((96, 96))[0] // 8 % 2 * 255).astype(np.uint8)
    assert (_feature(Image.fromarray(stripes)) - _feature(Image.fromarray(stripes.T.copy()))).abs().max() > 1


@pytest.mark.parametrize("size", [(96, 96), (192, 288), (64, 50), (500, 3), (97, 95)])
def test_resampling_keeps_the_mean_at_any_size(size: tuple[int, int]) -> None:
    values = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    plane = luminance(Image.fromarray(values))
    assert plane.shape == (96, 96) and plane.mean() == pytest.approx(values.mean() / 255, abs=1e-9)


def test_resampling_of_an_exact_multiple_is_the_block_mean() -> None:
    values = np.random.default_rng(0).integers(0, 256, (192, 288), dtype=np.uint8)
    blocks = values.reshape(96, 2, 96, 3).mean(axis=(1, 3)) / 255
    np.testing.assert_allclose(luminance(Image.fromarray(values)), blocks, atol=1e-12)


def test_features_made_under_inference_mode_can_train_a_projection() -> None:
    with torch.inference_mode():
        features = DescriptorEncoder().encode([_noise(0)])
    nn.Linear(FEATURE_DIM, 4)(features).sum().backward()


def test_release_changes_nothing_and_there_are_no_weights() -> None:
    encoder = DescriptorEncoder()
    before = encoder.encode([_noise(0)])
    encoder.release()
    assert not encoder.is_loaded and torch.equal(before, encoder.encode([_noise(0)]))
    assert torch.equal(before, copy.deepcopy(encoder).encode([_noise(0)]))
