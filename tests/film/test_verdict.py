"""When the heads of a stage make nothing of different images: values set by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from vlmfilm_plugin.film.verdict import FAINT, SAME, StageVerdict, numbers_of, verdict_of


class Fixed(nn.Module):
    """A head that gives these values, whatever it is asked."""

    def __init__(self, gamma: Tensor, beta: Tensor) -> None:
        super().__init__()
        self.pair = gamma[:, :, None, None], beta[:, :, None, None]

    def forward(self, cond_vec: Tensor) -> tuple[Tensor, Tensor]:
        return self.pair


def judged(gamma: Tensor, beta: Tensor) -> StageVerdict:
    return verdict_of(torch.stack(list(numbers_of(Fixed(gamma, beta), torch.zeros(len(gamma), 1)))).tolist())


def off_identity(distance: float, own: float, images: int = 8, channels: int = 16) -> tuple[Tensor, Tensor]:
    """Return gamma and beta that all images share at a distance from the identity, and the share of it that is an image's own."""
    g = torch.Generator().manual_seed(0)
    pair = (distance * (1 + own * torch.randn(images, channels, generator=g, dtype=torch.float64)) for _ in range(2))
    gamma, beta = pair
    return (1 + gamma).float(), beta.float()


@pytest.mark.parametrize("distance", [1e-12, 1e-8, 1e-5, 1e-3, 0.1, 50.0])
def test_values_that_are_the_same_for_all_images_are_dead_at_any_distance_from_the_identity(distance: float) -> None:
    assert judged(*off_identity(distance, 0.0)).is_same
    assert judged(*off_identity(distance, 0.1 * SAME)).is_same


@pytest.mark.parametrize("distance", [1e-12, 1e-8, 1e-5, 1e-3, 0.1, 50.0])
def test_values_that_differ_are_alive_at_any_distance_from_the_identity(distance: float) -> None:
    verdict = judged(*off_identity(distance, 0.1))
    assert not verdict.is_same and not verdict.is_faint


def test_one_channel_that_differs_is_not_the_same() -> None:
    gamma, beta = off_identity(0.1, 0.0, channels=512)
    beta[0, 7] += 3e-5
    verdict = judged(gamma, beta)
    assert not verdict.is_same and verdict.is_faint


def test_a_spread_that_is_nearly_nothing_of_the_distance_is_faint_and_not_yet_the_same() -> None:
    assert judged(*off_identity(0.1, 0.3 * FAINT)).is_faint and not judged(*off_identity(0.1, 0.3 * FAINT)).is_same
    assert not judged(*off_identity(0.1, 30 * FAINT)).is_faint


@pytest.mark.parametrize("which", [0, 1])
def test_one_of_gamma_and_beta_is_enough_to_reach_the_decoder(which: int) -> None:
    pair = [off_identity(0.1, own)[place] for place, own in enumerate([0.5, 0.0] if which == 0 else [0.0, 0.5])]
    assert not judged(*pair).is_faint


def test_heads_that_have_not_moved_are_not_judged_nor_diverged_ones() -> None:
    assert not judged(torch.ones(4, 3), torch.zeros(4, 3)).is_same
    assert not judged(torch.full((4, 3), 1 + 2**-23), torch.zeros(4, 3)).is_faint, "a rounding of gamma"
    for value in (math.nan, math.inf):
        assert not judged(torch.full((4, 3), value), torch.full((4, 3), 0.1)).is_faint


def test_a_head_of_gammas_alone_is_judged_by_them() -> None:
    assert judged(off_identity(0.1, 0.0)[0], torch.zeros(8, 16)).is_same
    assert not judged(off_identity(0.1, 0.1)[0], torch.zeros(8, 16)).is_faint
