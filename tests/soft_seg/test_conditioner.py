"""The soft-seg port's own interface: same names and arguments, without its faults."""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vlmfilm_plugin
from vlmfilm_plugin.errors import CheckpointError, ConditionError, FeatureError, SettingsError
from vlmfilm_plugin.film.layers import AdaptiveFiLMHead
from vlmfilm_plugin.soft_seg.apply import apply_vlm_film
from vlmfilm_plugin.soft_seg.conditioner import VLMConditioner, VLMFiLMConditioner

SEED_ARGUMENTS = [
    "enabled",
    "model_name",
    "cond_dim",
    "cache_dir",
    "prompt_template",
    "dtype",
    "device_map",
    "max_new_tokens",
    "pool",
    "text_mlp_hidden_dim",
    "embedding_dtype",
    "use_text_prompt_cond",
    "verbose",
    "verbose_debug",
    "update_interval_steps_train",
    "update_interval_steps_eval",
    "batch_strategy",
    "reuse_policy",
    "log_every_n_steps",
    "vlm_cache_stats_enabled",
    "vlm_cache_stats_every_n_steps",
]
SEED_DEFAULTS: dict[str, Any] = {
    "enabled": True,
    "model_name": "Qwen/Qwen2.5-VL-3B-Instruct",
    "cond_dim": 256,
    "cache_dir": "cache/vlm_profiles",
    "prompt_template": None,
    "dtype": "auto",
    "device_map": "auto",
    "max_new_tokens": 48,
    "pool": "mean",
    "text_mlp_hidden_dim": 256,
    "embedding_dtype": "float16",
    "use_text_prompt_cond": False,
    "verbose": False,
    "verbose_debug": False,
    "update_interval_steps_train": 100,
    "update_interval_steps_eval": 1,
    "batch_strategy": "first",
    "reuse_policy": "step_interval",
    "log_every_n_steps": 200,
    "vlm_cache_stats_enabled": False,
    "vlm_cache_stats_every_n_steps": 200,
}


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLM_FILM_MODE", raising=False)
    torch.manual_seed(0)


def build(tmp_path: Path, **settings: Any) -> VLMConditioner:
    torch.manual_seed(0)
    return VLMConditioner(**{"encoder": "descriptor", "cond_dim": 4, "cache_dir": str(tmp_path / "cache"), **settings})


