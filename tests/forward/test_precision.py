"""Autocast, half models and float64: heads keep full precision, outputs the host's dtype."""

from __future__ import annotations

import pytest
import torch
from small_unet import SmallUNet, inputs, randomise

from vlmfilm_plugin import attach

HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALVES)
def test_a_half_unet_keeps_full_heads_and_gives_halves(dtype: torch.dtype) -> None:
    unet = SmallUNet()
    handle = attach(unet, feature_dim=3, cond_dim=4)
    unet.to(dtype)
    assert {parameter.dtype for parameter in handle.film.parameters()} == {torch.float32}
    assert unet.final.weight.dtype == dtype
    with handle.condition(torch.randn(2, 3)):
        out = unet(*inputs(2, dtype=dtype))
    assert out.dtype == dtype
    out.float().square().mean().backward()
    assert all(parameter.grad is None or parameter.grad.dtype == torch.float32 for parameter in handle.film.parameters())


def test_attached_to_a_half_unet_the_heads_are_full_too() -> None:
    handle = attach(SmallUNet().half(), feature_dim=3)
    assert {parameter.dtype for parameter in handle.film.parameters()} == {torch.float32}


def test_a_float64_unet_has_float64_heads() -> None:
    unet = SmallUNet().double()
    handle = attach(unet, feature_dim=3)
    assert {parameter.dtype for parameter in handle.film.parameters()} == {torch.float64}


def test_half_and_back_loses_no_bit_of_the_heads() -> None:
    unet = SmallUNet()
    handle = attach(unet, feature_dim=3)
    randomise(handle.film)
    before = [parameter.clone() for parameter in handle.film.parameters()]
    unet.half().float()
    assert all(torch.equal(a, b) for a, b in zip(before, handle.film.parameters(), strict=True))


def test_autocast_leaves_gamma_in_full_precision_and_training_goes_on() -> None:
    unet = SmallUNet()
    handle = attach(unet, feature_dim=3, cond_dim=4)
    randomise(handle.film)
    features = torch.randn(2, 3)
    with torch.no_grad():
        expected = handle.film.heads[0](handle.film.project(features))[0]
    seen: list[torch.Tensor] = []
    handle.film.heads[0].register_forward_hook(lambda module, args, out: seen.append(out[0].detach()))
    with torch.autocast("cpu", torch.bfloat16), handle.condition(features):
        out = unet(*inputs(2))
    # The last call is the forward's: the alarm asks the heads before it, on a logged step, with rows in an order of its own.
    assert torch.equal(seen[-1], expected) and out.dtype == torch.bfloat16
    out.float().mean().backward()
    assert handle.film.heads[0].mlp[0].weight.grad is not None
