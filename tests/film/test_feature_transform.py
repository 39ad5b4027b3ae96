"""The transform of features: what it does, what its statistics are, that they never change, and that they travel whole."""

from __future__ import annotations

import copy
import io
import json
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_unet import SmallUNet
from torch import Tensor

from vlmfilm_plugin.errors import CheckpointError, ConditionError, FeatureError
from vlmfilm_plugin.film.feature_statistics import LEAST, MOST, Facts, Statistics, counted, made_of, read_facts
from vlmfilm_plugin.film.feature_transform import FeatureTransform

FACTS = Facts("enc-1", "train", "a test")
STEPS = [("center",), ("standardize",), ("l2norm",), ("center", "l2norm"), ("l2norm", "center", "l2norm"), ("l2norm", "standardize")]


def rows(count: int = 40, width: int = 6, seed: int = 0) -> Tensor:
    return 3 + torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def fitted(steps: tuple[str, ...], x: Tensor) -> FeatureTransform:
    transform = FeatureTransform(steps, x.shape[1])
    if transform.needs_statistics:
        transform.take(made_of(x, FACTS, steps))
    return transform


@pytest.mark.parametrize("steps", STEPS, ids=",".join)
def test_each_list_of_steps_does_what_it_says_in_order(steps: tuple[str, ...]) -> None:
    x, expected = rows(), rows().double()
    for step in steps:
        if step == "l2norm":
            expected = expected / expected.norm(dim=1, keepdim=True)
        else:
            std = expected.std(0, correction=0) if step == "standardize" else 1.0
            expected = (expected - expected.mean(0)) / std
    torch.testing.assert_close(fitted(steps, x)(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_features_keep_their_precision_and_carry_no_gradient(dtype: torch.dtype) -> None:
    given = rows().to(dtype).requires_grad_()
    found = fitted(("center",), rows())(given)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and not found.requires_grad


@pytest.mark.parametrize("steps", [("center",), ("standardize",), ("l2norm", "center")], ids=",".join)
def test_counting_image_by_image_ends_where_all_at_once_does(steps: tuple[str, ...]) -> None:
    x = rows(MOST)
    held: Statistics | None = None
    for start in range(0, MOST, 7):
        held = counted(held, x[start : start + 7], FACTS, steps) or held
    whole = made_of(x, FACTS, steps)
    assert held is not None and held.facts.is_frozen and held.facts.count == MOST and held.facts.counted == ()
    torch.testing.assert_close(held.mean, whole.mean, rtol=1e-5, atol=1e-6)
    if whole.std is not None and held.std is not None:
        torch.testing.assert_close(held.std, whole.std, rtol=1e-4, atol=1e-6)


def test_an_image_counts_once_and_the_257th_not_at_all() -> None:
    x = rows(MOST + 20)
    once = counted(None, x[:5], FACTS, ("center",))
    assert once is not None and once.facts.count == 5 and not once.facts.is_frozen
    assert counted(once, x[[4, 0, 2]], FACTS, ("center",)) is None
    again = counted(once, x[[4, 5, 5, 0]], FACTS, ("center",))
    assert again is not None and again.facts.count == 6
    torch.testing.assert_close(again.mean, x[:6].mean(0))
    full = counted(again, x, FACTS, ("center",))
    assert full is not None and full.facts.count == MOST and full.facts.is_frozen
    torch.testing.assert_close(full.mean, x[:MOST].mean(0))


def test_it_is_ready_after_eight_different_images_and_frozen_after_256() -> None:
    transform, x = FeatureTransform(("center",), 6), rows(MOST)
    seen = []
    for image in x:
        if (more := counted(transform.statistics, image[None], FACTS, transform.steps)) is not None:
            transform.take(more)
        seen.append((transform.is_ready, transform.is_frozen))
    assert seen.index((True, False)) == LEAST - 1 and seen.count((True, True)) == 1 and seen[-1] == (True, True)


def test_a_run_that_is_resumed_while_it_counts_ends_with_the_very_values() -> None:
    for steps in (("center",), ("standardize",)):
        straight, x = FeatureTransform(steps, 6), rows(MOST)
        resumed = FeatureTransform(steps, 6)
        for start in range(0, MOST, 5):
            for transform in (straight, resumed):
                if (more := counted(transform.statistics, x[max(start - 3, 0) : start + 5], FACTS, steps)) is not None:
                    transform.take(more)
            # Killed and resumed after every step.
            file = io.BytesIO()
            torch.save(resumed.state_dict(), file)
            file.seek(0)
            resumed = FeatureTransform(steps, 6)
            resumed.load_state_dict(torch.load(file, weights_only=True))
        assert straight.is_frozen and resumed.is_frozen
        assert all(torch.equal(a, b) for a, b in zip(straight.state_dict().values(), resumed.state_dict().values(), strict=True))


def test_frozen_statistics_are_never_set_again() -> None:
    transform = fitted(("center",), rows())
    before = transform.state_dict()
    with pytest.raises(ConditionError, match="never change once they are there") as caught:
        transform.take(made_of(rows(seed=1), replace(FACTS, source="others"), ("center",)))
    assert "40 images, a test" in str(caught.value) and "others" in str(caught.value)
    with pytest.raises(ConditionError, match="no step takes any"):
        FeatureTransform(("l2norm",), 6).take(made_of(rows(), FACTS, ("l2norm",)))
    assert all(torch.equal(value, before[name]) for name, value in transform.state_dict().items())


def test_averaging_buffers_does_not_move_what_acts_or_is_saved() -> None:
    transform, x = fitted(("standardize",), rows(width=300)), rows(width=300, seed=2)
    before, saved = transform(x), copy.deepcopy(transform.state_dict())
    twin = copy.deepcopy(transform)
    for _ in range(200):
        # As timm's ModelEma does; each step rounds: in 5,000 of them a mean moves by up to 1.6e-4 of itself.
        for mine, theirs in zip(twin.state_dict().values(), transform.state_dict().values(), strict=True):
            mine.copy_(0.9999 * mine + (1.0 - 0.9999) * theirs)
        for mine, theirs in zip(twin.buffers(), transform.buffers(), strict=True):
            mine.data = 0.9999 * mine + (1.0 - 0.9999) * theirs
    assert not torch.equal(next(twin.buffers()), next(transform.buffers())), "the average must have moved for this to prove anything"
    assert torch.equal(twin(x), before)
    assert all(torch.equal(value, saved[name]) for name, value in twin.state_dict().items())


def test_it_moves_is_copied_and_pickled_with_its_statistics() -> None:
    transform, x = fitted(("standardize", "l2norm"), rows()), rows(seed=3)
    for other in (copy.deepcopy(transform), pickle.loads(pickle.dumps(transform)), copy.deepcopy(transform).half().float(), transform.double()):
        assert torch.equal(other(x), fitted(("standardize", "l2norm"), rows())(x))


def test_a_fresh_one_has_buffers_and_cannot_be_used() -> None:
    transform = FeatureTransform(("standardize",), 3)
    assert {name: tuple(buffer.shape) for name, buffer in transform.named_buffers()} == {"mean": (3,), "std": (3,)}
    with pytest.raises(ConditionError, match="has no statistics"):
        transform(rows(2, 3))
    assert not transform.is_ready and not FeatureTransform(("center",), 3).is_frozen and FeatureTransform(("l2norm",), 3).is_frozen


# Bad input


@pytest.mark.parametrize("x", [rows(1), rows(1).expand(9, -1), rows(0)], ids=["one", "one nine times", "none"])
def test_the_mean_of_one_image_is_refused(x: Tensor) -> None:
    with pytest.raises(FeatureError, match="the mean of one image is that image") as caught:
        made_of(x, FACTS, ("center",))
    assert "two different images" in str(caught.value)


def test_a_dimension_in_which_all_images_are_alike_cannot_be_standardized() -> None:
    x = rows(40)
    x[:, 2] = 7.5
    x[:, 4] = 0
    with pytest.raises(FeatureError, match="constant in a dimension") as caught:
        made_of(x, FACTS, ("standardize",))
    assert "2 of 6 dimensions, such as 2: 7.5" in str(caught.value) and "feature_transform: center" in str(caught.value)
    made_of(x, FACTS, ("center",))
    # Counted image by image it is found as soon as the statistics would act.
    held = counted(None, x[: LEAST - 1], FACTS, ("standardize",))
    with pytest.raises(FeatureError, match="constant in a dimension"):
        counted(held, x[:LEAST], FACTS, ("standardize",))


@pytest.mark.parametrize("x", [torch.ones(4), torch.ones(2, 3, 4), torch.full((3, 2), torch.nan), torch.tensor([[1.0], [torch.inf]])])
def test_what_is_no_features_is_refused(x: Tensor) -> None:
    with pytest.raises(FeatureError, match="cannot make the statistics"):
        made_of(x, FACTS, ("center",))


@pytest.mark.parametrize(
    "change",
    [
        {"split": "val"},
        {"count": 1},
        {"count": "40"},
        {"count": True},
        {"width": 0},
        {"encoder": 3},
        {"source": None},
        {"is_frozen": None},
        {"is_frozen": False},
        {"is_frozen": False, "count": 1, "counted": [4]},
        {"counted": None},
        {"more": 1},
    ],
    ids=str,
)
def test_statistics_that_no_version_writes_are_refused(change: dict[str, Any]) -> None:
    state = fitted(("center",), rows()).state_dict()
    content = json.loads(bytes(state["_extra_state"].tolist())) | change
    state["_extra_state"] = torch.frombuffer(bytearray(json.dumps(content).encode()), dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=r"cannot use the statistics of `feature_transform`"):
        FeatureTransform(("center",), 6).load_state_dict(state)


@pytest.mark.parametrize("state", [torch.zeros(3, dtype=torch.uint8), torch.frombuffer(bytearray(b"[]"), dtype=torch.uint8), None, {}])
def test_a_state_that_is_none_is_refused(state: Any) -> None:
    with pytest.raises(CheckpointError, match="in this checkpoint"):
        read_facts(state)


# In the module that a UNet holds


def test_statistics_reach_every_copy_and_the_state_dict_of_each() -> None:
    from vlmfilm_plugin import attach

    handle = attach(SmallUNet(), feature_dim=6, cond_dim=4)
    early = copy.deepcopy(handle.unet)
    averaged = torch.optim.swa_utils.AveragedModel(handle.unet, use_buffers=True)
    weighted = torch.optim.swa_utils.AveragedModel(handle.unet, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True)
    handle.fit(rows())
    late = copy.deepcopy(handle.unet)
    for _ in range(5):
        averaged.update_parameters(handle.unet)
        weighted.update_parameters(handle.unet)
    states = [unet.state_dict() for unet in (handle.unet, early, late, averaged.module, weighted.module)]
    for state in states:
        named = {name: value for name, value in state.items() if ".feature_transform." in name}
        assert set(named) == {"vlm_film.feature_transform.mean", "vlm_film.feature_transform._extra_state"}
        assert all(torch.equal(value, states[0][name]) for name, value in named.items())
        centres_by(state)


def centres_by(state: dict[str, Any]) -> None:
    from vlmfilm_plugin import attach

    handle = attach(SmallUNet(), feature_dim=6, cond_dim=4)
    handle.unet.load_state_dict(state)
    assert handle.film.feature_transform is not None
    assert torch.equal(handle.film.transform(rows()), rows() - rows().double().mean(0).float())


def test_statistics_of_another_encoder_or_width_are_refused_with_both_named() -> None:
    from vlmfilm_plugin import attach

    handle = attach(SmallUNet(), encoder="descriptor", cond_dim=4, feature_transform="center")
    width, own = handle.feature_dim, str(handle.film.architecture.fingerprint)
    handle.fit(rows(width=width))
    for change, found, expected in (({"encoder": "other-1"}, "other-1", own), ({"width": width + 1}, f"width {width + 1}", str(width))):
        state = handle.unet.state_dict()
        content = json.loads(bytes(state["vlm_film.feature_transform._extra_state"].tolist())) | change
        state["vlm_film.feature_transform._extra_state"] = torch.frombuffer(bytearray(json.dumps(content).encode()), dtype=torch.uint8)
        with pytest.raises(CheckpointError, match=f"of another {next(iter(change))}|of the features of another encoder") as caught:
            attach(SmallUNet(), encoder="descriptor", cond_dim=4, feature_transform="center").unet.load_state_dict(state)
        assert found in str(caught.value) and expected in str(caught.value)
