"""Attaching FiLM: all or nothing, exactly undone, and carried by every copy, pickle and state dict of the UNet."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_unet import SmallUNet, inputs, randomise
from torch import Tensor, nn

import vlmfilm_plugin.film.module as film_module
from vlmfilm_plugin.errors import (
    CheckpointError,
    ConditionError,
    EncoderError,
    FeatureError,
    HostError,
    ImageReadError,
    SettingsError,
    TargetMatchError,
    VlmFilmError,
)
from vlmfilm_plugin.forward import context as conditioning
from vlmfilm_plugin.forward.attach import attach
from vlmfilm_plugin.forward.handle import FilmHandle

FEATURES = 5
SMALL = {"cond_dim": 4, "text_mlp_hidden_dim": 6}


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLM_FILM_MODE", "VLM_FILM_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    torch.manual_seed(0)


def build(
    mode: str | None = None, monkeypatch: pytest.MonkeyPatch | None = None, *, seed: int = 0, is_moved: bool = True, **settings: Any
) -> FilmHandle:
    if mode is not None:
        assert monkeypatch is not None
        monkeypatch.setenv("VLM_FILM_MODE", mode)
    torch.manual_seed(seed)
    handle = attach(SmallUNet(), **{"feature_dim": FEATURES, **SMALL, **settings})
    if is_moved:
        randomise(handle.film, seed)
    return handle


def features(rows: int = 3, seed: int = 1, width: int = FEATURES) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def call(handle: FilmHandle, given: Tensor | None = None, unet: nn.Module | None = None, rows: int = 3) -> Tensor:
    with handle.condition(features=features(rows) if given is None else given), torch.no_grad():
        return (unet or handle.unet)(*inputs(rows))


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Return the `__dict__` of every module, containers copied one level deep, so that any change shows."""
    return {
        name: {key: dict(value) if isinstance(value, dict) else value for key, value in vars(module).items()}
        for name, module in model.named_modules()
    }


# All or nothing


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"decoder_stages": [0, 2]}, TargetMatchError),
        ({"targets": "downs.*.1"}, TargetMatchError),
        ({"targets": "ups.*"}, HostError),
        ({"feature_dim": None, "encoder": "descriptr"}, EncoderError),
        ({"feature_dim": None, "encoder": "qwen2_5_vl", "model_name": "/no/such/folder"}, EncoderError),
        ({"apply_point": "post_block3"}, SettingsError),
        ({"feature_dim": -1}, Exception),
        ({"feature_dim": "five"}, Exception),
        ({"cond_dim": 0}, SettingsError),
        ({"conddim": 4}, SettingsError),
    ],
)
def test_a_refused_attach_leaves_every_module_as_it_was(settings: dict[str, Any], error: type[Exception]) -> None:
    unet = SmallUNet()
    if settings.get("targets") == "ups.*":
        unet.ups = nn.ModuleList([nn.ModuleList([nn.Identity()])])
    before, state = snapshot(unet), torch.get_rng_state()
    with pytest.raises(error):
        attach(unet, **{"feature_dim": FEATURES, **settings})
    assert snapshot(unet) == before
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("feature_dim", [0, -1, "five"])
def test_a_bad_feature_dim_is_refused_by_our_own_error(feature_dim: Any) -> None:
    with pytest.raises(VlmFilmError):
        attach(SmallUNet(), feature_dim=feature_dim)


