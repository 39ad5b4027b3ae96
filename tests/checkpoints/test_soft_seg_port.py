"""Checkpoints of the soft-seg port's two models, on a stand-in of each: the same names and shapes, FiLM at different places."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from small_unet import randomise
from torch import Tensor, nn

from vlmfilm_plugin.checkpoints.facts import resolve_with
from vlmfilm_plugin.checkpoints.metadata import adapt, write_metadata
from vlmfilm_plugin.checkpoints.peek import facts_of, peek
from vlmfilm_plugin.checkpoints.soft_seg_layout import to_port_layout
from vlmfilm_plugin.errors import CheckpointError
from vlmfilm_plugin.film.layers import AdaptiveFiLMHead, ImageToConditionVector
from vlmfilm_plugin.forward.attach import install

FEATURES, COND, HIDDEN = 5, 4, 6
BASE, FACTORS = 3, (1, 2, 2)
WIDTHS = tuple(BASE * factor for factor in reversed(FACTORS))  # of the decoder's stages, from the bottleneck on
FILM_MODEL, DIRECT_MODEL = "FlowModelVLMFiLM", "FlowModel"


class Block(nn.Module):
    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inner, outer, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.conv(x))


class SkipUNet(nn.Module):
    """A decoder that takes a skip before each of its two blocks, as MedSegDiff's does; `film(x, stage)` acts after the block it is given for."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, WIDTHS[0], 3, padding=1)
        self.skips = nn.ModuleList(nn.Conv2d(2, width, 1) for width in WIDTHS)
        pairs = zip(WIDTHS, (*WIDTHS[1:], WIDTHS[-1]), strict=True)
        self.ups = nn.ModuleList(nn.ModuleList([Block(2 * a, a), Block(2 * a, a), nn.Conv2d(a, a, 1), nn.Conv2d(a, b, 1)]) for a, b in pairs)
        self.final = nn.Conv2d(WIDTHS[-1], 1, 1)

    def forward(self, x: Tensor, time: Tensor, cond: Tensor, film: Any = None, block: int = 0) -> Tensor:
        given = torch.cat([x, cond], dim=1)
        h = self.stem(given) * time[:, None, None, None]
        for stage, (block1, block2, attention, up) in enumerate(self.ups):
            skip = self.skips[stage](given)
            h = block1(torch.cat([h, skip], dim=1))
            h = film(h, stage) if film and block == 1 else h
            h = block2(torch.cat([h, skip], dim=1))
            h = film(h, stage) if film and block == 2 else h
            h = up(h + attention(h))
        return self.final(h)


class Conditioner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image_to_cond = ImageToConditionVector(FEATURES, COND)


