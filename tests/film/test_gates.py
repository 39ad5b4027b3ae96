"""Spatial gates: where FiLM acts, at every stage's size; vessel junctions; gates of a third party."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_unet import SmallUNet, inputs, randomise

from vlmfilm_plugin import ConditionError, FilmHandle, GateView, SettingsError, attach, register_gate
from vlmfilm_plugin.film import gates
from vlmfilm_plugin.film.junctions import junctions, vessel_junctions
from vlmfilm_plugin.host_spec import UNet
from vlmfilm_plugin.settings.junctions import JunctionGating


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


def cross(rows: int = 2, size: int = 33) -> torch.Tensor:
    """Masks (rows, 1, size, size) in [0, 1]: a crossing in row 0, a line in the others."""
    mask = torch.zeros(rows, 1, size, size)
    mask[:, 0, size // 2, :] = 1
    mask[0, 0, :, size // 2] = 1
    return mask


class Places:
    """The masks of a forward, given as tensors."""

    def __init__(self, **masks: torch.Tensor) -> None:
        self.masks, self.asked = masks, []

    def _give(self, name: str) -> torch.Tensor:
        self.asked.append(name)
        return self.masks[name]

    def state(self) -> torch.Tensor:
        return self._give("state")

    def prediction(self) -> torch.Tensor:
        return self._give("pred")

    def truth(self, batch: object) -> torch.Tensor:
        return self._give("gt")


def view(places: Places | None = None, **facts: object) -> GateView:
    rule = {name: facts.pop(name) for name in list(facts) if name in JunctionGating().as_dict()}
    x = facts.pop("x", torch.zeros(2, 1, 33, 33))
    return GateView(x, None, junctions=JunctionGating(enabled=True, **rule), masks=places, **facts)  # type: ignore[arg-type]


def test_vessel_junctions_closes_a_diamond_around_a_crossing_and_nothing_else() -> None:
    pytest.importorskip("skimage")
    gate = vessel_junctions(view(Places(pred=cross()), radius_px=3))
    assert gate is not None and gate.shape == (2, 1, 33, 33) and bool((gate[1] == 1).all())
    distance = (torch.arange(33)[:, None] - 16).abs() + (torch.arange(33) - 16).abs()
    # The crossing's skeleton has junction pixels at its middle and beside it.
    assert bool((gate[0, 0][distance <= 3] == 0).all()) and bool((gate[0, 0][distance > 4] == 1).all())


def test_the_entries_of_the_block_do_what_they_say() -> None:
    pytest.importorskip("skimage")
    places = Places(pred=0.7 * cross())
    closed = {r: int((vessel_junctions(view(places, radius_px=r)) == 0).sum()) for r in (0, 1, 8)}  # type: ignore[union-attr]
    assert 0 < closed[0] < closed[1] < closed[8] < 33 * 33
    half = vessel_junctions(view(places, gate_value_in_junction=0.25))
    assert half is not None and set(half.unique().tolist()) == {0.25, 1.0}
    nothing = vessel_junctions(view(places, threshold=0.7))
    assert nothing is not None and bool((nothing == 1).all())
    lines = vessel_junctions(view(places, degree_threshold=2, radius_px=0))
    assert lines is not None and bool((lines[1] == 0).any())
    assert not junctions(np.zeros((5, 5)), 1, 3).any()


@pytest.mark.parametrize("source", ["pred", "state", "gt"])
def test_a_source_is_the_one_asked_for_and_no_other(source: str) -> None:
    pytest.importorskip("skimage")
    places = Places(pred=cross(), state=cross(), gt=cross())
    assert vessel_junctions(view(places, source=source, batch={}, phase="train", samples=2)) is not None
    assert places.asked == [source]


def test_in_evaluation_the_truth_is_not_shown_and_film_acts_everywhere() -> None:
    assert vessel_junctions(view(Places(), source="gt", batch={}, phase="test")) is None


def test_warm_up_counts_the_epochs_of_a_fit_alone() -> None:
    pytest.importorskip("skimage")
    places = Places(pred=cross())
    assert vessel_junctions(view(places, warmup_epochs=5, epoch=4, phase="train")) is None
    assert vessel_junctions(view(places, warmup_epochs=5, epoch=4, phase="val")) is None
    assert places.asked == []
    # A fresh trainer that tests a checkpoint counts from 0.
    for facts in ({"epoch": 5, "phase": "train"}, {"epoch": 0, "phase": "test"}, {}):
        assert vessel_junctions(view(places, warmup_epochs=5, **facts)) is not None


def test_a_given_mask_goes_to_the_rows_of_its_sample_and_wins_over_the_source() -> None:
    pytest.importorskip("skimage")
    batch, places = {"junction_mask": cross()}, Places()
    rows = torch.tensor([0, 0, 1, 1])
    four = torch.zeros(4, 1, 33, 33)
    gate = vessel_junctions(view(places, batch=batch, x=four, rows=rows, samples=2))
    assert gate is not None and [bool((row == 0).any()) for row in gate] == [True, True, False, False]
    own = vessel_junctions(view(places, batch={"junction_mask": cross(4)}, x=four, rows=rows, samples=2))
    assert own is not None and [bool((row == 0).any()) for row in own] == [True, False, False, False]
    swapped = vessel_junctions(view(places, batch=batch, rows=torch.tensor([1, 0]), samples=2))
    assert swapped is not None and bool((swapped[0] == 1).all()) and bool((swapped[1] == 0).any())


@pytest.mark.parametrize("mask", [cross(size=16), cross(3), cross()[0], "mask", cross()[:, 0]])
def test_a_given_mask_that_cannot_be_mapped_is_refused_not_ignored(mask: object) -> None:
    with pytest.raises(ConditionError, match="junction_mask"):
        vessel_junctions(view(Places(pred=cross()), batch={"junction_mask": mask}, samples=2))
    with pytest.raises(ConditionError, match="ground truth"):
        vessel_junctions(view(Places(gt=cross(size=16)), source="gt", batch={}, phase="train", samples=2))


class Noisy(SmallUNet):
    """A UNet with a random stream, buffers that count and two outputs: what a first pass must leave alone."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.calls = torch.nn.BatchNorm2d(1), torch.nn.Dropout(0.5), 0

    def forward(self, x: torch.Tensor, time: torch.Tensor, cond: torch.Tensor, film: object = None) -> torch.Tensor:
        self.calls += 1
        self.seen = torch.is_grad_enabled()
        return self.drop(self.norm(super().forward(x, time, cond)))


