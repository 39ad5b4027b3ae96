"""A head from outside: registered by name, chosen by a setting, trained, saved, loaded; and a head that is none is refused."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from small_unet import SmallUNet, inputs
from torch import Tensor, nn

from vlmfilm_plugin import CheckpointError, HeadShape, SettingsError, attach, register_head, to_port_layout
from vlmfilm_plugin.film.heads import HEADS, build_head
from vlmfilm_plugin.film.layers import AdaptiveFiLMHead
from vlmfilm_plugin.film.module import FilmModule


class AdaLNZero(nn.Module):
    """`x + (gamma - 1) * norm(x) + beta`, from one linear layer at zero (Peebles and Xie 2023, arXiv:2212.09748, for feature maps)."""

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        self.channels = shape.channels
        self.to_scale_shift = nn.Linear(shape.cond_dim, 2 * shape.channels)
        self.reset()

    def forward(self, cond_vec: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift = self.to_scale_shift(nn.functional.silu(cond_vec))[:, :, None, None].chunk(2, dim=1)
        return 1 + scale, shift

    def modulate(self, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return x + (gamma - 1) * nn.functional.group_norm(x, 1) + beta

    def reset(self) -> None:
        nn.init.zeros_(self.to_scale_shift.weight)
        nn.init.zeros_(self.to_scale_shift.bias)

    def change_probes(self) -> list[Tensor]:
        return [self.to_scale_shift.bias]


@pytest.fixture
def adaln() -> Iterator[None]:
    undo = register_head("adaln_zero", AdaLNZero)
    yield
    undo()
    assert "adaln_zero" not in HEADS


def train(unet: nn.Module, handle: object, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(handle.film.parameters(), 0.5)  # type: ignore[attr-defined]
    for step in range(steps):
        with handle.condition(torch.randn(2, 3, generator=torch.Generator().manual_seed(step))):  # type: ignore[attr-defined]
            unet(*inputs(2)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_head_from_outside_starts_as_the_identity_trains_is_saved_and_loaded(adaln: None) -> None:
    torch.manual_seed(0)
    unet = SmallUNet()
    plain = copy.deepcopy(unet)(*inputs(2))
    handle = attach(unet, feature_dim=3, cond_dim=4, head="adaln_zero")
    assert all(isinstance(head, AdaLNZero) for head in handle.film.heads)
    features = torch.randn(2, 3)
    with handle.condition(features):
        assert torch.equal(unet(*inputs(2)), plain)
    train(unet, handle)
    with handle.condition(features):
        trained = unet(*inputs(2))
    assert not torch.equal(trained, plain)

    other = SmallUNet()
    loaded = attach(other, feature_dim=3, cond_dim=4, head="adaln_zero")
    other.load_state_dict(unet.state_dict(), strict=True)
    with loaded.condition(features):
        assert torch.equal(other(*inputs(2)), trained)
    with loaded.condition(features), torch.no_grad():
        copied = copy.deepcopy(other)
        assert torch.equal(copied(*inputs(2)), trained)


def test_compiled_it_gives_the_same(adaln: None) -> None:
    unet = SmallUNet()
    handle = attach(unet, feature_dim=3, cond_dim=4, head="adaln_zero")
    train(unet, handle)
    with handle.condition(torch.ones(2, 3)):
        eager = unet(*inputs(2))
        torch.testing.assert_close(torch.compile(unet, backend="eager")(*inputs(2)), eager)


def test_the_kind_of_head_travels_in_the_checkpoint_and_another_is_refused(adaln: None) -> None:
    unet = SmallUNet()
    attach(unet, feature_dim=3, cond_dim=4, head="adaln_zero")
    other = SmallUNet()
    attach(other, feature_dim=3, cond_dim=4)
    with pytest.raises(CheckpointError, match=r"head=adaln_zero"):
        other.load_state_dict(unet.state_dict())
    with pytest.raises(CheckpointError, match="the port has no such head"):
        to_port_layout(unet.state_dict())


def test_change_probes_see_a_head_from_outside_change(adaln: None) -> None:
    unet = SmallUNet()
    handle = attach(unet, feature_dim=3, cond_dim=4, head="adaln_zero")
    before = [probe.detach().clone() for probe in handle.film.change_probes()]
    assert len(before) == 1 + len(handle.film.heads)
    train(unet, handle)
    assert not any(map(torch.equal, before, handle.film.change_probes()))


@pytest.mark.parametrize("head", ["film", "adaln_zero"])
@pytest.mark.parametrize("is_text", [False, True])
def test_a_baseline_loaded_into_trained_film_sets_every_tensor_of_it(adaln: None, head: str, is_text: bool) -> None:
    unet = SmallUNet()
    handle = attach(unet, feature_dim=3, cond_dim=4, head=head, use_text_prompt_cond=is_text)
    with torch.no_grad():
        for parameter in handle.film.parameters():
            parameter.fill_(7.0)
    stream = torch.random.get_rng_state()
    unet.load_state_dict(SmallUNet().state_dict() | {})
    for name, value in handle.film.named_parameters():
        assert not (value == 7.0).any(), name
    torch.random.set_rng_state(stream)
    plain = copy.deepcopy(unet)
    del plain.vlm_film
    with handle.condition(torch.randn(2, 3)):
        conditioned = unet(*inputs(2))
    handle.remove()
    assert torch.equal(conditioned, unet(*inputs(2)))


def test_a_reset_draws_nothing_from_the_random_stream() -> None:
    handle = attach(SmallUNet(), feature_dim=3, cond_dim=4)
    before = torch.random.get_rng_state()
    handle.film.reset()
    assert torch.equal(before, torch.random.get_rng_state())


def test_an_unknown_head_is_refused_with_the_known_ones_and_its_origin() -> None:
    with pytest.raises(SettingsError, match="unknown name") as caught:
        attach(SmallUNet(), feature_dim=3, head="flim")
    assert "argument" in str(caught.value) and "set it to 'film'" in str(caught.value)


def test_a_name_is_registered_once_and_its_undo_takes_out_its_own(adaln: None) -> None:
    with pytest.raises(SettingsError, match="the name is taken"):
        register_head("film", AdaLNZero)
    undo = register_head("mine", AdaLNZero)
    undo()
    undo()
    assert sorted(HEADS) == ["adaln_zero", "film"]


class NotTheIdentity(AdaLNZero):
    def reset(self) -> None:
        nn.init.ones_(self.to_scale_shift.bias)


class WrongShape(AdaLNZero):
    def forward(self, cond_vec: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(cond_vec)[0][:, :1], super().forward(cond_vec)[1]


class NoProbes(nn.Module):
    channels, modulate, reset = 1, None, None


@pytest.mark.parametrize(
    ("factory", "said"), [(NotTheIdentity, "not the identity"), (WrongShape, "gamma"), (lambda shape: NoProbes(), "change_probes")]
)
def test_what_is_no_head_is_refused_before_the_unet_changes(factory: object, said: str) -> None:
    undo = register_head("wrong", factory)  # type: ignore[arg-type]
    unet = SmallUNet()
    try:
        with pytest.raises(SettingsError, match=said):
            attach(unet, feature_dim=3, head="wrong")
    finally:
        undo()
    assert not hasattr(unet, "vlm_film")


def test_the_shipped_head_is_the_setting_of_the_default_and_its_names_stay() -> None:
    head = build_head("film", HeadShape(4, 3, 5, 0.1, None, True))
    assert isinstance(head, AdaptiveFiLMHead) and head.beta_scale is None
    assert list(head.state_dict()) == ["ln.weight", "ln.bias", "mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias"]
    film: FilmModule = attach(SmallUNet(), feature_dim=3).film
    assert film.architecture.head == "film"
