"""FiLM in checkpoints: metadata, the soft-seg port's layout both ways, and optimizer state by parameter name."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_unet import SmallUNet, inputs, randomise
from torch import Tensor, nn

from vlmfilm_plugin.checkpoints.facts import resolve_with
from vlmfilm_plugin.checkpoints.metadata import adapt, write_metadata
from vlmfilm_plugin.checkpoints.optimizer_state import match_at_load, names_by_group
from vlmfilm_plugin.checkpoints.peek import facts_of, peek
from vlmfilm_plugin.checkpoints.soft_seg_layout import to_port_layout
from vlmfilm_plugin.errors import CheckpointError
from vlmfilm_plugin.film.feature_statistics import Facts, made_of
from vlmfilm_plugin.film.freezing import keep_trainable
from vlmfilm_plugin.film.module import FilmModule
from vlmfilm_plugin.forward.attach import install
from vlmfilm_plugin.forward.context import in_force
from vlmfilm_plugin.forward.given_features import GivenFeatures
from vlmfilm_plugin.settings.layers import resolve
from vlmfilm_plugin.settings.record import Settings

FEATURES = 5
TRAINING = torch.randn(64, FEATURES, generator=torch.Generator().manual_seed(99)) + 1
PORT_NAMES = re.compile(
    r"vlm_film_heads\.\d+\.(ln|mlp\.0|mlp\.2)\.(weight|bias)"
    r"|vlm_film_conditioner\.(image_to_cond\.(proj|ln)|text_to_cond\.mlp\.[02])\.(weight|bias)"
)


class Root(nn.Module):
    """A model around a UNet, with parameters of its own before and after it."""

    def __init__(self, *, has_film: bool = True, seed: int = 0, is_ema: bool = False, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.scale = nn.Parameter(torch.randn(1))
        self.unet = SmallUNet()
        self.settings = settings_of(**settings)
        if has_film:
            install(self.unet, self.settings, "on", feature_dim=FEATURES)
            randomise(self.unet.vlm_film, seed)
        if is_ema:
            self.ema = copy.deepcopy(self.unet)
        self.norm = nn.BatchNorm2d(1)
        self.tail = nn.Conv2d(1, 1, 1)

    def forward(self, seed: int) -> Tensor:
        x, t, cond = inputs(3, seed=seed)
        if not hasattr(self.unet, "vlm_film"):
            return self.tail(self.norm(self.unet(self.scale * x, t, cond)))
        given = torch.randn(3, FEATURES, generator=torch.Generator().manual_seed(seed))
        film = self.unet.vlm_film
        if film.waits:  # as a run does before its first step
            film.take_statistics(made_of(TRAINING, Facts(None, "train", "a test"), film.architecture.feature_transform))
        with in_force(GivenFeatures(self.unet.vlm_film.film_id, given)):
            return self.tail(self.norm(self.unet(self.scale * x, t, cond)))


def settings_of(**settings: Any) -> Settings:
    return resolve([("argument", {"cond_dim": 4, "text_mlp_hidden_dim": 6, "gamma_scale": None, "beta_scale": None, **settings})])


def checkpoint_of(model: Root) -> dict[str, Any]:
    checkpoint: dict[str, Any] = {"state_dict": {name: value.clone() for name, value in model.state_dict().items()}, "epoch": 3}
    write_metadata(model, model.settings, checkpoint)
    return checkpoint


def port_checkpoint(model: Root, **changes: Any) -> dict[str, Any]:
    """Return a checkpoint as the soft-seg port's `FlowModel(use_vlm_film=True)` writes it, made from ours."""
    hyperparameters = {"use_vlm_film": True, "vlm_film_config": {"model_name": "m", "cond_dim": 4, "gamma_scale": 0.1}}
    return {"state_dict": to_port_layout(model.state_dict()), "hyper_parameters": hyperparameters, **changes}


# Metadata


def test_metadata_says_architecture_encoder_and_stages_in_plain_values() -> None:
    checkpoint = checkpoint_of(Root(decoder_stages=[1], encoder="descriptor"))
    assert checkpoint["vlm_film_trained_stages"] == [1]
    facts = facts_of(checkpoint, "c.ckpt")
    assert facts is not None
    assert facts.encoder["encoder"] == "descriptor"
    assert facts.architecture == {
        "decoder_stages": [1],
        "apply_point": "post_block2",
        "blocks": "all",
        "cond_dim": 4,
        "text_mlp_hidden_dim": 6,
        "gamma_scale": None,
        "beta_scale": None,
        "cond_layernorm": True,
        "head": "film",
        "feature_transform": ("center",),
        "feature_control": "none",
    }


