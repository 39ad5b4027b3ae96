"""`feature_control`: what takes the place of features is the same in copies, checkpoints and evaluations, and never passes for FiLM."""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import pytest
import torch
from small_unet import SmallUNet, inputs, randomise
from torch import Tensor

from vlmfilm_plugin import to_port_layout
from vlmfilm_plugin.errors import CheckpointError
from vlmfilm_plugin.film.feature_control import vector_of
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


# random and zero


def test_random_vectors_are_of_the_key_and_the_seed_alone_whatever_process_draws_them() -> None:
    first = vector_of("train:images/0001.png", 0, 2048)
    assert first[:3].tolist() == pytest.approx(FIRST_OF_SEED_0) and abs(float(first.mean())) < 0.1 and abs(float(first.std()) - 1) < 0.05
    assert (vector_of("train:images/0001.png", 0, 2048) == first).all()
    for key, seed in (("train:images/0002.png", 0), ("train:images/0001.png", 1)):
        assert abs(float((vector_of(key, seed, 2048) * first).mean())) < 0.1


# Worked out by hashlib alone: a vector of another version would make another run of an old checkpoint.
FIRST_OF_SEED_0 = [
    (int.from_bytes(hashlib.shake_256(b"0:train:images/0001.png").digest(12)[4 * place :][:4], "little") / 2**32 - 0.5) * 12**0.5
    for place in range(3)
]


def test_a_random_control_has_the_features_scale_and_nothing_of_an_image_but_who_it_is() -> None:
    unet, handle = built(feature_control="random", feature_transform="none")
    randomise(handle.film)
    given = 7 * torch.randn(4, 5)
    first = out(unet, handle, given)
    control: Any = handle.film.control
    assert float(control.scale) == pytest.approx(float(given.square().mean().sqrt()))
    assert torch.equal(first, out(unet, handle, given)), "fixed"
    assert not torch.equal(first, out(unet, handle, given.flip(0)))
    a, b = (handle.film.transform(rows, ["a", "b", "c", "d"]) for rows in (given, torch.randn(4, 5)))
    assert torch.equal(a, b), "of the key, whatever the feature is"
    assert torch.equal(handle.film.transform(given[:2], ["b", "a"]), a[[1, 0]])


def test_the_seed_of_a_random_control_travels_in_the_checkpoint() -> None:
    unet, handle = built(feature_control="random", feature_control_seed=3)
    randomise(handle.film)
    given = torch.randn(3, 5)
    y = out(unet, handle, given)
    fresh, other = built(feature_control="random")
    assert not torch.equal(other.film.transform(given, list("abc")), handle.film.transform(given, list("abc")))
    fresh.load_state_dict(unet.state_dict())
    assert torch.equal(y, out(fresh.eval(), other, given))


def test_zero_gives_every_image_the_same_and_needs_no_training_image() -> None:
    unet, handle = built(feature_control="zero")
    randomise(handle.film)
    unet.eval()
    assert torch.equal(out(unet, handle, torch.randn(3, 5)), out(unet, handle, torch.randn(3, 5)))
    assert float(handle.film.transform(torch.randn(3, 5)).abs().max()) == 0


@pytest.mark.parametrize("control", ["random", "zero"])
def test_weights_of_any_control_are_no_weights_of_a_run(control: str) -> None:
    unet, _ = built(feature_control=control)
    for other in {"none", "constant", "random", "zero"} - {control}:
        with pytest.raises(CheckpointError, match="another architecture"):
            built(feature_control=other)[0].load_state_dict(unet.state_dict())
    with pytest.raises(CheckpointError, match="no such control"):
        to_port_layout(unet.state_dict())