@pytest.mark.parametrize("mode", ["", "On", "of"])
def test_a_wrong_mode_is_refused_before_anything_changes(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = SmallUNet()
    before = snapshot(unet)
    monkeypatch.setenv("VLM_FILM_MODE", mode)
    with pytest.raises(SettingsError):
        attach(unet, feature_dim=FEATURES)
    assert snapshot(unet) == before


def test_attaching_twice_is_refused_and_the_first_stays_whole() -> None:
    handle = build()
    expected = call(handle)
    with pytest.raises(HostError, match="already"):
        attach(handle.unet, feature_dim=FEATURES)
    assert torch.equal(call(handle), expected)


# Removing


def test_remove_restores_exactly_and_is_idempotent() -> None:
    unet = SmallUNet()
    mine = unet.ups[0][1].register_forward_hook(lambda *_: None)
    before, plain = snapshot(unet), unet(*inputs(3))
    handle = attach(unet, feature_dim=FEATURES, **SMALL)
    randomise(handle.film)
    assert snapshot(unet) != before
    handle.remove()
    assert snapshot(unet) == before
    assert torch.equal(unet(*inputs(3)), plain)
    handle.remove()
    attach(unet, feature_dim=FEATURES, **SMALL)
    handle.remove()
    assert hasattr(unet, "vlm_film")
    mine.remove()


def test_the_handle_works_as_a_context_and_removes_when_the_block_raises() -> None:
    unet = SmallUNet()
    before = snapshot(unet)
    with pytest.raises(KeyError), attach(unet, feature_dim=FEATURES):
        raise KeyError
    assert snapshot(unet) == before


def test_remove_leaves_hooks_added_later_by_others() -> None:
    handle, seen = build(), []
    handle.unet.ups[0][1].register_forward_hook(lambda *_: seen.append(1))
    handle.remove()
    handle.unet(*inputs(2))
    assert seen == [1]


# Random stream


def test_attaching_draws_nothing_from_the_random_stream() -> None:
    unet = SmallUNet()
    state = torch.get_rng_state()
    attach(unet, feature_dim=FEATURES)
    assert torch.equal(torch.get_rng_state(), state)


def loss_curve(mode: str | None, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    torch.manual_seed(0)
    unet = SmallUNet()
    if mode is not None:
        monkeypatch.setenv("VLM_FILM_MODE", mode)
        handle = attach(unet, feature_dim=FEATURES, **SMALL)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-2)
    losses = []
    for step in range(4):
        x, t, cond = inputs(3, seed=step)
        noise = torch.randn_like(x)
        if mode is None:
            out = unet(x + noise, t, cond)
        else:
            with handle.condition(features=features(seed=step)):
                out = unet(x + noise, t, cond)
        loss = (nn.functional.dropout(out, 0.5) - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_training_run_is_bit_identical_in_off_and_at_its_first_step_in_on(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = loss_curve(None, monkeypatch)
    assert loss_curve("off", monkeypatch) == plain
    on = loss_curve("on", monkeypatch)
    assert on[0] == plain[0]
    assert on[2:] != plain[2:]


# Modes


def test_off_is_bit_identical_whatever_the_heads_hold_and_nothing_of_film_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = SmallUNet()
    handle = build("off", monkeypatch)
    plain.load_state_dict({name: value for name, value in handle.unet.state_dict().items() if "vlm_film" not in name})
    assert torch.equal(handle.unet(*inputs(3)), plain(*inputs(3)))
    assert torch.equal(call(handle), plain(*inputs(3)))
    assert not any(parameter.requires_grad for parameter in handle.film.parameters())
    handle.unet(*inputs(3)).sum().backward()
    assert all(parameter.grad is None for parameter in handle.film.parameters())


def test_a_fresh_attachment_is_the_identity_to_the_bit() -> None:
    plain = SmallUNet()
    handle = build(is_moved=False)
    plain.load_state_dict({name: value for name, value in handle.unet.state_dict().items() if "vlm_film" not in name})
    assert torch.equal(call(handle), plain(*inputs(3)))


def test_on_depends_on_the_features_row_by_row() -> None:
    handle = build()
    a, b = call(handle), features()
    b[1] += 1
    changed = (call(handle, b) != a).flatten(1).any(dim=1)
    assert changed.tolist() == [False, True, False]


def test_shuffle_gives_no_row_its_own_condition(monkeypatch: pytest.MonkeyPatch) -> None:
    on, given = build(), features(4)
    shuffled = build("shuffle", monkeypatch)
    expected, found = call(on, given, rows=4), call(shuffled, given, rows=4)
    assert (found != expected).flatten(1).any(dim=1).all()
    with torch.no_grad():
        x, t, cond = (part[:1] for part in inputs(4))
        with on.condition(features=given):
            candidates = on.unet(x.expand(4, -1, -1, -1), t.expand(4), cond.expand(4, -1, -1, -1))
    assert sum(torch.allclose(found[0], candidate, atol=1e-6) for candidate in candidates[1:]) == 1
    assert torch.equal(found, call(shuffled, given, rows=4))


# Conditions


def test_one_feature_is_broadcast_to_all_rows() -> None:
    handle, one = build(), features(1)
    torch.testing.assert_close(call(handle, one), call(handle, one.expand(3, -1)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("given", [2, 4, 6, 0])
def test_a_row_mismatch_is_refused(given: int) -> None:
    handle = build()
    with pytest.raises(ConditionError):
        call(handle, features(given))
    assert not conditioning.stacks.contexts


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_features_that_are_not_finite_are_refused_with_their_row(bad: float) -> None:
    given = features()
    given[2, 3] = bad
    with pytest.raises(FeatureError, match="row 2"):
        call(build(), given)


@pytest.mark.parametrize("given", [torch.zeros(3, FEATURES + 1), torch.zeros(FEATURES), torch.zeros(3, FEATURES, 1), torch.zeros(3, 1)])
def test_features_of_the_wrong_width_or_shape_are_refused(given: Tensor) -> None:
    with pytest.raises(FeatureError) as caught:
        call(build(), given)
    assert caught.value.facts["got"] == tuple(given.shape)


def test_both_or_neither_of_features_and_images_are_refused() -> None:
    handle = build()
    with pytest.raises(ConditionError), handle.condition():
        pass
    with pytest.raises(ConditionError), handle.condition(features=features(), images=[]):
        pass


def test_no_condition_in_force_is_refused_also_after_one_was() -> None:
    handle = build()
    call(handle)
    with pytest.raises(ConditionError, match="no condition in force"):
        handle.unet(*inputs(3))
    assert not conditioning.stacks.contexts


def test_half_and_double_features_are_taken() -> None:
    handle = build()
    expected = call(handle)
    torch.testing.assert_close(call(handle, features().double()), expected)
    torch.testing.assert_close(call(handle, features().half()), expected, rtol=1e-2, atol=1e-2)


def test_keyword_arguments_in_any_order_are_the_same_call() -> None:
    handle = build()
    expected = call(handle)
    x, t, cond = inputs(3)
    with handle.condition(features=features()), torch.no_grad():
        assert torch.equal(handle.unet(cond=cond, x=x, time=t), expected)
        assert torch.equal(handle.unet(x, cond=cond, time=t), expected)


class ScalarTime(SmallUNet):
    def forward(self, x: Tensor, time: float, cond: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, torch.full((x.shape[0],), float(time)), cond)


def test_a_scalar_that_is_passed_first_by_keyword_is_not_taken_for_the_rows() -> None:
    handle = attach(ScalarTime(), feature_dim=FEATURES, **SMALL)
    x, _, cond = inputs(3)
    with handle.condition(features=features()):
        expected = handle.unet(x, 0.5, cond)
        assert torch.equal(handle.unet(time=0.5, x=x, cond=cond), expected)


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 24), dtype=np.uint8))


@pytest.fixture
def described(tmp_path: Path) -> FilmHandle:
    return build(feature_dim=None, encoder="descriptor", cache_dir=str(tmp_path / "cache"))


def test_images_are_encoded_by_the_encoder_of_the_settings(described: FilmHandle, tmp_path: Path) -> None:
    from vlmfilm_plugin.encoders.descriptor import DescriptorEncoder

    pictures = [picture(i) for i in range(3)]
    picture(1).save(tmp_path / "one.png")
    by_hand = DescriptorEncoder().encode([p.convert("RGB") for p in pictures]).half().float()
    assert described.feature_dim == by_hand.shape[1]
    expected = call(described, by_hand)
    for images in (pictures, [pictures[0], tmp_path / "one.png", np.asarray(pictures[2])]):
        with described.condition(images=images), torch.no_grad():
            assert torch.equal(described.unet(*inputs(3)), expected)
    # A path is its file, whose feature a warm-up may have stored; the other three are pixels.
    assert described._feature_provider().stats.miss == 4
    assert list((tmp_path / "cache").rglob("*"))


@pytest.mark.parametrize("images", [[], ["/no/such.png"], [object()], [np.zeros((2, 3, 4, 5))], [np.full((4, 4), 2.0)]])
def test_images_that_cannot_be_used_are_refused_by_our_own_errors(described: FilmHandle, images: list[Any]) -> None:
    with pytest.raises(VlmFilmError) as caught, described.condition(images=images):
        pass
    assert not images or isinstance(caught.value, ImageReadError)
    assert not conditioning.stacks.conditions


def test_the_encoder_is_in_no_state_dict_copy_or_pickle_of_the_unet(described: FilmHandle) -> None:
    with described.condition(images=[picture(0)]):
        assert b"FeatureProvider" not in pickle.dumps(described.unet)
    assert {name.split(".")[0] for name in described.film.state_dict()} == {"image_to_cond", "heads", "_extra_state"}


# Targets


def test_stages_paths_and_channels_are_those_of_the_blocks() -> None:
    handle = build()
    assert [(stage.index, stage.path, stage.channels) for stage in handle.stages] == [(0, "ups.0.1", 6), (1, "ups.1.1", 4)]
    assert [head.channels for head in handle.film.heads] == [6, 4]


def test_selected_stages_alone_are_modulated_and_numbered_by_decoder_stage() -> None:
    handle = attach(SmallUNet((8, 6, 4)), feature_dim=FEATURES, vlm_film_decoder_stages=[2, 0], **SMALL)
    assert [(stage.index, stage.path) for stage in handle.stages] == [(0, "ups.0.1"), (2, "ups.2.1")]
    assert len(handle.film.heads) == 2
    assert not handle.unet.ups[1][1]._forward_hooks


def test_post_block1_modulates_the_output_of_block1() -> None:
    handle = build(apply_point="post_block1")
    assert [stage.path for stage in handle.stages] == ["ups.0.0", "ups.1.0"]
    seen: list[Tensor] = []
    handle.unet.ups[0][1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    call(handle)
    call(handle, features(seed=2))
    assert not torch.equal(seen[0], seen[1])


def test_channels_come_from_block2_proj_and_are_never_guessed_from_the_last_of_several_convolutions() -> None:
    from vlmfilm_plugin.forward.plan import output_channels

    class Resnet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block2 = nn.Module()
            self.block2.proj = nn.Conv2d(3, 5, 1)
            self.res_conv = nn.Conv2d(3, 7, 1)

    assert output_channels(Resnet()) == 5
    assert output_channels(nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU())) == 5
    with pytest.raises(HostError, match="cannot tell the channels of a Sequential"):
        output_channels(nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU(), nn.Conv2d(5, 9, 1)))


def test_a_head_that_does_not_fit_the_output_names_both_shapes() -> None:
    handle = build()
    call(handle)
    handle.unet.ups[0][1].register_forward_hook(lambda module, args, output: output[:, :3], prepend=True)
    with pytest.raises(ConditionError) as caught:
        call(handle)
    assert caught.value.facts["output"][1] == 3
    assert not conditioning.stacks.contexts


# Copies


def test_a_deepcopy_uses_its_own_heads_and_is_served_by_the_same_condition() -> None:
    handle = build()
    original = call(handle)
    twin = copy.deepcopy(handle.unet)
    assert torch.equal(call(handle, unet=twin), original)
    randomise(twin.vlm_film, 5)
    moved = call(handle, unet=twin)
    assert not torch.equal(moved, original)
    assert torch.equal(call(handle), original)
    randomise(handle.film, 6)
    assert torch.equal(call(handle, unet=twin), moved)


def test_a_deepcopy_inside_a_condition_holds_no_condition() -> None:
    handle = build()
    with handle.condition(features=features()):
        twin = copy.deepcopy(handle.unet)
    with pytest.raises(ConditionError):
        twin(*inputs(3))


def test_swa_and_ema_average_the_heads_and_the_averaged_model_runs() -> None:
    handle = build()
    averaged = torch.optim.swa_utils.AveragedModel(handle.unet)
    averaged.update_parameters(handle.unet)
    before = handle.film.heads[0].mlp[2].weight.detach().clone()
    with torch.no_grad():
        handle.film.heads[0].mlp[2].weight.add_(1.0)
    averaged.update_parameters(handle.unet)
    torch.testing.assert_close(averaged.module.vlm_film.heads[0].mlp[2].weight.detach(), before + 0.5)
    assert call(handle, unet=averaged).shape == (3, 1, 8, 8)
    assert not torch.equal(call(handle, unet=averaged), call(handle))


def test_an_attached_unet_survives_pickle_and_torch_save() -> None:
    handle = build()
    expected = call(handle)
    buffer = io.BytesIO()
    torch.save(handle.unet, buffer)
    buffer.seek(0)
    for twin in (pickle.loads(pickle.dumps(handle.unet)), torch.load(buffer, weights_only=False)):
        assert torch.equal(call(handle, unet=twin), expected)
        randomise(twin.vlm_film, 3)
        assert not torch.equal(call(handle, unet=twin), expected)
        assert torch.equal(call(handle), expected)


# State dicts


def test_a_strict_round_trip_gives_the_same_output() -> None:
    handle, other = build(seed=1), build(seed=2)
    expected = call(handle)
    assert not torch.equal(call(other), expected)
    assert other.unet.load_state_dict(handle.unet.state_dict(), strict=True) == nn.modules.module._IncompatibleKeys([], [])
    assert torch.equal(call(other), expected)


def test_the_state_dict_loads_with_weights_only(tmp_path: Path) -> None:
    handle, other = build(seed=1), build(seed=2)
    torch.save(handle.unet.state_dict(), tmp_path / "w.pt")
    other.unet.load_state_dict(torch.load(tmp_path / "w.pt", weights_only=True), strict=True)
    assert torch.equal(call(other), call(handle))


def test_the_state_dict_holds_tensors_alone_and_loading_does_not_change_it() -> None:
    handle = build()
    state = handle.unet.state_dict()
    assert all(isinstance(value, Tensor) for value in state.values())
    before = {name: value.clone() for name, value in state.items()}
    build(seed=4).unet.load_state_dict(state)
    assert list(state) == list(before)
    assert all(torch.equal(state[name], before[name]) for name in state)


def baseline() -> dict[str, Tensor]:
    torch.manual_seed(9)
    return SmallUNet().state_dict()


def test_a_baseline_loads_strictly_with_one_warning_and_equals_the_baseline(capsys: pytest.CaptureFixture[str]) -> None:
    handle, state = build(is_moved=False), baseline()
    for model in (handle.unet, copy.deepcopy(handle.unet), handle.unet):
        model.load_state_dict(state, strict=True)
    assert capsys.readouterr().out.count("plain baseline") == 1
    assert "vlm_film._extra_state" not in state
    plain = SmallUNet()
    plain.load_state_dict(state)
    assert torch.equal(call(handle), plain(*inputs(3)))


def test_a_baseline_loaded_into_a_trained_film_is_the_baseline_as_the_warning_says() -> None:
    handle, state = build(), baseline()
    handle.unet.load_state_dict(state, strict=True)
    plain = SmallUNet()
    plain.load_state_dict(state)
    assert torch.equal(call(handle), plain(*inputs(3)))


def test_an_incomplete_film_is_refused_by_the_strict_load() -> None:
    handle, state = build(), build(seed=1).unet.state_dict()
    del state["vlm_film.heads.0.mlp.2.bias"]
    with pytest.raises(RuntimeError, match=r"vlm_film\.heads\.0\.mlp\.2\.bias"):
        handle.unet.load_state_dict(state, strict=True)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"decoder_stages": [1]}, "decoder_stages=[1]"),
        ({"apply_point": "post_block1"}, "apply_point=post_block1"),
        ({"gamma_scale": None}, "gamma_scale=None"),
        ({"beta_scale": 0.2}, "beta_scale=0.2"),
        ({"cond_dim": 8}, "cond_dim=8"),
        ({"text_mlp_hidden_dim": 7}, "text_mlp_hidden_dim=7"),
        ({"cond_layernorm": False}, "cond_layernorm=False"),
    ],
)
def test_another_architecture_is_refused_and_both_are_shown(settings: dict[str, Any], name: str) -> None:
    saved, handle = build(**settings), build()
    with pytest.raises(CheckpointError) as caught:
        handle.unet.load_state_dict(saved.unet.state_dict(), strict=False)
    text = str(caught.value)
    assert "in the checkpoint" in text and "in this run" in text
    assert name in str(caught.value.fix)


