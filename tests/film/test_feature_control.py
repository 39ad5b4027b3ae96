"""`feature_control: constant`: one training image's feature for all, the same in copies, checkpoints and evaluations."""

from __future__ import annotations

import copy

import pytest
import torch
from small_unet import SmallUNet, inputs, randomise
from torch import Tensor

from vlmfilm_plugin import to_port_layout
from vlmfilm_plugin.errors import CheckpointError
from vlmfilm_plugin.forward.attach import attach
from vlmfilm_plugin.forward.handle import FilmHandle


def built(**settings: object) -> tuple[SmallUNet, FilmHandle]:
    torch.manual_seed(0)
    unet = SmallUNet()
    return unet, attach(unet, feature_dim=5, cond_dim=4, mode="on", **{"feature_control": "constant", **settings})  # type: ignore[arg-type]


def out(unet: SmallUNet, handle: FilmHandle, features: Tensor) -> Tensor:
    with handle.condition(features), torch.no_grad():
        return unet(*inputs(len(features)))


def test_every_image_gets_the_transformed_feature_of_the_first() -> None:
    unet, handle = built(feature_transform="center")
    randomise(handle.film)
    train, test = torch.randn(4, 5), torch.randn(4, 5)
    handle.fit(features=train)
    first = out(unet, handle, train)
    assert torch.equal(first, out(unet, handle, test)) and torch.equal(first, out(unet, handle, test.flip(0)))
    assert torch.allclose(handle.film.control.feature, train[0] - train.mean(0), atol=1e-6)  # type: ignore[union-attr]
    free, other = built(feature_control="none", feature_transform="center")
    free.load_state_dict({**unet.state_dict(), "vlm_film._extra_state": free.state_dict()["vlm_film._extra_state"]}, strict=False)
    assert torch.equal(first, out(free, other, train[:1].expand(4, -1)))
    with handle.mode("shuffle"):
        assert torch.equal(first, out(unet, handle, test)), "whose feature it is makes no difference"


def test_it_travels_in_checkpoints_and_copies_made_before_and_after() -> None:
    unet, handle = built()
    randomise(handle.film)
    early = copy.deepcopy(unet)
    y = out(unet, handle, torch.randn(3, 5))
    late, (fresh, other) = copy.deepcopy(unet), built()
    assert torch.equal(early.vlm_film.control.feature, unet.vlm_film.control.feature)
    assert torch.equal(late.vlm_film.control.feature, unet.vlm_film.control.feature)
    fresh.load_state_dict(unet.state_dict())
    assert torch.equal(y, out(fresh.eval(), other, torch.randn(3, 5)))


@pytest.mark.parametrize("control", ["none", "constant"])
def test_weights_of_the_control_are_no_weights_of_a_run_and_the_other_way_round(control: str) -> None:
    unet, _ = built(feature_control=control)
    other, _ = built(feature_control="none" if control == "constant" else "constant")
    with pytest.raises(CheckpointError, match="another architecture"):
        other.load_state_dict(unet.state_dict())


def test_the_ports_layout_has_no_such_control() -> None:
    unet, _ = built()
    with pytest.raises(CheckpointError, match="no such control"):
        to_port_layout(unet.state_dict())


def test_it_learns_nothing_of_the_image() -> None:
    unet, handle = built()
    randomise(handle.film)
    features = torch.randn(3, 5, requires_grad=True)
    with handle.condition(features):
        unet(*inputs(3)).sum().backward()
    assert features.grad is None and handle.film.control.feature.grad is None  # type: ignore[union-attr]
    assert sum(float(p.grad.abs().sum()) for p in handle.film.parameters() if p.grad is not None) > 0