BLOCK = {"enabled": True, "degree_threshold": 1, "radius_px": 1, "threshold": 0.5}


def gated(unet: SmallUNet, **block: object) -> FilmHandle:
    torch.manual_seed(0)
    handle = attach(unet, feature_dim=3, cond_dim=4, junction_gating_config={**BLOCK, **block})
    randomise(handle.film)
    return handle


def test_a_first_pass_gates_by_the_sigmoid_of_a_plain_film_forward() -> None:
    pytest.importorskip("skimage")
    torch.manual_seed(0)
    handle = gated(SmallUNet())
    with torch.no_grad():
        first = outputs(handle, torch.ones(1, 1, 8, 8))
        expected = vessel_junctions(view(Places(pred=torch.sigmoid(first)), x=first, degree_threshold=1, radius_px=1))
        assert expected is not None and 0 < float(expected.mean()) < 1
        found, again = outputs(handle, None), outputs(handle, None)
    handle.remove()
    bilinear = attach(handle.unet, feature_dim=3, cond_dim=4)
    bilinear.film.load_state_dict(handle.film.state_dict())
    gate = gates.SpatialGate(expected, "nearest")
    assert torch.equal(found, again) and not torch.allclose(found, outputs(bilinear, None), atol=1e-3)
    blocks = [handle.unet.get_submodule(stage.path) for stage in bilinear.stages]
    for stage, block in zip(bilinear.stages, blocks, strict=True):
        plain: list[torch.Tensor] = []
        block.register_forward_hook(lambda m, a, out, kept=plain: kept.append(out), prepend=True)
        block.register_forward_hook(lambda m, a, out, kept=plain, i=stage.index: gate.apply(i, kept[-1], out))
    assert torch.allclose(outputs(bilinear, None), found, atol=1e-6)