class PortModel(nn.Module):
    """The port's model of one kind: its heads and conditioner stand at the root, its FiLM is written into the forward."""

    def __init__(self, kind: str, stages: list[int] | None, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.kind, self.asked = kind, stages
        self.unet = SkipUNet()
        every = list(range(len(WIDTHS)))
        self.stages = every if kind == DIRECT_MODEL else sorted(stages) if stages is not None else [0, 1]
        self.vlm_film_conditioner = Conditioner()
        # Bounds are taken and never used there.
        channels = [WIDTHS[stage] for stage in self.stages if stage in every]
        self.vlm_film_heads = nn.ModuleList(AdaptiveFiLMHead(COND, width, HIDDEN, None, None, True) for width in channels)
        randomise(self.vlm_film_heads)  # type: ignore[arg-type]

    def film(self, x: Tensor, stage: int) -> Tensor:
        if stage not in self.stages:
            return x
        gamma, beta = self.vlm_film_heads[self.stages.index(stage)](self.cond_vec)
        return gamma.reshape(*gamma.shape[:2], 1, 1) * x + beta.reshape(*beta.shape[:2], 1, 1)

    def forward(self, x: Tensor, time: Tensor, cond: Tensor, features: Tensor) -> Tensor:
        self.cond_vec = self.vlm_film_conditioner.image_to_cond(features)
        return self.unet(x, time, cond, self.film, 1 if self.kind == FILM_MODEL else 2)

    def checkpoint(self, **hyperparameters: Any) -> dict[str, Any]:
        known: dict[str, Any] = {"use_vlm_film": True, "vlm_film_config": {"gamma_scale": 0.1}, "model_channels": BASE, "channel_mult": list(FACTORS)}
        if self.kind == FILM_MODEL:
            known |= {"vlm_film_decoder_stages": self.asked, "junction_gating_config": None}
        return {"state_dict": self.state_dict(), "hyper_parameters": {**known, **hyperparameters}}


class Host(nn.Module):
    """The host without the port, with FiLM as settings say."""

    def __init__(self, given: Mapping[str, object], facts: Any = None, seed: int = 9, environ: Mapping[str, str] | None = None) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.unet = SkipUNet()
        self.settings = resolve_with(facts, environ or {}, arguments=given)
        self.handle = install(self.unet, self.settings, "on", feature_dim=FEATURES)

    def forward(self, x: Tensor, time: Tensor, cond: Tensor, features: Tensor) -> Tensor:
        with self.handle.condition(features=features):
            return self.unet(x, time, cond)


def inputs() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    x, cond = torch.randn(3, 1, 8, 8, generator=generator), torch.randn(3, 1, 8, 8, generator=generator)
    return x, torch.rand(3, generator=generator), cond, torch.randn(3, FEATURES, generator=generator)


def loaded(checkpoint: dict[str, Any], given: Mapping[str, object] | None = None, environ: Mapping[str, str] | None = None) -> Host:
    """Load as a host does: the model is built as the checkpoint says, then its state is loaded strictly."""
    host = Host(given or {}, facts_of(checkpoint, "port.ckpt"), environ=environ)
    checkpoint = {**checkpoint, "state_dict": dict(checkpoint["state_dict"])}
    adapt(host, checkpoint, host.settings)
    host.load_state_dict(checkpoint["state_dict"], strict=True)
    return host


def difference(host: nn.Module, port: PortModel) -> float:
    with torch.no_grad():
        return float((host(*inputs()) - port(*inputs())).abs().max())


KINDS = [(FILM_MODEL, None), (FILM_MODEL, [0]), (FILM_MODEL, [2]), (FILM_MODEL, [2, 0]), (FILM_MODEL, [0, 1, 2]), (DIRECT_MODEL, None)]


@pytest.mark.parametrize(("kind", "stages"), KINDS)
def test_a_checkpoint_acts_where_its_model_trained_it(kind: str, stages: list[int] | None, capsys: pytest.CaptureFixture[str]) -> None:
    port = PortModel(kind, stages)
    host = loaded(port.checkpoint())
    assert difference(host, port) < 1e-6
    point = "post_block1" if kind == FILM_MODEL else "post_block2"
    line = next(line for line in capsys.readouterr().out.splitlines() if "soft-seg port's layout" in line)
    assert f"{kind}" in line and f"apply_point={point} decoder_stages={port.stages}" in line
    # And what we write says it from then on.
    ours: dict[str, Any] = {"state_dict": host.state_dict()}
    write_metadata(host, host.settings, ours)
    assert ours["vlm_film"]["architecture"]["apply_point"] == point and ours["vlm_film_trained_stages"] == port.stages
    facts = facts_of(ours, "ours.ckpt")
    again = Host({}, facts)
    again.load_state_dict(ours["state_dict"], strict=True)
    assert difference(again, port) < 1e-6


@pytest.mark.parametrize(("kind", "other"), [(FILM_MODEL, "post_block2"), (DIRECT_MODEL, "post_block1")])
def test_the_other_place_is_far_off_so_that_equality_means_something(kind: str, other: str) -> None:
    port = PortModel(kind, [0, 1, 2])
    bare = {"state_dict": port.state_dict()}
    assert difference(loaded(bare, {"apply_point": other}), port) > 1e-2


def test_null_means_the_two_stages_next_to_the_bottleneck() -> None:
    facts = facts_of(PortModel(FILM_MODEL, None).checkpoint(), "c")
    assert facts is not None and facts.architecture["decoder_stages"] == [0, 1]


def test_a_stage_beyond_the_decoder_got_no_head_there_and_gets_none_here() -> None:
    port = PortModel(FILM_MODEL, [1, 7])
    assert len(port.vlm_film_heads) == 1
    host = loaded(port.checkpoint())
    assert [stage.index for stage in host.unet.vlm_film.architecture.stages] == [1]
    assert difference(host, port) < 1e-6


def test_the_stages_that_were_trained_win_over_those_that_were_asked_for() -> None:
    port = PortModel(FILM_MODEL, [1, 2])
    checkpoint = {**port.checkpoint(vlm_film_decoder_stages=None), "vlm_film_trained_stages": [1, 2]}
    assert difference(loaded(checkpoint), port) < 1e-6


@pytest.mark.parametrize("hyperparameters", [None, {}, {"arch_name": "medsegdiff_flow"}], ids=["absent", "empty", "of another model"])
@pytest.mark.parametrize(("kind", "point"), [(FILM_MODEL, "post_block1"), (DIRECT_MODEL, "post_block2")])
def test_without_the_ports_hyperparameters_it_is_refused_until_the_place_is_set(kind: str, point: str, hyperparameters: Any, tmp_path: Path) -> None:
    port = PortModel(kind, None)
    bare: dict[str, Any] = {"state_dict": port.state_dict()} | ({} if hyperparameters is None else {"hyper_parameters": hyperparameters})
    with pytest.raises(CheckpointError, match="where its FiLM acts") as error:
        loaded(bare)
    text = str(error.value)
    assert "FlowModelVLMFiLM" in text and "post_block1" in text and "FlowModel(use_vlm_film=True)" in text and "post_block2" in text
    given: Mapping[str, object] = {"apply_point": point, "decoder_stages": port.stages}
    assert difference(loaded(bare, given), port) < 1e-6
    # A state dict by itself, in a file.
    torch.save(port.state_dict(), tmp_path / "bare.pt")
    facts = peek(tmp_path / "bare.pt")
    assert facts is not None and len(facts.readings) == 2
    with pytest.raises(CheckpointError, match="where its FiLM acts"):
        resolve_with(facts, {})


@pytest.mark.parametrize(
    "given",
    [{}, {"apply_point": "post_block1"}, {"apply_point": "post_block1", "decoder_stages": [0, 2], "gamma_scale": None, "beta_scale": None}],
    ids=["defaults", "all stages, bounded", "other stages of the same widths"],
)
def test_a_model_that_was_built_otherwise_refuses_it_though_shapes_would_fit(given: dict[str, object]) -> None:
    # As `trainer.fit(ckpt_path=...)` does: nobody asked the checkpoint before the model was built.
    port = PortModel(FILM_MODEL, [0, 1])
    host = Host({"cond_dim": COND, "text_mlp_hidden_dim": HIDDEN, **given})
    with pytest.raises(CheckpointError, match="acts elsewhere") as error:
        adapt(host, port.checkpoint(), host.settings)
    assert "apply_point=post_block1 decoder_stages=[0, 1]" in str(error.value)


def changed(port: PortModel, **tensors: Tensor | None) -> dict[str, Any]:
    checkpoint = port.checkpoint()
    state = dict(checkpoint["state_dict"])
    for name, tensor in tensors.items():
        key = "vlm_film_heads." + name.replace("_", ".")
        state.pop(key, None)
        if tensor is not None:
            state[key] = tensor
    return {**checkpoint, "state_dict": state}


@pytest.mark.parametrize(
    "checkpoint",
    [
        changed(PortModel(FILM_MODEL, [0, 1]), **{"1_mlp_0_weight": None}),
        changed(PortModel(FILM_MODEL, [0, 1]), **{"0_mlp_2_weight": torch.zeros(11, HIDDEN)}),
        changed(PortModel(FILM_MODEL, [0, 1]), **{"1_mlp_2_weight": torch.zeros(2 * WIDTHS[1], HIDDEN + 1)}),
        changed(PortModel(FILM_MODEL, [0, 1]), **{"1_mlp_0_weight": torch.zeros(HIDDEN, COND + 1)}),
        changed(PortModel(FILM_MODEL, [0, 1]), **{"2_mlp_0_weight": torch.zeros(HIDDEN, COND), "2_mlp_2_weight": torch.zeros(6, HIDDEN)}),
        changed(PortModel(FILM_MODEL, [0, 2])) | {"vlm_film_trained_stages": [0, 1]},
        PortModel(FILM_MODEL, [0]).checkpoint(vlm_film_decoder_stages=None),
        PortModel(FILM_MODEL, [0, 1]).checkpoint(vlm_film_decoder_stages=[0]),
        PortModel(FILM_MODEL, [0]).checkpoint(vlm_film_decoder_stages="0"),
        PortModel(FILM_MODEL, [0]).checkpoint(vlm_film_decoder_stages=[True]),
        PortModel(DIRECT_MODEL, None).checkpoint(channel_mult=[1, 2, 2, 2]),
        {**PortModel(FILM_MODEL, [0]).checkpoint(), "hyper_parameters": [1]},
        {"state_dict": {"vlm_film_heads.x.mlp.0.weight": torch.zeros(2, 2)}},
    ],
    ids=[
        "a layer is missing",
        "half a channel",
        "another hidden width",
        "another condition width",
        "a head too many",
        "widths of another stage",
        "null with one head",
        "fewer stages than heads",
        "text for stages",
        "a flag for a stage",
        "a decoder of four stages",
        "hyperparameters that are none",
        "no head has a number",
    ],
)
def test_heads_that_fit_neither_of_the_ports_models_are_refused(checkpoint: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="fits neither") as error:
        facts_of(checkpoint, "port.ckpt")
    assert {"checkpoint", "found", "expected"} <= error.value.facts.keys() and error.value.fix


def test_an_explicit_setting_that_loses_against_the_checkpoint_is_named_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    port = PortModel(FILM_MODEL, [0, 1])
    host = loaded(port.checkpoint(), environ={"VLM_FILM_DECODER_STAGES": "2", "VLM_FILM_COND_DIM": str(COND)})
    assert [stage.index for stage in host.unet.vlm_film.architecture.stages] == [0, 1]
    lines = [line for line in capsys.readouterr().out.splitlines() if "is not used" in line]
    assert len(lines) == 1
    assert "decoder_stages=[2]" in lines[0] and "VLM_FILM_DECODER_STAGES" in lines[0] and "[0, 1]" in lines[0] and "port.ckpt" in lines[0]


def test_our_export_to_the_ports_layout_says_where_its_heads_act(capsys: pytest.CaptureFixture[str]) -> None:
    host = loaded(PortModel(FILM_MODEL, [1, 2]).checkpoint())
    capsys.readouterr()
    to_port_layout(host.state_dict())
    assert "act post_block1 at stages [1, 2]" in capsys.readouterr().out


def test_junction_gating_of_the_hyperparameters_is_a_default_and_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    block = {"enabled": True, "source": "pred", "radius_px": 3, "warmup_epochs": 0}
    checkpoint = PortModel(FILM_MODEL, None).checkpoint(junction_gating_config=block)
    facts = facts_of(checkpoint, "c")
    assert facts is not None
    assert facts.gate == {"junction_gating_config": block}
    loaded(checkpoint)
    assert "in force as the setting" in capsys.readouterr().out
    settings = resolve_with(facts, {})
    assert settings.is_explicit("junction_gating_config") and settings.as_dict()["junction_gating_config"]["radius_px"] == 3
    assert resolve_with(facts, {}, arguments={"junction_gating_config": None}).as_dict()["junction_gating_config"] is None
    loaded(PortModel(FILM_MODEL, None).checkpoint())
    assert "junction" not in capsys.readouterr().out
