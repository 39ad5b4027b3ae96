"""FiLM by hand, without a host or the environment: fitted, in another mode for a while, on stored features, watched."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_unet import SmallUNet, inputs, randomise
from torch import Tensor

from vlmfilm_plugin import FilmHandle, attach, warmup_vlm_cache
from vlmfilm_plugin.errors import CheckpointError, ConditionError, FeatureError, MissingFeatureError, SettingsError

GIVEN = torch.randn(2, 5, generator=torch.Generator().manual_seed(1)) + 9
TRAINING = torch.randn(64, 5, generator=torch.Generator().manual_seed(2)) + 9


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLM_FILM_MODE", raising=False)


def attached(**settings: object) -> FilmHandle:
    torch.manual_seed(0)
    handle = attach(SmallUNet(), feature_dim=5, cond_dim=4, **settings)  # type: ignore[arg-type]
    randomise(handle.film)
    return handle


def run(handle: FilmHandle, given: Tensor = GIVEN) -> Tensor:
    with torch.no_grad(), handle.condition(given):
        out: Tensor = handle.unet(*inputs(2))
    return out


def plain() -> Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        out: Tensor = SmallUNet()(*inputs(2))
    return out


# The transform


def test_without_fit_features_are_used_as_given_and_with_it_minus_the_mean() -> None:
    raw = run(attached(feature_transform="none"))
    handle = attached()
    assert torch.equal(run(handle), raw)
    handle.fit(TRAINING)
    shifted = run(attached(feature_transform="none"), GIVEN - TRAINING.double().mean(0).float())
    assert torch.equal(run(handle), shifted) and not torch.equal(shifted, raw)


def test_a_transform_that_was_asked_for_is_an_error_until_it_is_fitted() -> None:
    handle = attached(feature_transform=["center", "l2norm"])
    with pytest.raises(ConditionError, match="`feature_transform` has no statistics") as caught:
        run(handle)
    assert "center, l2norm" in str(caught.value) and "call `fit(features=...)`" in str(caught.value)
    with handle.mode("off"):
        assert torch.equal(run(handle), plain())
    handle.fit(TRAINING)
    run(handle)
    # A step that takes no statistics needs none.
    run(attached(feature_transform="l2norm"))


def test_a_copy_alone_is_refused_as_its_original_is() -> None:
    handle = attached(feature_transform="center")
    with handle.mode("off"):
        condition = handle.condition(GIVEN)
        condition.__enter__()
    with pytest.raises(ConditionError, match="has no statistics"):
        copy.deepcopy(handle.unet)(*inputs(2))
    condition.__exit__(None, None, None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "both or neither"),
        ({"features": TRAINING, "images": ["a.png"]}, "both or neither"),
        ({"images": []}, "no images"),
        ({"features": TRAINING[:1]}, "two different images or more"),
        ({"features": TRAINING[:1].expand(64, -1)}, "1 different image among 64"),
        ({"features": torch.ones(4, 6)}, "wrong width or shape"),
        ({"features": torch.full((4, 5), torch.nan)}, "NaN or infinite"),
    ],
    ids=["nothing", "both", "no images", "one", "one repeated", "width", "nan"],
)
def test_what_cannot_be_fitted_to_is_refused_and_leaves_the_handle_as_it_was(given: dict[str, object], message: str) -> None:
    handle = attached()
    before = run(handle)
    with pytest.raises((ConditionError, FeatureError), match=message):
        handle.fit(**given)  # type: ignore[arg-type]
    assert torch.equal(run(handle), before)
    handle.fit(TRAINING)


def test_a_second_fit_and_a_fit_of_nothing_are_refused() -> None:
    handle = attached()
    handle.fit(TRAINING)
    before = run(handle)
    with pytest.raises(ConditionError, match="never change"):
        handle.fit(TRAINING + 1)
    assert torch.equal(run(handle), before)
    for steps in ("none", "l2norm"):
        with pytest.raises(ConditionError, match=r"cannot fit") as caught:
            attached(feature_transform=steps).fit(TRAINING)
        assert f"{steps}   (from argument" in str(caught.value)


def test_the_fit_travels_in_a_state_dict_and_decides_where_nobody_chose() -> None:
    handle = attached()
    handle.fit(TRAINING)
    file = io.BytesIO()
    torch.save(handle.unet.state_dict(), file)
    for other in (attached(), attached(feature_transform="center")):
        file.seek(0)
        other.unet.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(run(other), run(handle))
        with pytest.raises(ConditionError, match="never change"):
            other.fit(TRAINING)
    with pytest.raises(CheckpointError, match="another architecture") as caught:
        attached(feature_transform="none").unet.load_state_dict(handle.unet.state_dict())
    assert "feature_transform=['center']" in str(caught.value)
    # And the other way: weights of features as they are, in a module that was fitted to others.
    with pytest.raises(CheckpointError, match="another architecture"):
        handle.unet.load_state_dict(attached().unet.state_dict())


def test_weights_of_the_format_before_are_of_features_as_they_are() -> None:
    import json

    saved = attached(feature_transform="none")
    state = saved.unet.state_dict()
    described = json.loads(bytes(state["vlm_film._extra_state"].tolist()))
    assert described.pop("feature_transform") == [] and described["readable_by"] == 2
    state["vlm_film._extra_state"] = torch.frombuffer(bytearray(json.dumps(described | {"format": 2}).encode()), dtype=torch.uint8)
    handle = attached()
    handle.unet.load_state_dict(state)
    assert handle.film.feature_transform is None and torch.equal(run(handle), run(saved))
    with pytest.raises(CheckpointError, match="another architecture"):
        attached(feature_transform="center").unet.load_state_dict(state)


def test_a_plain_baseline_leaves_the_fit_in_force() -> None:
    handle = attached()
    handle.fit(TRAINING)
    handle.unet.load_state_dict({name: value for name, value in handle.unet.state_dict().items() if "vlm_film" not in name})
    assert torch.equal(handle.film.transform(TRAINING), TRAINING - TRAINING.double().mean(0).float())


def test_gradients_and_a_compiled_unet_take_the_transformed_feature() -> None:
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        handle = attached()
        handle.fit(TRAINING)
        unet = torch.compile(handle.unet, backend="eager") if compiled else handle.unet
        with handle.condition(GIVEN):
            unet(*inputs(2)).square().mean().backward()
        results.append(handle.film.image_to_cond.proj.weight.grad)
    by_hand = attached(feature_transform="none")
    with by_hand.condition(GIVEN - TRAINING.double().mean(0).float()):
        by_hand.unet(*inputs(2)).square().mean().backward()
    assert all(torch.allclose(found, by_hand.film.image_to_cond.proj.weight.grad, atol=1e-7) for found in results)


def test_shuffle_tells_images_apart_by_what_was_given_and_transforms_the_donors_feature() -> None:
    handle = attached(mode="shuffle")
    handle.fit(TRAINING)
    swapped = attached()
    swapped.fit(TRAINING)
    assert torch.equal(run(handle), run(swapped, GIVEN[[1, 0]]))


# The mode


def test_the_mode_is_an_argument_and_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM_FILM_MODE", "on")
    assert attached().film.mode == "on"
    off = attached(mode="off")
    assert torch.equal(run(off), plain()) and not any(parameter.requires_grad for parameter in off.film.parameters())
    with pytest.raises(SettingsError, match="not a mode"):
        attached(mode="of")


def test_a_mode_for_a_while_is_that_of_every_copy_and_then_what_it_was() -> None:
    handle = attached()
    twin = copy.deepcopy(handle.unet)
    on = run(handle)
    with handle.mode("off"):
        assert torch.equal(run(handle), plain())
        with torch.no_grad():
            assert torch.equal(twin(*inputs(2)), plain())
        with handle.mode("shuffle"):
            assert torch.equal(run(handle), run_swapped())
        with pytest.raises(SettingsError), handle.mode("none"):
            pass
        assert torch.equal(run(handle), plain())
    assert torch.equal(run(handle), on)
    with pytest.raises(KeyError), handle.mode("off"):
        raise KeyError
    assert torch.equal(run(handle), on) and all(parameter.requires_grad for parameter in handle.film.parameters())


def run_swapped() -> Tensor:
    return run(attached(), GIVEN[[1, 0]])


def test_film_attached_off_trains_in_the_block_of_another_mode_and_not_after_it() -> None:
    handle = attached(mode="off")
    with handle.mode("on"), handle.condition(GIVEN):
        handle.unet(*inputs(2)).sum().backward()
    assert all(float(head.mlp[2].weight.grad.norm()) > 0 for head in handle.film.heads)
    assert not any(parameter.requires_grad for parameter in handle.film.parameters())


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_a_block_that_runs_again_in_backward_has_the_mode_of_its_forward(use_reentrant: bool, compiled: bool) -> None:
    grads = []
    for checkpointing in (None, use_reentrant):
        torch._dynamo.reset()
        torch.manual_seed(0)
        handle = attach(SmallUNet(use_reentrant=checkpointing), feature_dim=5, cond_dim=4)
        randomise(handle.film)
        if compiled and checkpointing is not None:
            for stage in handle.unet.ups:
                stage[1].compile(backend="eager")
        x, time, cond = inputs(2)
        with handle.condition(GIVEN):
            on = handle.unet(x.requires_grad_(), time, cond).square().sum()
        with handle.mode("off"):
            off = handle.unet(x, time, cond).square().sum()
            on.backward()
        off.backward()
        grads.append([x.grad, *(parameter.grad for parameter in handle.unet.parameters())])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))


# Stored features


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    generator = np.random.default_rng(0)
    (tmp_path / "train" / "image").mkdir(parents=True)
    for number in range(6):
        Image.fromarray(generator.integers(0, 256, (16, 16), dtype=np.uint8)).save(tmp_path / "train" / "image" / f"{number}.png")
    yield tmp_path


def test_paths_find_what_a_warm_up_stored_for_their_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = sorted((folder / "train" / "image").iterdir())
    listed = folder / "list.csv"
    listed.write_text("path,name,split\n" + "".join(f"{file},names/{file.name},train\n" for file in files))
    for number, (source, settings) in enumerate([(listed, {}), (folder, {}), (folder, {"dataset_root": str(folder)})]):
        cache = str(folder / f"cache{number}")
        assert warmup_vlm_cache(source, encoder="descriptor", cache_dir=cache, show_progress=False, **settings).encoded == 6
        handle = attach(SmallUNet(), encoder="descriptor", cond_dim=4, cache_dir=cache, on_missing_feature="error", **settings)
        monkeypatch.chdir(folder / "train")
        with torch.no_grad(), handle.condition(images=[str(files[1]), Path("image/2.png")]):
            found = handle.unet(*inputs(2))
        features = handle.features(files)
        assert features.shape == (6, handle.feature_dim) and handle._feature_provider().stats.miss == 0
        with torch.no_grad(), handle.condition(features[1:3]):
            assert torch.equal(handle.unet(*inputs(2)), found)
        Image.fromarray(np.full((16, 16), number, np.uint8)).save(folder / "other.png")
        with pytest.raises(MissingFeatureError, match=r"other\.png"):
            handle.features([folder / "other.png"])
        (folder / "other.png").unlink()


def test_fit_takes_images_and_names_their_encoder(folder: Path) -> None:
    files = sorted((folder / "train" / "image").iterdir())
    handle = attach(SmallUNet(), encoder="descriptor", cond_dim=4, cache_dir=str(folder / "c"))
    handle.fit(images=files)
    transform = handle.film.feature_transform
    assert transform is not None and transform.statistics is not None
    assert torch.equal(transform.statistics.mean, handle.features(files).double().mean(0).float())
    facts = transform.statistics.facts
    assert (facts.count, facts.width, facts.split, facts.encoder) == (6, handle.feature_dim, "given", handle.film.architecture.fingerprint)
    handle.features(files).zero_()
    assert float(handle.features(files).norm()) > 0
    with pytest.raises(ConditionError, match="no images"):
        handle.features([])


# What it does


def test_statistics_tell_what_reaches_the_decoder_after_a_forward() -> None:
    handle = attached()
    with pytest.raises(ConditionError, match="no forward has run with a condition"):
        handle.statistics()
    apart = GIVEN - 9
    run(handle, apart)
    found = handle.statistics()
    assert set(found) == {0, 1} and all(set(stage) == {"between_images", "at_bound"} for stage in found.values())
    cond = handle.film.project(apart)
    for position, stage in enumerate(found.values()):
        gamma, beta = handle.film.heads[position](cond)
        for name, values in (("gamma", gamma), ("beta", beta)):
            expected = float(values.detach().flatten(1).std(0, correction=0).mean())
            assert stage["between_images"][name] == pytest.approx(expected, rel=1e-4) and expected > 1e-3
            assert 0 <= stage["at_bound"][name] < 1


def test_features_that_are_alike_show_no_spread_and_saturated_heads_their_bound() -> None:
    handle = attached()
    with torch.no_grad():
        for head in handle.film.heads:
            head.mlp[2].weight.zero_()
            head.mlp[2].bias.fill_(50.0)
    run(handle)
    for stage in handle.statistics().values():
        assert stage["between_images"] == {"gamma": 0.0, "beta": 0.0} and stage["at_bound"] == {"gamma": 1.0, "beta": 1.0}
    unbounded = attached(gamma_scale=None)
    run(unbounded)
    assert unbounded.statistics()[0]["at_bound"]["gamma"] is None


def test_statistics_count_an_image_once_and_a_single_image_has_no_spread() -> None:
    handle = attached()
    apart = GIVEN - 9
    run(handle, apart[:1])
    assert handle.statistics()[0]["between_images"] is None
    with torch.no_grad(), handle.condition(apart[[0, 0, 0, 1]]):
        handle.unet(*inputs(4))
    uneven = handle.statistics()
    run(handle, apart)
    for stage, even in handle.statistics().items():
        for name in ("gamma", "beta"):
            assert uneven[stage]["between_images"][name] == pytest.approx(even["between_images"][name], rel=1e-4)
    # What is held for it is no part of a copy.
    assert copy.deepcopy(handle.film).last_forward.features is None