def test_a_first_pass_leaves_random_stream_buffers_and_gradients_alone() -> None:
    pytest.importorskip("skimage")
    plain, twice = Noisy(), Noisy()
    twice.load_state_dict(plain.state_dict())
    one, two = attach(plain, feature_dim=3, cond_dim=4), gated(twice, gate_value_in_junction=1.0)
    randomise(one.film)
    two.film.load_state_dict(one.film.state_dict())
    results = []
    for handle in (one, two):
        torch.manual_seed(1)
        with handle.condition(torch.ones(2, 3)):
            y = handle.unet(*inputs(2))
        y.sum().backward()
        results.append((y.detach(), torch.rand(3), handle.unet.norm.running_mean.clone(), handle.unet.norm.num_batches_tracked.clone()))
        assert handle.unet.training
    assert (plain.calls, twice.calls) == (1, 2)
    # A gate of one everywhere: only the first pass itself could make a difference.
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    for a, b in zip(plain.parameters(), twice.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None) and (a.grad is None or torch.allclose(a.grad, b.grad, atol=1e-6))


def test_gated_stages_are_those_named() -> None:
    pytest.importorskip("skimage")
    x, y = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
    gate = gates.SpatialGate(torch.tensor([[[[0.0, 1.0], [1.0, 1.0]]]]), "nearest", frozenset({1}))
    assert torch.equal(gate.apply(0, x, y), y) and float(gate.apply(1, x, y).sum()) == 3
    with pytest.raises(SettingsError, match="carry no FiLM"), gated(SmallUNet(), apply_stages=[7]).condition(torch.ones(1, 3)):
        handle = gated(SmallUNet(), apply_stages=[7])
        outputs(handle, None)
    with pytest.raises(SettingsError, match="carry no FiLM"):
        attach(SmallUNet(), feature_dim=3, decoder_stages=[0], junction_gating_config={"enabled": True, "apply_stages": [0, 1]})


def test_mode_off_makes_no_first_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM_FILM_MODE", "off")
    unet = Noisy().eval()
    outputs(gated(unet), None)
    assert unet.calls == 1


def test_by_hand_the_state_is_stated_nowhere_and_is_not_guessed() -> None:
    with pytest.raises(ConditionError, match=r"does not say which part of the UNet's input is the mask") as caught:
        outputs(gated(SmallUNet(), source="state"), None)
    assert "source: pred" in str(caught.value.fix)
    from vlmfilm_plugin.forward.attach import install
    from vlmfilm_plugin.settings.layers import resolve

    settings = resolve([("argument", {"cond_dim": 4, "junction_gating_config": BLOCK, "encoder": "descriptor"})])
    spec = UNet(cls=SmallUNet, targets={"post_block2": "ups.*.1"}, condition=None)
    silent = install(SmallUNet(), settings, "on", spec, feature_dim=3, is_by_hand=True)
    with pytest.raises(ConditionError, match="output is the mask"):
        outputs(silent, None)


def test_an_error_in_a_first_pass_leaves_no_context_behind() -> None:
    from vlmfilm_plugin.forward.context import stacks

    handle = gated(SmallUNet(), source="state")
    with pytest.raises(ConditionError):
        outputs(handle, None)
    assert (stacks.contexts, stacks.conditions, stacks.first_passes) == ([], [], [])