def images(rows: int = 3, seed: int = 0) -> Tensor:
    return torch.rand(rows, 1, 24, 20, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def vectors(conditioner: VLMConditioner, image: Tensor, **arguments: Any) -> Tensor:
    result = conditioner.compute_condition(image, **arguments)
    assert result is not None
    cond_vec: Tensor = result["cond_vec"]
    return cond_vec.detach()


# The seed's interface


def test_the_seeds_arguments_stand_first_in_its_order_and_are_all_accepted(tmp_path: Path) -> None:
    parameters = inspect.signature(VLMConditioner).parameters
    assert list(parameters)[: len(SEED_ARGUMENTS)] == SEED_ARGUMENTS
    assert {name: parameters[name].default for name in SEED_ARGUMENTS} == {**SEED_DEFAULTS, "batch_strategy": "per_sample"}
    conditioner = VLMConditioner(**{**SEED_DEFAULTS, "cache_dir": str(tmp_path)}, encoder="descriptor")
    assert conditioner.compute_condition(image=images(), prompt=None, image_id=None, batch={}, global_step=0, is_train=True) is not None
    names = list(inspect.signature(VLMConditioner.compute_condition).parameters)
    assert names == ["self", "image", "prompt", "image_id", "batch", "global_step", "is_train"]
    assert VLMFiLMConditioner is VLMConditioner is vlmfilm_plugin.VLMConditioner
    assert list(inspect.signature(apply_vlm_film).parameters)[:5] == ["x", "vlm_cond", "vlm_film_heads", "stage_idx", "module"]


@pytest.mark.parametrize("bad", [{"batch_strategy": "all"}, {"pool": "max"}, {"cond_dim": 0}, {"dtype": "half"}, {"update_interval_steps_train": 0}])
def test_a_bad_argument_is_a_settings_error(bad: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(SettingsError):
        build(tmp_path, **bad)


def test_not_enabled_holds_nothing_and_gives_none() -> None:
    conditioner = VLMConditioner(enabled=False, model_name="/no/such/model")
    assert conditioner.compute_condition(images()) is None
    assert list(conditioner.parameters()) == []


def test_cond_vec_has_a_row_an_image_and_debug_names_them(tmp_path: Path) -> None:
    result = build(tmp_path).compute_condition(images(), batch={"name": ["a.png", "b.png@x", "c.png"], "split": "train"})
    assert result is not None
    assert result["cond_vec"].shape == (3, 4)
    # No file was found behind the names: crops are kept by their content, and the keys say so.
    assert all(key.startswith("train:fp-") for key in result["_dbg"]["keys"]) and len(set(result["_dbg"]["keys"])) == 3
    assert result["_dbg"]["cache_key_source"] == "content"


def test_gradients_reach_the_projection_alone(tmp_path: Path) -> None:
    conditioner = build(tmp_path)
    image = images().requires_grad_()
    conditioner.compute_condition(image)["cond_vec"].square().sum().backward()
    assert image.grad is None
    assert (
        {name for name, parameter in conditioner.named_parameters() if parameter.grad is not None}
        == {
            "image_to_cond.proj.weight",
            "image_to_cond.proj.bias",
            "image_to_cond.ln.weight",
            "image_to_cond.ln.bias",
        }
        == set(conditioner.state_dict())
    )


def test_different_images_get_different_vectors_and_position_does_not_matter(tmp_path: Path) -> None:
    conditioner, image = build(tmp_path), images()
    found = vectors(conditioner, image)
    assert len({tuple(row.tolist()) for row in found}) == 3
    torch.testing.assert_close(vectors(conditioner, image.flip(0)), found.flip(0))


def test_the_transform_is_an_option_that_is_fitted_and_travels(tmp_path: Path) -> None:
    image = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    training = [torch.rand(16, 16, generator=torch.Generator().manual_seed(seed)).numpy() for seed in range(1, 9)]
    raw, centred = build(tmp_path), build(tmp_path, feature_transform="center")
    assert raw.feature_transform is None and not [name for name in raw.state_dict() if "transform" in name]
    with pytest.raises(ConditionError, match="cannot fit this conditioner"):
        raw.fit(images=training)
    with pytest.raises(ConditionError, match="has no statistics"):
        centred.compute_condition(image)
    centred.fit(images=training)
    mean = centred._provider.of_images(training).double().mean(0).float()
    centred.image_to_cond.load_state_dict(raw.image_to_cond.state_dict())
    found, features = centred.compute_condition(image), raw._provider.get(raw._provider.samples_of({}, image, (-1.0, 1.0)))
    assert found is not None and torch.equal(found["cond_vec"], raw.image_to_cond(features - mean))
    loaded = build(tmp_path, feature_transform="center")
    loaded.load_state_dict(centred.state_dict())
    again = loaded.compute_condition(image)
    assert again is not None and torch.equal(again["cond_vec"], found["cond_vec"])
    with pytest.raises(ConditionError, match="never change"):
        loaded.fit(images=training)
    state = centred.state_dict()
    facts = bytes(state["feature_transform._extra_state"].tolist()).replace(b"descriptor-", b"other-")
    state["feature_transform._extra_state"] = torch.frombuffer(bytearray(facts), dtype=torch.uint8)
    with pytest.raises(CheckpointError, match="of the features of another encoder"):
        loaded.load_state_dict(state)


@pytest.mark.parametrize("shape", [(24, 20), (1, 24, 20), (3, 1, 1, 24, 20)])
def test_a_tensor_that_is_no_batch_is_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(ConditionError):
        build(tmp_path).compute_condition(torch.zeros(shape))


def test_the_value_range_is_stated_never_guessed(tmp_path: Path) -> None:
    image = images().clamp(min=0)
    a, b = build(tmp_path / "a"), build(tmp_path / "b", value_range=(0.0, 1.0))
    assert not torch.allclose(vectors(a, image), vectors(b, image))


# Names


def test_image_id_names_the_rows_instead_of_the_batch(tmp_path: Path) -> None:
    conditioner = build(tmp_path)
    result = conditioner.compute_condition(images(), image_id=["x", "y", "z"], batch={"name": ["a", "b", "c"], "split": "val"})
    assert result["_dbg"]["keys"] == ["val:x", "val:y", "val:z"]
    assert conditioner.compute_condition(images(1), image_id="one")["_dbg"]["keys"] == ["unknown:one"]


@pytest.mark.parametrize("image_id", [["a"], ["a", "b", "c", "d"], ["a", None, "c"], [], "", ["a", "", "c"]])
def test_image_ids_that_do_not_fit_are_refused_not_replaced_by_others(image_id: Any, tmp_path: Path) -> None:
    with pytest.raises(ConditionError, match="image_id"):
        build(tmp_path).compute_condition(images(), image_id=image_id, batch={"name": ["a", "b", "c"], "id": [1, 2, 3]})


def test_two_crops_of_one_file_get_their_own_features_in_any_order(tmp_path: Path) -> None:
    conditioner, batch = build(tmp_path), {"name": ["a.png"], "split": "train"}
    first, second = vectors(conditioner, images(1, 1), batch=batch), vectors(conditioner, images(1, 2), batch=batch)
    other = build(tmp_path / "other")
    assert not torch.equal(first, second)
    assert torch.equal(vectors(other, images(1, 2), batch=batch), second)


# Strategies


def test_evaluation_conditions_each_image_on_itself_at_a_constant_step(tmp_path: Path) -> None:
    for strategy in ("per_sample", "first", "random"):
        conditioner = build(tmp_path, batch_strategy=strategy)
        found = [vectors(conditioner, images(1, seed), batch={"name": [f"{seed}.png"]}, global_step=7) for seed in range(3)]
        alone = [vectors(build(tmp_path / str(seed)), images(1, seed), global_step=7) for seed in range(3)]
        for a, b in zip(found, alone, strict=True):
            torch.testing.assert_close(a, b)


def test_per_sample_is_per_sample_at_every_training_step(tmp_path: Path) -> None:
    conditioner = build(tmp_path)
    for step in (0, 0, 1):
        torch.testing.assert_close(vectors(conditioner, images(), global_step=step, is_train=True), vectors(conditioner, images()))


def test_first_conditions_the_batch_on_its_first_image_and_holds_it(tmp_path: Path) -> None:
    conditioner = build(tmp_path, batch_strategy="first", update_interval_steps_train=2)
    own = {seed: vectors(build(tmp_path), images(seed=seed))[0] for seed in range(3)}
    for step, seed, expected in ((0, 0, 0), (1, 1, 0), (2, 2, 2)):
        found = vectors(conditioner, images(seed=seed), global_step=step, is_train=True)
        torch.testing.assert_close(found, own[expected].expand(3, -1))


def test_a_held_feature_fits_a_batch_of_another_size(tmp_path: Path) -> None:
    conditioner = build(tmp_path, batch_strategy="first")
    vectors(conditioner, images(4), global_step=0, is_train=True)
    assert vectors(conditioner, images(2, 1), global_step=1, is_train=True).shape == (2, 4)


@pytest.mark.parametrize("strategy", ["first", "random"])
def test_a_validation_between_two_steps_does_not_replace_what_training_holds(strategy: str, tmp_path: Path) -> None:
    conditioner = build(tmp_path, batch_strategy=strategy)
    held = vectors(conditioner, images(), global_step=0, is_train=True)
    with torch.inference_mode():
        vectors(conditioner, images(1, 9), global_step=1)
    result = conditioner.compute_condition(images(seed=1), global_step=1, is_train=True)
    torch.testing.assert_close(result["cond_vec"].detach(), held)
    result["cond_vec"].sum().backward()


def test_image_id_policy_holds_while_the_image_is_the_same(tmp_path: Path) -> None:
    conditioner = build(tmp_path, batch_strategy="first", reuse_policy="image_id")
    first = vectors(conditioner, images(), batch={"name": ["a", "b", "c"]}, global_step=0, is_train=True)
    again = vectors(conditioner, images(seed=1), batch={"name": ["a", "d", "e"]}, global_step=900, is_train=True)
    other = vectors(conditioner, images(seed=2), batch={"name": ["d", "a", "e"]}, global_step=900, is_train=True)
    torch.testing.assert_close(again, first)
    assert not torch.allclose(other, first)


def test_random_is_the_same_for_the_same_step(tmp_path: Path) -> None:
    found = [vectors(build(tmp_path, batch_strategy="random"), images(8), global_step=5, is_train=True) for _ in range(2)]
    assert torch.equal(*found)
    torch.testing.assert_close(found[0], found[0][:1].expand(8, -1))


def test_a_conditioner_that_computes_under_inference_mode_can_train_afterwards(tmp_path: Path) -> None:
    conditioner = build(tmp_path)
    with torch.inference_mode():
        conditioner.compute_condition(images())
    conditioner.compute_condition(images(), is_train=True, global_step=0)["cond_vec"].sum().backward()


# The frozen model


@pytest.mark.parametrize("is_text", [False, True])
def test_the_real_vlm_conditions_and_is_nowhere_in_the_module(is_text: bool, tiny_qwen: Path, tmp_path: Path) -> None:
    conditioner = build(tmp_path, encoder="qwen2_5_vl", model_name=str(tiny_qwen), use_text_prompt_cond=is_text, max_new_tokens=3, cond_dim=6)
    projection = conditioner.text_to_cond if is_text else conditioner.image_to_cond
    assert not conditioner._provider.encoder.is_loaded
    before = set(conditioner.state_dict())
    result = conditioner.compute_condition(images(2))
    assert result["cond_vec"].shape == (2, 6)
    assert conditioner._provider.encoder.is_loaded
    result["cond_vec"].square().sum().backward()
    assert all(parameter.grad is not None for parameter in projection.parameters())
    assert set(conditioner.state_dict()) == before == {f"{'text' if is_text else 'image'}_to_cond.{name}" for name in projection.state_dict()}
    assert {id(parameter) for parameter in conditioner.parameters()} == {id(parameter) for parameter in projection.parameters()}
    assert not any("qwen" in type(module).__name__.lower() for module in conditioner.modules())
    twin = copy.deepcopy(conditioner)
    assert twin._provider is conditioner._provider
    assert torch.equal(vectors(twin, images(2)), vectors(conditioner, images(2)))
    assert len(pickle.dumps(conditioner)) < 100_000


def test_the_model_is_not_loaded_when_every_feature_is_stored(tiny_qwen: Path, tmp_path: Path) -> None:
    settings = {"encoder": "qwen2_5_vl", "model_name": str(tiny_qwen)}
    expected = vectors(build(tmp_path, **settings), images(2))
    again = build(tmp_path, **settings)
    assert torch.equal(vectors(again, images(2)), expected)
    assert not again._provider.encoder.is_loaded


def test_a_prompt_of_the_call_replaces_the_template_in_text_mode_and_does_nothing_in_image_mode(tiny_qwen: Path, tmp_path: Path) -> None:
    text = build(tmp_path, encoder="qwen2_5_vl", model_name=str(tiny_qwen), use_text_prompt_cond=True, max_new_tokens=3)
    own, other = vectors(text, images(1)), vectors(text, images(1), prompt="Count the vessels.")
    assert not torch.equal(own, other)
    assert torch.equal(vectors(text, images(1), prompt="Count the vessels."), other)
    plain = build(tmp_path)
    assert torch.equal(vectors(plain, images(1), prompt="anything"), vectors(plain, images(1)))


# apply_vlm_film


def heads(count: int = 2, channels: int = 3) -> nn.ModuleList:
    torch.manual_seed(1)
    built = nn.ModuleList(AdaptiveFiLMHead(4, channels, 6) for _ in range(count))
    for parameter in built.parameters():
        nn.init.normal_(parameter)
    return built


X, COND = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


def test_on_is_film_by_the_head_of_the_stage_and_the_default() -> None:
    built = heads()
    y, payload = apply_vlm_film(X, {"cond_vec": COND}, built, 1)
    gamma, beta = built[1](COND)
    torch.testing.assert_close(y, gamma * X + beta)
    assert (payload["film_mode"], payload["film_stage_idx"], payload["film_bypass"]) == ("on", 1, False)
    assert torch.equal(payload["gamma"], gamma) and not payload["gamma"].requires_grad
    assert payload["statistics"]()["max_abs_diff"] == pytest.approx(float((y - X).detach().abs().max()))
    assert torch.equal(apply_vlm_film(X, COND, built, 1)[0], y)


def test_off_is_bit_identical_whatever_the_heads_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM_FILM_MODE", "off")
    y, payload = apply_vlm_film(X, COND, heads(), 0)
    assert torch.equal(y, X)
    assert payload["film_bypass"] is True
    assert (float(payload["gamma"].min()), float(payload["beta"].abs().max())) == (1.0, 0.0)


def test_shuffle_permutes_rows_by_the_step_and_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("VLM_FILM_MODE", "shuffle")
    built, module = heads(), SimpleNamespace(global_step=3)
    y, payload = apply_vlm_film(X, COND, built, 0, module)
    line = capsys.readouterr().out
    permutation = [int(part) for part in line.split("perm_first10=[")[1].split("]")[0].split(",")]
    assert sorted(permutation) == list(range(5))
    assert all(place != value for place, value in enumerate(permutation))
    gamma, beta = built[0](COND[permutation])
    torch.testing.assert_close(y, gamma * X + beta)
    assert torch.equal(apply_vlm_film(X, COND, built, 0, step=3)[0], y)
    assert len(payload["shuffle_perm_hash"]) == 8


def test_shuffle_says_so_once_an_epoch_not_at_every_stage_of_every_forward(capsys: pytest.CaptureFixture[str]) -> None:
    module = SimpleNamespace(global_step=3, current_epoch=0)
    for module.global_step in range(3):
        for stage in (0, 1):
            apply_vlm_film(X, COND, heads(), stage, module, mode="shuffle")
    assert capsys.readouterr().out.count("[FILM-SHUFFLE]") == 1


@pytest.mark.parametrize("value", ["", "ON", "shufle"])
def test_a_wrong_mode_is_refused_from_either_place(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError):
        apply_vlm_film(X, COND, heads(), 0, mode=value)
    monkeypatch.setenv("VLM_FILM_MODE", value)
    with pytest.raises(SettingsError):
        apply_vlm_film(X, COND, heads(), 0)


def test_no_condition_or_no_heads_leaves_x_alone() -> None:
    for condition, built in ((None, heads()), ({"cond_vec": None}, heads()), (COND, None)):
        y, payload = apply_vlm_film(X, condition, built, 0)
        assert y is X
        assert payload is None


def test_selected_stages_map_to_heads_in_ascending_order() -> None:
    built, module = heads(), SimpleNamespace(vlm_film_decoder_stages=[3, 1])
    torch.testing.assert_close(apply_vlm_film(X, COND, built, 1, module)[0], apply_vlm_film(X, COND, built, 0)[0])
    torch.testing.assert_close(apply_vlm_film(X, COND, built, 3, module)[0], apply_vlm_film(X, COND, built, 1)[0])
    for stage in (0, 2, 4):
        y, payload = apply_vlm_film(X, COND, built, stage, module)
        assert y is X and payload is None


def test_a_stage_without_a_head_is_left_alone_where_no_stages_are_selected() -> None:
    assert apply_vlm_film(X, COND, heads(2), 2)[1] is None


@pytest.mark.parametrize("stages", [[0], [0, 1, 2]])
def test_stages_that_do_not_fit_the_heads_are_refused(stages: list[int]) -> None:
    with pytest.raises(FeatureError, match="heads"):
        apply_vlm_film(X, COND, heads(2), 0, SimpleNamespace(vlm_film_decoder_stages=stages))


@pytest.mark.parametrize(
    ("x", "cond", "error"),
    [
        (X, COND[:4], ConditionError),
        (X, COND[:1], ConditionError),
        (X[:, :2], COND, FeatureError),
        (X, COND[:, :3], FeatureError),
        (X, COND[:, :, None], FeatureError),
    ],
)
def test_mismatches_are_refused(x: Tensor, cond: Tensor, error: type[Exception]) -> None:
    with pytest.raises(error):
        apply_vlm_film(x, cond, heads(), 0)


def test_the_seeds_model_trains_and_every_part_of_film_moves(tmp_path: Path) -> None:
    conditioner, built = build(tmp_path), nn.ModuleList(AdaptiveFiLMHead(4, 3, 6) for _ in range(2))
    parameters = [*conditioner.parameters(), *built.parameters()]
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for step in range(3):
        condition = conditioner.compute_condition(images(5), global_step=step, is_train=True)
        y = X
        for stage in (0, 1):
            y, _ = apply_vlm_film(y, condition, built, stage)
        optimizer.zero_grad()
        (y - 1).square().mean().backward()
        optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(parameters, before, strict=True))