def test_another_width_of_features_is_refused() -> None:
    with pytest.raises(CheckpointError, match="6 in the checkpoint, 5 in this run"):
        build().unet.load_state_dict(build(feature_dim=6).unet.state_dict())


def test_another_encoder_of_the_same_width_is_refused_with_both_fingerprints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlmfilm_plugin.encoders import descriptor

    settings = {"feature_dim": None, "encoder": "descriptor", "cache_dir": str(tmp_path)}
    saved = build(**settings)
    monkeypatch.setattr(descriptor, "VERSION", 2)
    handle = build(**settings)
    with pytest.raises(CheckpointError) as caught:
        handle.unet.load_state_dict(saved.unet.state_dict())
    assert caught.value.facts["checkpoint"].split()[0] == saved.film.architecture.fingerprint
    assert caught.value.facts["this run"].split()[0] == handle.film.architecture.fingerprint


@pytest.mark.parametrize(
    "state", [torch.zeros(3, dtype=torch.uint8), torch.tensor([1.5]), None, "text", torch.frombuffer(bytearray(b'{"format": 99}'), dtype=torch.uint8)]
)
def test_a_damaged_or_future_description_is_refused(state: Any) -> None:
    handle, saved = build(), build().unet.state_dict()
    saved["vlm_film._extra_state"] = state
    with pytest.raises(CheckpointError):
        handle.unet.load_state_dict(saved)


