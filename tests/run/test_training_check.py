"""FiLM that does not train while its UNet does: found in the optimizers, or where they prove nothing, in what an update changed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from small_unet import SmallUNet
from torch import nn

import vlmfilm_plugin
from vlmfilm_plugin.errors import HostError
from vlmfilm_plugin.film.module import is_any_attached
from vlmfilm_plugin.hosts.training_watch import TrainingWatch
from vlmfilm_plugin.run.training_check import TrainingCheck, unets_with_film


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Watch the updates of this process as an activated one does; hooks are taken out again."""
    from torch.optim import optimizer as torchs

    hooks = dict(torchs._global_optimizer_pre_hooks)
    TrainingWatch(is_any_attached, lambda: True, lambda text: HostError(text), TrainingCheck(), is_strict=True).start()
    yield
    torchs._global_optimizer_pre_hooks.clear()
    torchs._global_optimizer_pre_hooks.update(hooks)


def film_unet(mode: str, monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, vlmfilm_plugin.FilmHandle]:
    monkeypatch.setenv("VLM_FILM_MODE", mode)
    unet = SmallUNet()
    return unet, vlmfilm_plugin.attach(unet, feature_dim=4)


def backward(unet: nn.Module) -> None:
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)


def without_film(unet: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in unet.named_parameters() if "vlm_film" not in name]


@pytest.mark.usefixtures("watched")
def test_groups_by_name_that_leave_film_out_are_refused_at_every_update(monkeypatch: pytest.MonkeyPatch) -> None:
    unet, _ = film_unet("on", monkeypatch)
    optimizer = torch.optim.SGD(without_film(unet), lr=0.1)
    before = copy.deepcopy(without_film(unet))
    backward(unet)
    for _ in range(2):  # a loop that catches the first one makes no baseline either
        with pytest.raises(HostError, match=r"would not train while this SmallUNet does[\s\S]*in no optimizer"):
            optimizer.step()
    assert all(map(torch.equal, before, without_film(unet)))


@pytest.mark.usefixtures("watched")
def test_an_optimizer_built_before_attach_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM_FILM_MODE", "on")
    unet = SmallUNet()
    optimizer = torch.optim.AdamW(unet.parameters())
    vlmfilm_plugin.attach(unet, feature_dim=4)
    backward(unet)
    with pytest.raises(HostError, match="build the optimizer after FiLM is attached"):
        optimizer.step()


@pytest.mark.usefixtures("watched")
@pytest.mark.parametrize("mode", ["on", "shuffle"])
def test_a_freeze_by_name_is_refused(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    unet, _ = film_unet(mode, monkeypatch)
    for name, parameter in unet.named_parameters():
        parameter.requires_grad = "ups" in name
    optimizer = torch.optim.SGD([p for p in unet.parameters() if p.requires_grad], lr=0.1)
    backward(unet)
    with pytest.raises(HostError, match="do not require grad"):
        optimizer.step()


@pytest.mark.usefixtures("watched")
def test_an_adapter_of_low_rank_that_freezes_everything_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    unet, _ = film_unet("on", monkeypatch)
    unet.requires_grad_(False)
    block = next(module for module in unet.modules() if isinstance(module, nn.Conv2d))
    block.register_parameter("lora_A", nn.Parameter(torch.zeros(2, 2)))
    backward(unet)
    with pytest.raises(HostError, match="a wrapper that trains its own weights alone"):
        torch.optim.SGD([block.lora_A], lr=0.1).step()


@pytest.mark.usefixtures("watched")
def test_what_trains_film_is_let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    unet, _ = film_unet("on", monkeypatch)
    film = list(unet.get_submodule("vlm_film").parameters())
    second = torch.optim.SGD(film, lr=0.1)
    first = torch.optim.SGD(without_film(unet), lr=0.1)
    discriminator = nn.Linear(2, 2)
    third = torch.optim.SGD(discriminator.parameters(), lr=0.1)
    for _ in range(3):
        backward(unet)
        backward(discriminator)
        first.step(), second.step(), third.step()
    off, _ = film_unet("off", monkeypatch)
    backward(off)
    torch.optim.SGD(without_film(off), lr=0.1).step()
    ema = copy.deepcopy(unet)
    assert len(unets_with_film()) >= 3
    with torch.no_grad():
        for mine, its in zip(ema.parameters(), unet.parameters(), strict=True):
            mine.lerp_(its, 0.5)
    torch.optim.SGD(unet.parameters(), lr=0.1).step()
    ema.requires_grad_(False)
    torch.optim.SGD([*unet.parameters(), *ema.parameters()], lr=0.1).step()


class Masters:
    """Full-precision masters, as half-precision wrappers keep them: the optimizer holds none of the model's parameters."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.model = parameters
        flat = torch.cat([parameter.detach().flatten() for parameter in parameters])
        self.flat = nn.Parameter(flat)
        self.optimizer = torch.optim.SGD([self.flat], lr=0.1)

    def step(self, is_overflow: bool = False) -> None:
        if is_overflow:
            return
        self.flat.grad = torch.ones_like(self.flat)
        self.optimizer.step()
        at = 0
        for parameter in self.model:
            parameter.data.copy_(self.flat.detach()[at : at + parameter.numel()].view_as(parameter))
            at += parameter.numel()


@pytest.mark.usefixtures("watched")
def test_masters_without_film_are_found_by_what_they_change(monkeypatch: pytest.MonkeyPatch) -> None:
    unet, _ = film_unet("on", monkeypatch)
    masters = Masters(without_film(unet))
    masters.step(is_overflow=True)
    masters.step()
    with pytest.raises(HostError, match=r"does not train while this SmallUNet does[\s\S]*no parameter of vlm_film changed"):
        masters.step()


@pytest.mark.usefixtures("watched")
def test_masters_with_film_train(monkeypatch: pytest.MonkeyPatch) -> None:
    unet, _ = film_unet("on", monkeypatch)
    masters = Masters(list(unet.parameters()))
    before = [parameter.clone() for parameter in unet.get_submodule("vlm_film").parameters()]
    for _ in range(4):
        masters.step()
    assert not any(map(torch.equal, before, unet.get_submodule("vlm_film").parameters()))


@pytest.mark.usefixtures("watched")
def test_parameters_that_a_wrapper_flattens_after_the_first_update_are_no_update(monkeypatch: pytest.MonkeyPatch) -> None:
    unet, _ = film_unet("on", monkeypatch)
    masters = Masters(list(unet.parameters()))
    masters.optimizer.step()
    with torch.no_grad():
        for parameter in without_film(unet):
            parameter.data = parameter.detach().flatten()[:1].clone()
    masters.optimizer.step()
