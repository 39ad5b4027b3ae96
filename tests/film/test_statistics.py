"""What differs between images, and what lies at its bound: values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from vlmfilm_plugin.film.statistics import differing_energy, share_at_bound, spread_between_images


def test_rows_equal_to_the_bit_have_a_spread_of_exactly_zero() -> None:
    gamma = torch.full((7, 5, 1, 1), 1.1)
    assert spread_between_images(gamma).tolist() == [0.0] * 5


def test_the_spread_is_taken_channel_by_channel_not_over_channels() -> None:
    beta = torch.tensor([[0.1, -0.1], [0.1, -0.1], [0.1, -0.1]])
    assert spread_between_images(beta).tolist() == [0.0, 0.0]
    beta[0, 1] = 0.2
    spread = spread_between_images(beta)
    assert spread[0] == 0 and spread[1] == pytest.approx(0.3 * math.sqrt(2) / 3)


def test_rows_of_one_image_count_once() -> None:
    values = torch.tensor([[0.0], [0.0], [0.0], [1.0]])
    assert spread_between_images(values, torch.tensor([0, 0, 0, 1])).item() == pytest.approx(0.5)
    assert spread_between_images(values, torch.tensor([3, 3, 3, 0])).item() == pytest.approx(0.5), "any numbers"
    assert spread_between_images(values).item() == pytest.approx(math.sqrt(3) / 4)


def test_differences_between_rows_of_one_image_are_none_between_images() -> None:
    values = torch.tensor([[0.0], [2.0], [0.0], [2.0]])
    assert spread_between_images(values, torch.tensor([0, 0, 1, 1])).item() == 0
    assert spread_between_images(values, torch.zeros(4, dtype=torch.long)).item() == 0


def test_a_small_spread_beside_a_large_mean_is_not_lost() -> None:
    gamma = torch.tensor([[1.0], [1.0 + 2**-23]])
    assert spread_between_images(gamma).item() == pytest.approx(2**-24)


def test_the_share_at_the_bound_counts_both_ends_and_knows_no_bound_without_room() -> None:
    gamma = torch.tensor([1.1, 0.9, 1.05, 1.0])[:, None, None, None]
    share = share_at_bound(gamma, 1, 0.1)
    assert share is not None and share.item() == 0.5
    assert share_at_bound(gamma, 1, None) is None and share_at_bound(gamma, 1, 0.0) is None


def test_the_differing_energy_is_that_of_the_deviations_from_the_mean() -> None:
    common, own = torch.tensor([3.0, 0.0, 0.0]), torch.tensor([[0.0, 1.0, 0.0], [0.0, -1.0, 0.0]])
    assert differing_energy(common + own).item() == pytest.approx(1 / 10)
    assert differing_energy(own).item() == 1
    assert differing_energy(common.expand(4, -1)).item() == 0
    assert differing_energy(torch.zeros(3, 2)).item() == 0
    repeated = (common + own)[[0, 0, 0, 1]]
    assert differing_energy(repeated, torch.tensor([0, 0, 0, 1])).item() == pytest.approx(1 / 10)


def test_half_precision_is_summed_in_full() -> None:
    values = (torch.arange(512)[:, None] % 2).to(torch.bfloat16)
    assert spread_between_images(values).item() == pytest.approx(0.5)
    assert differing_energy(values).item() == pytest.approx(0.5)


def test_nothing_of_it_carries_a_graph() -> None:
    gamma = torch.randn(3, 4, 1, 1, requires_grad=True)
    assert not spread_between_images(gamma).requires_grad and not differing_energy(gamma.flatten(1)).requires_grad