def test_the_warning_is_said_again_for_another_model(capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (1, 2):
        build(seed=seed, is_moved=False).unet.load_state_dict(baseline())
    assert capsys.readouterr().out.count("plain baseline") == 2
    assert film_module._said


class Wrapped(nn.Module):
    """A host that overrides `load_state_dict`, as wrappers do."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.inner = unet

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        return super().load_state_dict(state_dict, strict=strict, assign=assign)


@pytest.mark.parametrize("is_wrapped", [False, True])
def test_without_film_keys_a_load_that_is_not_strict_leaves_trained_heads_alone_and_reports_them(
    is_wrapped: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    handle = build()
    model: nn.Module = Wrapped(handle.unet) if is_wrapped else handle.unet
    prefix = "inner." if is_wrapped else ""
    before = {name: value.clone() for name, value in handle.film.state_dict().items()}
    state = {prefix + name: value for name, value in baseline().items()}
    for _ in range(2):
        result = model.load_state_dict(state, strict=False)
        assert set(result.missing_keys) == {f"{prefix}vlm_film.{name}" for name in before} and not result.unexpected_keys
    assert all(torch.equal(value, before[name]) for name, value in handle.film.state_dict().items())
    assert capsys.readouterr().out.count("left as it is (strict=False)") == 1
    assert torch.equal(handle.unet.final.weight, baseline()["final.weight"])
    # A strict load of a plain baseline still starts at the identity.
    model.load_state_dict(state)
    assert not any(bool(head.mlp[2].weight.any()) for head in handle.film.heads)


def test_part_of_film_loads_where_the_load_is_not_strict_and_the_rest_is_reported() -> None:
    saved, handle = build(seed=1), build(seed=2)
    before = {name: value.clone() for name, value in handle.film.state_dict().items()}
    part = {name: value for name, value in saved.unet.state_dict().items() if "vlm_film.heads.0" in name}
    result = handle.unet.load_state_dict(part, strict=False)
    assert {"vlm_film._extra_state", "vlm_film.heads.1.mlp.2.weight"} <= set(result.missing_keys)
    assert torch.equal(handle.film.heads[0].mlp[2].weight, saved.film.heads[0].mlp[2].weight)
    assert torch.equal(handle.film.heads[1].mlp[2].weight, before["heads.1.mlp.2.weight"])


def test_film_follows_the_unets_dtype_and_training_state() -> None:
    unet = SmallUNet().double().eval()
    handle = attach(unet, feature_dim=FEATURES, **SMALL)
    assert not handle.film.training
    assert {parameter.dtype for parameter in handle.film.parameters()} == {torch.float64}
    half = attach(SmallUNet().to(torch.bfloat16), feature_dim=FEATURES, **SMALL)
    assert {parameter.dtype for parameter in half.film.parameters()} == {torch.float32}
    with half.condition(features=features()):
        assert half.unet(*(part.to(torch.bfloat16) for part in inputs(3))).dtype == torch.bfloat16


def with_encoder(cache: Path) -> FilmHandle:
    return attach(SmallUNet(), encoder="descriptor", cache_dir=str(cache), feature_transform="none")


def test_weights_that_do_not_say_their_encoder_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved, other = with_encoder(tmp_path), with_encoder(tmp_path)
    randomise(saved.film)
    state = {name: value for name, value in saved.unet.state_dict().items() if not name.endswith("_extra_state")}
    before = {name: value.clone() for name, value in other.unet.state_dict().items()}
    with pytest.raises(CheckpointError, match="do not say which encoder"):
        other.unet.load_state_dict(state)
    assert all(torch.equal(value, before[name]) for name, value in other.unet.state_dict().items() if "vlm_film" in name)
    other.unet.load_state_dict(state, strict=False)
    assert capsys.readouterr().out.count("do not say which encoder") == 1
    monkeypatch.setenv("VLM_FILM_STRICT", "0")
    with_encoder(tmp_path).unet.load_state_dict(state)
    # Features that are given by hand are nobody's.
    by_hand = build()
    by_hand.unet.load_state_dict({name: value for name, value in by_hand.unet.state_dict().items() if not name.endswith("_extra_state")})