def test_a_baseline_gets_no_metadata_and_has_no_facts() -> None:
    checkpoint = checkpoint_of(Root(has_film=False))
    assert set(checkpoint) == {"state_dict", "epoch"}
    assert facts_of(checkpoint, "c.ckpt") is None


def test_settings_built_from_a_checkpoints_facts_rebuild_its_film_strictly() -> None:
    saved = Root(seed=1, decoder_stages=[0], apply_point="post_block1", gamma_scale=0.3, cond_layernorm=False, cond_dim=7)
    checkpoint = checkpoint_of(saved)
    facts = facts_of(checkpoint, "c.ckpt")
    assert facts is not None
    rebuilt = Root(seed=2, **resolve([("encoder", facts.encoder), ("architecture", facts.architecture)]).as_dict())
    adapt(rebuilt, checkpoint, rebuilt.settings)
    rebuilt.load_state_dict(checkpoint["state_dict"], strict=True)
    assert torch.equal(rebuilt(0), saved(0))


@pytest.mark.parametrize("is_nested", [True, False])
def test_a_bare_state_dict_still_says_its_architecture(is_nested: bool) -> None:
    state = Root(decoder_stages=[1]).state_dict()
    facts = facts_of({"state_dict": state} if is_nested else state, "w.pt")
    assert facts is not None
    assert facts.architecture["decoder_stages"] == [1]
    assert facts.encoder == {}


