"""Spatial gates: where FiLM acts, at every stage's size; vessel junctions; gates of a third party."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_unet import SmallUNet, inputs, randomise

from vlmfilm_plugin import ConditionError, FilmHandle, GateView, SettingsError, attach, register_gate
from vlmfilm_plugin.film import gates


@pytest.fixture
def handle() -> FilmHandle:
    handle = attach(SmallUNet(), feature_dim=3, cond_dim=4)
    randomise(handle.film)
    return handle


def outputs(handle: FilmHandle, gate: torch.Tensor | None) -> torch.Tensor:
    with torch.no_grad(), handle.condition(torch.ones(2, 3), gate=gate):
        return handle.unet(*inputs(2))


def test_a_gate_of_one_is_film_and_of_zero_the_plain_host(handle: FilmHandle) -> None:
    film = outputs(handle, None)
    assert torch.allclose(outputs(handle, torch.ones(2, 1, 8, 8)), film, atol=1e-6)
    closed = outputs(handle, torch.zeros(2, 1, 8, 8))
    handle.remove()
    with torch.no_grad():
        plain = handle.unet(*inputs(2))
    assert torch.equal(closed, plain) and not torch.allclose(film, plain, atol=1e-3)


def test_a_gate_acts_on_its_own_rows(handle: FilmHandle) -> None:
    gate = torch.stack([torch.ones(1, 8, 8), torch.zeros(1, 8, 8)])
    mixed, film, plain = outputs(handle, gate), outputs(handle, None), outputs(handle, torch.zeros(1, 1, 8, 8))
    assert torch.allclose(mixed[0], film[0], atol=1e-6) and torch.equal(mixed[1], plain[1])


def test_the_formula_holds_at_each_stage(handle: FilmHandle) -> None:
    gate = torch.rand(2, 1, 8, 8)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for stage in handle.stages:
        block = handle.unet.get_submodule(stage.path)
        block.register_forward_hook(lambda m, a, out, s=stage: seen.append((out, torch.tensor(s.index))))
    raw: list[torch.Tensor] = []
    for stage in handle.stages:
        handle.unet.get_submodule(stage.path).register_forward_hook(lambda m, a, out: raw.append(out), prepend=True)
    outputs(handle, gate)
    for (gated, index), x in zip(seen, raw, strict=True):
        with torch.no_grad():
            gamma, beta = handle.film.heads[int(index)](handle.film.project(torch.ones(2, 3)))
        small = torch.nn.functional.interpolate(gate, size=x.shape[-2:], mode="bilinear", antialias=True)
        assert torch.allclose(gated, x + small * (gamma * x + beta - x), atol=1e-5)


@pytest.mark.parametrize("gate", [torch.ones(2, 8, 8), torch.ones(3, 1, 8, 8), torch.full((2, 1, 8, 8), 1.5), torch.full((2, 1, 8, 8), float("nan"))])
def test_a_wrong_gate_is_refused(handle: FilmHandle, gate: torch.Tensor) -> None:
    with pytest.raises(ConditionError, match="spatial gate"):
        outputs(handle, gate)


def test_a_gate_of_a_third_party_is_chosen_by_name_and_sees_the_forward(handle: FilmHandle) -> None:
    views: list[GateView] = []
    undo = register_gate("mine", lambda view: (views.append(view), torch.zeros(1, 1, 4, 4))[1])
    try:
        with pytest.raises(SettingsError, match="taken"):
            register_gate("mine", lambda view: view.x)
        unet = SmallUNet()
        named = attach(unet, feature_dim=3, cond_dim=4, spatial_gate="mine")
        randomise(named.film)
        closed = outputs(named, None)
        named.remove()
        with torch.no_grad():
            assert torch.equal(closed, unet(*inputs(2)))
        assert views[0].x.shape == (2, 1, 8, 8)
    finally:
        undo()
    assert "mine" not in gates.GATES


def test_an_unknown_gate_names_the_closest(handle: FilmHandle) -> None:
    named = attach(SmallUNet(), feature_dim=3, spatial_gate="vessel_junction")
    with pytest.raises(SettingsError, match="vessel_junctions"), named.condition(torch.ones(1, 3)):
        pass


def test_vessel_junctions_closes_around_a_crossing_and_nowhere_else() -> None:
    pytest.importorskip("skimage")
    x = torch.full((2, 1, 33, 33), -1.0)
    x[0, 0, 16, :] = 1.0
    x[0, 0, :, 16] = 1.0
    x[1, 0, 16, :] = 1.0
    gate = gates.vessel_junctions(GateView(x, None))
    assert gate.shape == (2, 1, 33, 33)
    assert gate[0, 0, 16, 16] == 0 and gate[0, 0, 16, 2] == 1 and gate[0, 0, 2, 2] == 1
    assert bool((gate[1] == 1).all())
    given = gates.vessel_junctions(GateView(torch.zeros_like(x), None, {"junction_mask": (x > 0).float()}))
    assert torch.equal(given, gate)
    assert np.isclose(float((gate[0] == 0).sum()), 49, atol=30)
