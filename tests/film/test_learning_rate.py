"""`film_lr_scale`: the updates of FiLM's parameters, and of nothing else, are multiplied, whatever optimizer and scheduler a host has."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_unet import SmallUNet, inputs
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from vlmfilm_plugin.errors import SettingsError
from vlmfilm_plugin.forward.attach import attach
from vlmfilm_plugin.forward.handle import FilmHandle

Build = Callable[[Any], Optimizer]


def built(factor: float, dtype: torch.dtype = torch.float32) -> tuple[SmallUNet, FilmHandle]:
    torch.manual_seed(0)
    unet = SmallUNet().to(dtype)
    return unet, attach(unet, feature_dim=5, cond_dim=4, mode="on", film_lr_scale=factor)


def step(unet: SmallUNet, handle: FilmHandle, optimizer: Optimizer, seed: int) -> None:
    features = torch.randn(3, 5, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    with handle.condition(features):
        unet(*inputs(3, seed=seed, dtype=next(unet.parameters()).dtype)).square().mean().backward()
    optimizer.step()


def trained(factor: float, build: Build, steps: int = 1) -> dict[str, Tensor]:
    # In float64: rounding would grow over steps and hide what is compared.
    unet, handle = built(factor, torch.float64)
    optimizer = build(unet)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    for seed in range(steps):
        step(unet, handle, optimizer, seed)
        scheduler.step()
    handle.film.lr_scale = 1.0
    values = {name: parameter.detach().clone() for name, parameter in unet.named_parameters()}
    handle.remove()
    return values


def one_group(kind: type[Optimizer], **options: Any) -> Build:
    return lambda unet: kind(unet.parameters(), lr=0.02, **options)


def own_group(kind: type[Optimizer], factor: float, **options: Any) -> Build:
    """Return what a host would write that knows FiLM: the reference."""

    def build(unet: Any) -> Optimizer:
        film = {id(parameter) for parameter in unet.vlm_film.parameters()}
        host = [parameter for parameter in unet.parameters() if id(parameter) not in film]
        return kind([{"params": host}, {"params": list(unet.vlm_film.parameters()), "lr": 0.02 * factor}], lr=0.02, **options)

    return build


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (SGD, {}),
        (SGD, {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True}),
        (Adam, {}),
        (AdamW, {"weight_decay": 0.3}),
        (AdamW, {"foreach": True}),
    ],
)
@pytest.mark.parametrize("factor", [0.1, 3.0])
def test_it_equals_a_parameter_group_with_that_learning_rate(kind: type[Optimizer], options: dict[str, Any], factor: float) -> None:
    got, wanted = trained(factor, one_group(kind, **options), steps=5), trained(1.0, own_group(kind, factor, **options), steps=5)
    plain, bias = trained(1.0, one_group(kind, **options), steps=5), "vlm_film.heads.0.mlp.2.bias"
    assert not torch.allclose(wanted[bias], plain[bias])
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-9, atol=1e-9, msg=name)


def hooks() -> tuple[list[int], list[int]]:
    """Return the hooks of all optimizers: another test's run in this process may have left its own."""
    return list(_global_optimizer_pre_hooks), list(_global_optimizer_post_hooks)


def test_a_factor_of_one_registers_nothing_and_changes_nothing_to_the_bit() -> None:
    plain = trained(1.0, one_group(AdamW), steps=3)
    before = hooks()
    _, handle = built(1.0)
    assert hooks() == before
    handle.remove()
    assert all(torch.equal(value, trained(1.0, one_group(AdamW), steps=3)[name]) for name, value in plain.items())


def test_the_hosts_parameters_are_left_alone_to_the_bit_in_a_step() -> None:
    plain, scaled = trained(1.0, one_group(AdamW)), trained(0.1, one_group(AdamW))
    assert all(torch.equal(plain[name], scaled[name]) for name in plain if "vlm_film" not in name)


def test_state_and_groups_of_the_optimizer_stay_the_hosts_and_resume_with_another_factor() -> None:
    unet, handle = built(0.25)
    optimizer = AdamW(unet.parameters(), lr=0.02)
    step(unet, handle, optimizer, 0)
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(unet.state_dict())
    assert len(saved["param_groups"]) == 1 and saved["param_groups"][0]["lr"] == 0.02
    handle.remove()
    for factor in (1.0, 0.25, 4.0):
        again, other = built(factor)
        again.load_state_dict(weights)
        resumed = AdamW(again.parameters(), lr=0.02)
        resumed.load_state_dict(saved)
        step(again, other, resumed, 1)
        other.remove()


def test_removal_and_copies_and_other_optimizers_of_the_process() -> None:
    registered = hooks()
    unet, handle = built(0.5)
    twin = copy.deepcopy(unet)
    stranger = nn.Linear(2, 1)
    other = SGD(stranger.parameters(), lr=1.0)
    stranger(torch.ones(1, 2)).sum().backward()
    before = stranger.weight.detach().clone()
    other.step()
    assert torch.equal(stranger.weight, before - 1)
    bias = twin.vlm_film.heads[0].mlp[2].bias
    bias.grad = torch.ones_like(bias)
    SGD(twin.parameters(), lr=1.0).step()
    assert torch.equal(bias, torch.full_like(bias, -0.5)), "a copy learns as its original"
    assert pickle.loads(pickle.dumps(unet)).vlm_film.lr_scale == 0.5
    handle.remove()
    assert hooks() == registered


def test_a_step_that_is_skipped_moves_nothing() -> None:
    unet, handle = built(0.3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    optimizer = SGD(unet.parameters(), lr=0.1)
    with handle.condition(torch.randn(3, 5)):
        scaler.scale(unet(*inputs(3)).sum() * float("inf")).backward()
    before = copy.deepcopy(unet.state_dict())
    scaler.step(optimizer)
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    handle.remove()


def test_a_closure_is_followed() -> None:
    unet, handle = built(0.5)
    optimizer = SGD(unet.parameters(), lr=1.0)
    bias = unet.vlm_film.heads[0].mlp[2].bias

    def closure() -> float:
        bias.grad = torch.ones_like(bias)
        return 0.0

    optimizer.step(closure)
    assert torch.equal(bias, torch.full_like(bias, -0.5))
    handle.remove()


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan"), "fast"])
def test_a_factor_that_is_none_is_refused(wrong: Any) -> None:
    before = hooks()
    with pytest.raises(SettingsError, match="film_lr_scale"):
        attach(SmallUNet(), feature_dim=5, film_lr_scale=wrong)
    assert hooks() == before