def test_peek_reads_a_file_and_leaves_everything_else_alone(tmp_path: Path) -> None:
    torch.save(checkpoint_of(Root(decoder_stages=[1])), tmp_path / "film.ckpt")
    torch.save(checkpoint_of(Root(has_film=False)), tmp_path / "plain.ckpt")
    torch.save([1, 2], tmp_path / "list.ckpt")
    torch.save(checkpoint_of(Root()), tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    found = peek(tmp_path / "film.ckpt")
    assert found is not None
    assert found.architecture["decoder_stages"] == [1]
    assert found.path == str(tmp_path / "film.ckpt")
    assert peek(str(tmp_path / "old.ckpt")) is not None
    assert [
        peek(item) for item in (tmp_path / "plain.ckpt", tmp_path / "list.ckpt", tmp_path / "none.ckpt", tmp_path, None, 3, "last", "s3://x/y")
    ] == [None] * 8


def test_a_checkpoint_of_before_decides_that_features_are_used_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = checkpoint_of(Root(feature_transform="none"))
    described = checkpoint["vlm_film"]["architecture"]
    assert described["readable_by"] == 2
    checkpoint["vlm_film"]["architecture"] = {name: value for name, value in described.items() if name != "feature_transform"} | {"format": 2}
    facts = facts_of(checkpoint, "old.ckpt")
    assert resolve_with(facts, {}).feature_transform == () and "is not used" not in capsys.readouterr().out
    assert resolve_with(facts, {"VLM_FILM_FEATURE_TRANSFORM": "center"}).feature_transform == ()
    assert "feature_transform=['center'] is not used (from environment" in capsys.readouterr().out
    centred = facts_of(checkpoint_of(Root()), "new.ckpt")
    assert (
        resolve_with(centred, {}).feature_transform == ("center",) == resolve_with(centred, {"VLM_FILM_FEATURE_TRANSFORM": "none"}).feature_transform
    )


def test_metadata_survives_weights_only_loading(tmp_path: Path) -> None:
    torch.save(checkpoint_of(Root()), tmp_path / "c.ckpt")
    loaded = torch.load(tmp_path / "c.ckpt", weights_only=True)
    assert facts_of(loaded, "c") == facts_of(checkpoint_of(Root()), "c")


# The port's layout


def test_our_film_is_written_under_exactly_the_ports_names() -> None:
    model = Root()
    port = to_port_layout(model.state_dict())
    film = {name for name in port if name.startswith("vlm_film")}
    assert film == {name for name in port if PORT_NAMES.fullmatch(name)}
    assert len(film) == len([name for name, _ in model.unet.vlm_film.named_parameters()])
    assert {name for name in port if name not in film} == {name for name in model.state_dict() if "vlm_film" not in name}
    assert torch.equal(port["vlm_film_heads.1.mlp.2.weight"], model.unet.vlm_film.heads[1].mlp[2].weight)
    assert torch.equal(port["vlm_film_conditioner.image_to_cond.proj.bias"], model.unet.vlm_film.image_to_cond.proj.bias)


def test_a_round_trip_through_the_ports_layout_gives_the_same_output() -> None:
    saved, loaded = Root(seed=1, feature_transform="none"), Root(seed=2)
    checkpoint = port_checkpoint(saved)
    adapt(loaded, checkpoint, loaded.settings)
    loaded.load_state_dict(checkpoint["state_dict"], strict=True)
    assert torch.equal(loaded(0), saved(0))
    again = to_port_layout(loaded.state_dict())
    assert again.keys() == to_port_layout(saved.state_dict()).keys()


@pytest.mark.parametrize("settings", [{}, {"feature_transform": "standardize"}, {"use_text_prompt_cond": True}], ids=str)
def test_a_transform_is_worked_into_the_first_layer_of_the_ports_layout(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    is_text = {name: value for name, value in settings.items() if name != "feature_transform"}
    saved, loaded = Root(seed=1, **settings), Root(seed=2, **is_text)
    expected = saved(0)
    checkpoint = port_checkpoint(saved)
    assert "is worked into" in capsys.readouterr().out
    adapt(loaded, checkpoint, loaded.settings)
    loaded.load_state_dict(checkpoint["state_dict"], strict=True)
    assert loaded.unet.vlm_film.feature_transform is None
    torch.testing.assert_close(loaded(0), expected)
    with pytest.raises(CheckpointError, match="cannot hold this transform"):
        to_port_layout(Root(feature_transform=["center", "l2norm"]).state_dict())


def test_the_ports_film_does_not_load_where_a_transform_was_asked_for() -> None:
    loaded = Root(seed=2, feature_transform="center")
    with pytest.raises(CheckpointError, match="in another way") as caught:
        adapt(loaded, port_checkpoint(Root(seed=1)), loaded.settings)
    assert "feature_transform=center" in str(caught.value) and "feature_transform none" in str(caught.value)


def test_the_ports_text_mode_loads_into_text_mode() -> None:
    saved, loaded = Root(seed=1, use_text_prompt_cond=True, feature_transform="none"), Root(seed=2, use_text_prompt_cond=True)
    checkpoint = port_checkpoint(saved)
    assert any(name.startswith("vlm_film_conditioner.text_to_cond.mlp.2") for name in checkpoint["state_dict"])
    adapt(loaded, checkpoint, loaded.settings)
    loaded.load_state_dict(checkpoint["state_dict"], strict=True)
    assert torch.equal(loaded(0), saved(0))


def test_a_port_checkpoint_is_read_as_unbounded_with_its_widths_and_model() -> None:
    facts = facts_of(port_checkpoint(Root(cond_layernorm=False)), "c")
    assert facts is not None
    assert facts.encoder == {"model_name": "m"}
    assert facts.architecture == {
        "decoder_stages": [0, 1],
        "apply_point": "post_block2",
        "cond_dim": 4,
        "text_mlp_hidden_dim": 6,
        "gamma_scale": None,
        "beta_scale": None,
        "cond_layernorm": False,
        "head": "film",
        "feature_transform": [],
    }


def without(name: str, state: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if not key.startswith(name)}


@pytest.mark.parametrize(
    "change",
    [
        lambda state: without("vlm_film_heads.1.", state),
        lambda state: without("vlm_film_heads.1.ln.bias", state),
        lambda state: without("vlm_film_conditioner.", state),
        lambda state: {**state, "vlm_film_heads.2.mlp.0.weight": torch.zeros(6, 4)},
        lambda state: {**state, "vlm_film_heads.0.mlp.2.weight": torch.zeros(8, 6)},
        lambda state: {**state, "vlm_film_conditioner.image_to_cond.proj.weight": torch.zeros(4, FEATURES + 1)},
    ],
    ids=["missing head", "missing tensor", "no projection", "extra head", "wrong channels", "wrong feature width"],
)
def test_port_film_that_does_not_fit_is_refused_by_name(change: Any) -> None:
    checkpoint = port_checkpoint(Root(seed=1))
    checkpoint["state_dict"] = change(checkpoint["state_dict"])
    with pytest.raises(CheckpointError, match=r"does not fit|acts elsewhere|fits neither"):
        adapt(Root(seed=2), checkpoint, settings_of())


def test_port_heads_without_the_first_are_refused_when_peeked() -> None:
    with pytest.raises(CheckpointError, match="vlm_film_heads"):
        facts_of({"state_dict": {"vlm_film_heads.1.mlp.0.weight": torch.zeros(1)}}, "c")


def test_text_weights_beside_image_mode_are_left_out_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    saved, loaded = Root(seed=1, feature_transform="none"), Root(seed=2)
    checkpoint = port_checkpoint(saved)
    checkpoint["state_dict"]["vlm_film_conditioner.text_to_cond.mlp.0.weight"] = torch.zeros(6, 9)
    adapt(loaded, checkpoint, loaded.settings)
    loaded.load_state_dict(checkpoint["state_dict"], strict=True)
    assert torch.equal(loaded(0), saved(0))
    assert "vlm_film_conditioner.text_to_cond.mlp.0.weight" in capsys.readouterr().out


def test_every_copy_of_the_unet_gets_the_ports_weights_and_shares_no_memory() -> None:
    saved, loaded = Root(seed=1), Root(seed=2, is_ema=True)
    checkpoint = port_checkpoint(saved)
    checkpoint["state_dict"].update({f"ema.{name}": value for name, value in saved.unet.state_dict().items() if "vlm_film" not in name})
    adapt(loaded, checkpoint, loaded.settings)
    loaded.load_state_dict(checkpoint["state_dict"], strict=True)
    films = [module for module in loaded.modules() if isinstance(module, FilmModule)]
    assert len(films) == 2
    for film in films:
        assert torch.equal(film.heads[0].mlp[2].weight, saved.unet.vlm_film.heads[0].mlp[2].weight)
    state = checkpoint["state_dict"]
    assert state["unet.vlm_film.heads.0.mlp.2.weight"].data_ptr() != state["ema.vlm_film.heads.0.mlp.2.weight"].data_ptr()


def test_the_port_layout_of_a_model_with_an_ema_copy_has_each_name_once() -> None:
    model = Root(is_ema=True)
    randomise(model.ema.vlm_film, 9)
    port = to_port_layout(model.state_dict())
    assert torch.equal(port["vlm_film_heads.0.mlp.2.weight"], model.unet.vlm_film.heads[0].mlp[2].weight)
    assert all(PORT_NAMES.fullmatch(name) for name in port if "vlm_film" in name)


def test_a_state_dict_without_film_has_no_port_layout() -> None:
    with pytest.raises(CheckpointError):
        to_port_layout(Root(has_film=False).state_dict())


@pytest.mark.parametrize("checkpoint", [{}, {"state_dict": None}, {"state_dict": {}}, {"epoch": 1}])
def test_adapting_an_odd_checkpoint_changes_nothing(checkpoint: dict[str, Any]) -> None:
    before = copy.deepcopy(checkpoint)
    adapt(Root(), checkpoint, settings_of())
    assert checkpoint == before


def test_a_model_without_film_is_left_to_its_host() -> None:
    checkpoint = port_checkpoint(Root())
    names = list(checkpoint["state_dict"])
    adapt(Root(has_film=False), checkpoint, settings_of())
    assert list(checkpoint["state_dict"]) == names


# Optimizer state


def train(model: Root, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        model(step).square().mean().backward()
        optimizer.step()


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return configured(model, torch.optim.AdamW(model.parameters(), lr=1e-2))


def configured(model: nn.Module, optimizer: torch.optim.AdamW) -> torch.optim.AdamW:
    """Return an optimizer as a host's `configure_optimizers` would have returned it."""
    match_at_load(model, optimizer, names_by_group(model, optimizer))
    return optimizer


def trained(**kind: Any) -> tuple[Root, torch.optim.AdamW, dict[str, Any]]:
    model = Root(seed=1, **kind)
    optimizer = adamw(model)
    train(model, optimizer, range(4))
    checkpoint = checkpoint_of(model)
    checkpoint["optimizer_states"] = [copy.deepcopy(optimizer.state_dict())]
    return model, optimizer, checkpoint


def momenta(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {name: optimizer.state[parameter]["exp_avg"] for name, parameter in model.named_parameters() if parameter in optimizer.state}


def resumed(checkpoint: dict[str, Any]) -> tuple[Root, torch.optim.AdamW]:
    model = Root(seed=2)
    adapt(model, checkpoint, model.settings)
    model.load_state_dict(checkpoint["state_dict"], strict=True)
    optimizer = adamw(model)
    optimizer.load_state_dict(checkpoint["optimizer_states"][0])
    return model, optimizer


def test_a_baselines_optimizer_state_meets_the_parameters_of_the_same_name() -> None:
    plain, plain_optimizer, checkpoint = trained(has_film=False)
    model, optimizer = resumed(checkpoint)
    expected, found = momenta(plain, plain_optimizer), momenta(model, optimizer)
    assert found.keys() == expected.keys() == {name for name, _ in model.named_parameters() if "vlm_film" not in name}
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    train(model, optimizer, range(4, 6))
    assert momenta(model, optimizer).keys() == dict(model.named_parameters()).keys()


def test_a_baseline_that_goes_on_with_identity_film_takes_the_very_same_step() -> None:
    plain, plain_optimizer, checkpoint = trained(has_film=False)
    model = Root(seed=2)
    install_fresh(model)
    adapt(model, checkpoint, model.settings)
    model.load_state_dict(checkpoint["state_dict"], strict=True)
    optimizer = adamw(model)
    optimizer.load_state_dict(checkpoint["optimizer_states"][0])
    train(model, optimizer, range(4, 5))
    train(plain, plain_optimizer, range(4, 5))
    for name, parameter in plain.named_parameters():
        assert torch.equal(dict(model.named_parameters())[name], parameter), name


def install_fresh(model: Root) -> None:
    """Replace the moved FiLM by a fresh one, at the place where the first stood."""
    del model.unet.vlm_film
    for module in model.unet.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            hooks.clear()
    install(model.unet, model.settings, "on", feature_dim=FEATURES)


def test_the_ports_optimizer_state_meets_the_parameters_of_the_same_meaning() -> None:
    saved, optimizer, checkpoint = trained()
    # The port's own order: its FiLM stands at the root, before or after the UNet.
    ours = [name for name, _ in saved.named_parameters()]
    port_name = {}
    for name in ours:
        own = name.removeprefix("unet.vlm_film.")
        port_name[name] = (
            name if own == name else own.replace("heads.", "vlm_film_heads.", 1) if own.startswith("heads.") else f"vlm_film_conditioner.{own}"
        )
    order = sorted(ours, key=lambda name: (not port_name[name].startswith("vlm_film"), ours.index(name)))
    state = saved.state_dict()
    port_state = {port_name[name]: state[name] for name in order} | {
        name: value for name, value in state.items() if name not in ours and "vlm_film" not in name
    }
    old = checkpoint["optimizer_states"][0]
    port = {
        "state_dict": port_state,
        "hyper_parameters": {"use_vlm_film": True},
        "optimizer_states": [{"state": {order.index(name): old["state"][i] for i, name in enumerate(ours)}, "param_groups": old["param_groups"]}],
    }
    model, found = resumed(port)
    expected = momenta(saved, optimizer)
    assert all(torch.equal(value, expected[name]) for name, value in momenta(model, found).items())
    assert momenta(model, found).keys() == expected.keys()


def test_port_optimizer_state_with_unused_weights_is_matched_or_refused_never_shifted() -> None:
    saved, optimizer, checkpoint = trained()
    state = to_port_layout(saved.state_dict())
    names = list(state)
    extra = "vlm_film_conditioner.text_to_cond.mlp.0.weight"
    first = next(i for i, name in enumerate(names) if name.startswith("vlm_film"))
    order = [*names[:first], extra, *names[first:]]
    checkpoint["state_dict"] = {name: state.get(name, torch.zeros(6, 9)) for name in order}
    group = checkpoint["optimizer_states"][0]["param_groups"][0]
    group["params"] = list(range(len(group["params"]) + 1))
    try:
        model, found = resumed(checkpoint)
    except CheckpointError:
        return
    expected = momenta(saved, optimizer)
    assert all(torch.equal(value, expected[name]) for name, value in momenta(model, found).items())


def test_a_film_runs_own_optimizer_state_is_left_as_it_is() -> None:
    saved, optimizer, checkpoint = trained()
    before = copy.deepcopy(checkpoint["optimizer_states"][0]["param_groups"])
    model, found = resumed(checkpoint)
    assert checkpoint["optimizer_states"][0]["param_groups"] == before
    expected = momenta(saved, optimizer)
    assert all(torch.equal(value, expected[name]) for name, value in momenta(model, found).items())


Groups = Callable[[nn.Module], list[dict[str, Any]]]


def by_decay(model: nn.Module) -> list[dict[str, Any]]:
    named = list(model.named_parameters())
    return [
        {"params": [p for n, p in named if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for n, p in named if p.ndim <= 1], "weight_decay": 0.0, "lr": 1e-3},
    ]


def reversed_order(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": list(model.parameters())[::-1]}]


def but_the_first(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": list(model.parameters())[1:]}]


@pytest.mark.parametrize("groups", [by_decay, reversed_order, but_the_first])
@pytest.mark.parametrize("has_film", [False, True])
def test_whatever_groups_a_host_makes_are_matched_by_name(groups: Groups, has_film: bool) -> None:
    saved = Root(seed=1, has_film=has_film)
    before = torch.optim.AdamW(groups(saved), lr=1e-2)
    train(saved, before, range(2))
    checkpoint = {"state_dict": saved.state_dict(), "optimizer_states": [copy.deepcopy(before.state_dict())]}
    model = Root(seed=2)
    adapt(model, checkpoint, model.settings)
    model.load_state_dict(checkpoint["state_dict"])  # evaluation, and that is all of it
    after = configured(model, torch.optim.AdamW(groups(model), lr=5.0))
    after.load_state_dict(checkpoint["optimizer_states"][0])
    expected, found = momenta(saved, before), momenta(model, after)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert [(group["lr"], group["weight_decay"]) for group in after.param_groups] == [(g["lr"], g["weight_decay"]) for g in before.param_groups]
    train(model, after, range(2, 3))


def frozen(model: Root, is_frozen: bool) -> torch.optim.AdamW:
    """Configure the optimizer of a model whose host may be frozen, as the runtime does."""
    whole = torch.optim.AdamW(by_decay(model), lr=1e-2)
    names = names_by_group(model, whole)
    if is_frozen:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("vlm_film" in name)
        keep_trainable(whole)
    match_at_load(model, whole, names)
    return whole


@pytest.mark.parametrize(("then", "now"), [(True, False), (False, True), (True, True), ("plain", True)])
def test_resuming_across_a_change_of_freeze_host_matches_by_name(then: bool | str, now: bool, capsys: pytest.CaptureFixture[str]) -> None:
    saved = Root(seed=1, has_film=then != "plain")
    before = frozen(saved, then is True)
    train(saved, before, range(2))
    checkpoint = {"state_dict": saved.state_dict(), "optimizer_states": [copy.deepcopy(before.state_dict())]}
    model = Root(seed=2)
    adapt(model, checkpoint, model.settings)
    model.load_state_dict(checkpoint["state_dict"])
    after = frozen(model, now)
    after.load_state_dict(checkpoint["optimizer_states"][0])
    expected, found = momenta(saved, before), momenta(model, after)
    trained_now = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert found.keys() == expected.keys() & trained_now
    assert all(torch.equal(found[name], expected[name]) for name in found)
    lines = [line for line in capsys.readouterr().out.splitlines() if "optimizer state resumed by name" in line]
    assert len(lines) == (then != now)
    train(model, after, range(2, 4))
    assert momenta(model, after).keys() >= trained_now


def test_groups_that_cannot_be_the_saved_ones_are_refused_at_resuming_and_evaluate() -> None:
    saved = Root(seed=1, has_film=False)
    before = torch.optim.AdamW(by_decay(saved))
    train(saved, before, range(1))
    checkpoint = {"state_dict": saved.state_dict(), "optimizer_states": [before.state_dict()]}
    model = Root(seed=2)
    adapt(model, checkpoint, model.settings)
    model.load_state_dict(checkpoint["state_dict"])
    with pytest.raises(CheckpointError, match="2 parameter groups"):
        adamw(model).load_state_dict(checkpoint["optimizer_states"][0])


@pytest.mark.parametrize("wrap", ["unet._orig_mod.", "_orig_mod.unet.", "module.unet._orig_mod."])
@pytest.mark.parametrize("has_film", [False, True])
def test_a_checkpoint_of_a_compiled_or_wrapped_model_loads(wrap: str, has_film: bool) -> None:
    saved = Root(seed=1, has_film=has_film)
    state = saved.state_dict()
    checkpoint = {"state_dict": {wrap + name.removeprefix("unet.") if name.startswith("unet.") else name: value for name, value in state.items()}}
    model = Root(seed=2)
    adapt(model, checkpoint, model.settings)
    model.load_state_dict(checkpoint["state_dict"])
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
