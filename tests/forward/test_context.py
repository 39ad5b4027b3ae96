"""How a condition reaches a block, above all when autograd runs the block again inside backward()."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_unet import SmallUNet, inputs, randomise
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointError, checkpoint

from vlmfilm_plugin.errors import ConditionError
from vlmfilm_plugin.forward import context as conditioning
from vlmfilm_plugin.forward import recompute
from vlmfilm_plugin.forward.attach import attach
from vlmfilm_plugin.forward.handle import FilmHandle

FEATURES = 5
BOTH = pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLM_FILM_MODE", raising=False)
    torch.manual_seed(0)


def film_unet(use_reentrant: bool | None, *, seed: int = 0, checkpoint: Callable[..., Tensor] = checkpoint, **settings: object) -> FilmHandle:
    torch.manual_seed(seed)
    unet = SmallUNet(use_reentrant=use_reentrant, checkpoint=checkpoint).double()
    handle = attach(unet, feature_dim=FEATURES, **{"cond_dim": 4, "text_mlp_hidden_dim": 6, **settings})
    randomise(handle.film, seed)
    return handle


def features(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, FEATURES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def call(handle: FilmHandle, seed: int, rows: int = 3) -> Tensor:
    with handle.condition(features=features(rows, seed)):
        return handle.unet(*inputs(rows, seed=seed, dtype=torch.float64))


def hand_written(handle: FilmHandle) -> tuple[Callable[[int], Tensor], dict[str, Tensor]]:
    """Return a forward with FiLM written into the model, and its own copies of all parameters by name."""
    plain = SmallUNet().double()
    plain.load_state_dict({name: value for name, value in handle.unet.state_dict().items() if not name.startswith("vlm_film.")})
    w = {name: value.detach().clone().requires_grad_() for name, value in handle.film.named_parameters()}

    def forward(seed: int) -> Tensor:
        feature = features(3, seed)
        cond = F.layer_norm(F.linear(feature, w["image_to_cond.proj.weight"], w["image_to_cond.proj.bias"]), (4,))
        cond = cond * w["image_to_cond.ln.weight"] + w["image_to_cond.ln.bias"]

        def film(h: Tensor, stage: int) -> Tensor:
            p = f"heads.{stage}."
            hidden = F.layer_norm(cond, (4,)) * w[p + "ln.weight"] + w[p + "ln.bias"]
            hidden = F.linear(hidden, w[p + "mlp.0.weight"], w[p + "mlp.0.bias"]).relu()
            g, b = F.linear(hidden, w[p + "mlp.2.weight"], w[p + "mlp.2.bias"])[:, :, None, None].chunk(2, dim=1)
            return (1 + 0.1 * torch.tanh(g)) * h + 0.1 * torch.tanh(b)

        return plain(*inputs(3, seed=seed, dtype=torch.float64), film=film)

    return forward, {**dict(plain.named_parameters()), **{f"vlm_film.{name}": value for name, value in w.items()}}


def two_forwards_one_backward(forward: Callable[[int], Tensor]) -> None:
    first, second = forward(1), forward(2)
    (first.square().sum() + 3 * second.tanh().sum()).backward()


@pytest.mark.parametrize("use_reentrant", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
def test_two_forwards_then_one_backward_equal_film_written_into_the_model(use_reentrant: bool | None) -> None:
    handle = film_unet(use_reentrant)
    forward, expected = hand_written(handle)
    torch.testing.assert_close(call(handle, 1), forward(1), rtol=1e-12, atol=1e-13)
    two_forwards_one_backward(lambda seed: call(handle, seed))
    two_forwards_one_backward(forward)
    found = dict(handle.unet.named_parameters())
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        assert float(expected[name].grad.abs().max()) > 1e-9, name
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-10, atol=1e-12, msg=name)


@BOTH
def test_backward_in_another_order_inside_another_condition_and_thread_gives_the_same_gradients(use_reentrant: bool) -> None:
    plain, recomputed = film_unet(None), film_unet(use_reentrant)
    two_forwards_one_backward(lambda seed: call(plain, seed))
    losses = [call(recomputed, 1).square().sum(), 3 * call(recomputed, 2).tanh().sum()]
    failures: list[BaseException] = []

    def backward(loss: Tensor) -> None:
        try:
            with recomputed.condition(features=features(3, 99)):
                loss.backward()
        except BaseException as error:
            failures.append(error)

    for loss in reversed(losses):
        thread = threading.Thread(target=backward, args=(loss,))
        thread.start()
        thread.join()
    assert not failures
    for (name, a), (_, b) in zip(plain.unet.named_parameters(), recomputed.unet.named_parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-10, atol=1e-12, msg=name)


@BOTH
def test_a_forward_between_forward_and_backward_does_not_change_gradients(use_reentrant: bool) -> None:
    handle, reference = film_unet(use_reentrant), film_unet(None)
    call(reference, 1).square().sum().backward()
    loss = call(handle, 1).square().sum()
    handle.unet.eval()
    with torch.no_grad():
        call(handle, 5, rows=2)
    with torch.inference_mode():
        call(handle, 6, rows=1)
    handle.unet.train()
    loss.backward()
    for (name, a), (_, b) in zip(reference.unet.named_parameters(), handle.unet.named_parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-10, atol=1e-12, msg=name)


class OwnCheckpoint(torch.autograd.Function):
    """A checkpoint function of someone's own, as guided_diffusion and DeepSpeed have one: torch's own places see nothing of it."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *args: Tensor) -> Tensor:
        ctx.function, ctx.args = function, args
        with torch.no_grad():
            return function(*args)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        args = [value.detach().requires_grad_(value.is_floating_point()) for value in ctx.args]
        with torch.enable_grad():
            ctx.function(*args).backward(grad)
        return (None, *(value.grad for value in args))


def own_checkpoint(function: Callable[..., Tensor], *args: Tensor, use_reentrant: bool = False) -> Tensor:
    found: Tensor = OwnCheckpoint.apply(function, *args)
    return found


def test_a_checkpoint_function_that_is_not_torchs_raises_rather_than_use_the_latest_condition() -> None:
    handle = film_unet(True, checkpoint=own_checkpoint)
    first = call(handle, 1)
    call(handle, 2)
    with handle.condition(features=features(3, 3)), pytest.raises(ConditionError, match=r"ups\.\d\.1"):
        first.sum().backward()


def test_bound_by_hand_a_checkpoint_function_that_is_not_torchs_is_exact() -> None:
    def bound(function: Callable[..., Tensor], *args: Tensor, use_reentrant: bool) -> Tensor:
        return own_checkpoint(recompute.bind(function), *args)

    same_gradients(film_unet(True, checkpoint=bound), film_unet(None))


def same_gradients(found: FilmHandle, expected: FilmHandle, run: Callable[[FilmHandle, int], Tensor] = call) -> None:
    """Compare the gradients of two forwards and one backward, each forward under its own condition."""
    for handle in (found, expected):
        handle.unet.zero_grad(set_to_none=True)
        two_forwards_one_backward(lambda seed, handle=handle: run(handle, seed) if handle is found else call(handle, seed))  # type: ignore[misc]
    for (name, a), (_, b) in zip(expected.unet.named_parameters(), found.unet.named_parameters(), strict=True):
        assert float(a.grad.abs().max()) > 1e-9, name
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-10, atol=1e-12, msg=name)


def through_closure(function: Callable[..., Tensor], *args: Tensor, use_reentrant: bool, kept: Callable[..., Tensor] = checkpoint) -> Tensor:
    return kept(lambda *inner: function(*inner), *args, use_reentrant=use_reentrant)


def nested(function: Callable[..., Tensor], *args: Tensor, use_reentrant: bool) -> Tensor:
    return checkpoint(lambda *inner: checkpoint(function, *inner, use_reentrant=use_reentrant), *args, use_reentrant=use_reentrant)


def by_module(function: Callable[..., Tensor], *args: Tensor, use_reentrant: bool) -> Tensor:
    return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=use_reentrant)


@BOTH
@pytest.mark.parametrize(
    "how",
    [checkpoint, by_module, functools.partial(checkpoint), through_closure, nested],
    ids=["by name", "by module", "partial", "closure", "nested"],
)
def test_by_hand_every_way_to_call_torchs_checkpoint_is_exact(how: Callable[..., Tensor], use_reentrant: bool) -> None:
    same_gradients(film_unet(use_reentrant, checkpoint=how), film_unet(None))


@BOTH
def test_a_second_backward_of_another_graph_in_between_and_accumulation_are_exact(use_reentrant: bool) -> None:
    found, expected = film_unet(use_reentrant), film_unet(None)
    for handle in (found, expected):
        losses = [call(handle, seed).square().sum() for seed in range(4)]
        for loss in (losses[2], losses[0], losses[3], losses[1]):
            loss.backward()
    for (name, a), (_, b) in zip(expected.unet.named_parameters(), found.unet.named_parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-10, atol=1e-12, msg=name)


@BOTH
@pytest.mark.parametrize("is_inside", [False, True], ids=["backward outside", "backward inside another condition"])
def test_a_checkpoint_around_the_whole_unet_uses_each_forwards_condition(use_reentrant: bool, is_inside: bool) -> None:
    whole, expected = film_unet(None), film_unet(None)

    def run(handle: FilmHandle, seed: int) -> Tensor:
        with handle.condition(features=features(3, seed)):
            x, time, cond = inputs(3, seed=seed, dtype=torch.float64)
            return checkpoint(handle.unet, x.requires_grad_(), time, cond, use_reentrant=use_reentrant)

    if not is_inside:
        same_gradients(whole, expected, run)
        return
    loss = run(whole, 1).square().sum()
    with whole.condition(features=features(3, 7)):
        loss.backward()
    call(expected, 1).square().sum().backward()
    for (name, a), (_, b) in zip(expected.unet.named_parameters(), whole.unet.named_parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-10, atol=1e-12, msg=name)


def test_an_unknown_checkpoint_around_the_whole_unet_is_refused_under_any_condition() -> None:
    handle = film_unet(None)
    with handle.condition(features=features(3, 1)):
        x, time, cond = inputs(3, dtype=torch.float64)
        out = own_checkpoint(handle.unet, x.requires_grad_(), time, cond)
    with handle.condition(features=features(3, 2)), pytest.raises(ConditionError, match="runs again in backward"):
        out.sum().backward()
    assert not conditioning.stacks.contexts


def test_a_condition_entered_inside_backward_serves_there() -> None:
    handle, seen = film_unet(None), []
    leaf = torch.ones(1, dtype=torch.float64, requires_grad=True)
    leaf.register_hook(lambda _: seen.append(call(handle, 1)))
    expected = call(handle, 1)
    leaf.sum().backward()
    assert torch.equal(seen[0], expected)


@BOTH
def test_off_runs_its_blocks_again_like_the_plain_unet(use_reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM_FILM_MODE", "off")
    handle, plain = film_unet(use_reentrant), SmallUNet(use_reentrant=use_reentrant).double()
    plain.load_state_dict({name: value for name, value in handle.unet.state_dict().items() if "vlm_film" not in name})
    for unet in (handle.unet, plain):
        unet(*inputs(3, dtype=torch.float64)).square().sum().backward()
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter.grad, handle.unet.get_parameter(name).grad), name


@BOTH
def test_a_gate_holds_when_its_block_runs_again(use_reentrant: bool) -> None:
    gate = torch.rand(3, 1, 8, 8, dtype=torch.float64)

    def gated(handle: FilmHandle, seed: int) -> Tensor:
        with handle.condition(features=features(3, seed), gate=gate * seed / 2):
            return handle.unet(*inputs(3, seed=seed, dtype=torch.float64))

    found, expected = film_unet(use_reentrant), film_unet(None)
    for handle in (found, expected):
        two_forwards_one_backward(lambda seed, handle=handle: gated(handle, seed))  # type: ignore[misc]
    for (name, a), (_, b) in zip(expected.unet.named_parameters(), found.unet.named_parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-10, atol=1e-12, msg=name)


def test_torch_is_as_it_was_outside_of_every_condition() -> None:
    kept = torch.utils.checkpoint.CheckpointFunction, torch.utils.checkpoint._CheckpointFrame

    def methods() -> tuple[object, object]:
        return kept[0].__dict__["forward"], kept[1].__dict__["__init__"]

    before = methods()
    one, two = film_unet(False, seed=1), film_unet(True, seed=2)
    assert methods() == before
    with one.condition(features=features(3, 1)), pytest.raises(KeyError), two.condition(features=features(3, 2)):
        assert methods() != before
        raise KeyError
    assert methods() == before
    loss = call(one, 1).sum() + call(two, 2).sum()
    assert methods() == before
    loss.backward()
    one.remove()
    two.remove()
    assert methods() == before


@BOTH
def test_two_unets_alive_and_one_removed_before_backward_is_refused(use_reentrant: bool) -> None:
    one, two = film_unet(use_reentrant, seed=1), film_unet(use_reentrant, seed=2)
    first, second = call(one, 1).sum(), call(two, 2).sum()
    one.remove()
    second.backward()
    with pytest.raises(ConditionError, match="removed"):
        first.backward()


@BOTH
def test_a_whole_unet_whose_film_was_removed_before_backward_is_refused(use_reentrant: bool) -> None:
    handle = film_unet(None)
    with handle.condition(features=features(3, 1)):
        x, time, cond = inputs(3, dtype=torch.float64)
        loss = checkpoint(handle.unet, x.requires_grad_(), time, cond, use_reentrant=use_reentrant).sum()
    handle.remove()
    with pytest.raises((ConditionError, CheckpointError)):
        loss.backward()


@BOTH
def test_attached_twice_in_turn_both_graphs_are_exact(use_reentrant: bool) -> None:
    found, expected = film_unet(use_reentrant), film_unet(None)
    for _ in range(2):
        same_gradients(found, expected)
        for handle in (found, expected):
            handle.remove()
        found, expected = (attach(handle.unet, feature_dim=FEATURES, cond_dim=4, text_mlp_hidden_dim=6) for handle in (found, expected))
        for handle in (found, expected):
            randomise(handle.film, 5)


@BOTH
def test_retained_graph_can_be_run_backward_twice(use_reentrant: bool) -> None:
    handle = film_unet(use_reentrant)
    loss = call(handle, 1).square().sum()
    loss.backward(retain_graph=True)
    once = {name: parameter.grad.clone() for name, parameter in handle.unet.named_parameters()}
    loss.backward()
    for name, parameter in handle.unet.named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * once[name], msg=name)


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_two_unets_alive_keep_their_own_conditions(use_reentrant: bool | None) -> None:
    one, two = film_unet(use_reentrant, seed=1), film_unet(use_reentrant, seed=2)
    alone = [call(one, 1).detach(), call(two, 2).detach()]
    with one.condition(features=features(3, 1)), two.condition(features=features(3, 2)):
        a = one.unet(*inputs(3, seed=1, dtype=torch.float64))
        b = two.unet(*inputs(3, seed=2, dtype=torch.float64))
    assert torch.equal(a, alone[0])
    assert torch.equal(b, alone[1])
    (a.sum() * b.sum()).backward()
    assert all(parameter.grad is not None for handle in (one, two) for parameter in handle.film.parameters())


def test_a_unet_called_inside_anothers_forward_keeps_its_own_context() -> None:
    outer, inner = film_unet(None, seed=1), film_unet(None, seed=2)
    expected = [call(outer, 1), call(inner, 2)]
    nested: list[Tensor] = []
    outer.unet.ups[0][1].register_forward_pre_hook(lambda *_: nested.append(call(inner, 2)))
    assert torch.equal(call(outer, 1), expected[0])
    assert torch.equal(nested[0], expected[1])


def nest(handle: FilmHandle, inner: Callable[[], None]) -> None:
    """Make the UNet run `inner` in the middle of its next forward."""

    def once(*_: object) -> None:
        hook.remove()
        inner()

    hook = handle.unet.ups[1][0].register_forward_pre_hook(once)


def test_a_unet_called_inside_its_own_forward_keeps_both_frames() -> None:
    handle, nested = film_unet(None), []
    expected = [call(handle, 1), call(handle, 2)]

    def inner() -> None:
        condition = conditioning.stacks.conditions.pop()
        nested.append(call(handle, 2))
        conditioning.stacks.conditions.append(condition)

    nest(handle, inner)
    assert torch.equal(call(handle, 1), expected[0])
    assert torch.equal(nested[0], expected[1])


def test_a_refused_inner_call_of_the_same_unet_does_not_close_the_outer_context() -> None:
    handle, seen = film_unet(None), []
    expected = call(handle, 1)

    def inner() -> None:
        with pytest.raises(ConditionError):
            handle.unet(*inputs(2, dtype=torch.float64))
        seen.append(len(conditioning.stacks.contexts))

    nest(handle, inner)
    assert torch.equal(call(handle, 1), expected)
    assert seen == [1]


def test_an_exception_inside_forward_leaves_no_frame_open() -> None:
    handle = film_unet(None)
    expected = call(handle, 1)

    def fail(*_: object) -> None:
        raise KeyError("in the middle")

    hook = handle.unet.ups[1][0].register_forward_hook(fail)
    with pytest.raises(KeyError):
        call(handle, 1)
    assert not conditioning.stacks.contexts
    with pytest.raises(ConditionError):
        handle.unet.ups[0][1](torch.zeros(1, 6, 4, 4, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
    hook.remove()
    assert torch.equal(call(handle, 1), expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_an_exception_inside_a_recomputed_block_restores_the_stack(use_reentrant: bool) -> None:
    handle = film_unet(use_reentrant)
    loss = call(handle, 1).sum()

    def fail(*_: object) -> None:
        raise KeyError("in backward")

    hook = handle.unet.ups[0][1].register_forward_pre_hook(fail)
    with pytest.raises(KeyError):
        loss.backward()
    assert not conditioning.stacks.contexts
    hook.remove()
    call(handle, 1).sum().backward()


def test_an_error_in_the_condition_itself_leaves_nothing_open() -> None:
    handle = film_unet(None)
    with pytest.raises(ConditionError), handle.condition(features=features(2, 0)):
        handle.unet(*inputs(3, dtype=torch.float64))
    assert not conditioning.stacks.contexts


def test_a_block_called_outside_a_forward_raises_also_inside_a_condition() -> None:
    handle = film_unet(None)
    block, arguments = handle.unet.ups[0][1], (torch.zeros(1, 6, 4, 4, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
    with pytest.raises(ConditionError, match=r"ups\.0\.1"):
        block(*arguments)
    with handle.condition(features=features(1, 0)), pytest.raises(ConditionError):
        block(*arguments)
    call(handle, 1)
    with pytest.raises(ConditionError):
        block(*arguments)


def test_forward_called_past_the_hooks_raises() -> None:
    handle = film_unet(None)
    with handle.condition(features=features(3, 0)), pytest.raises(ConditionError):
        handle.unet.forward(*inputs(3, dtype=torch.float64))


def test_a_condition_of_another_unet_does_not_serve() -> None:
    one, two = film_unet(None, seed=1), film_unet(None, seed=2)
    with one.condition(features=features(3, 0)), pytest.raises(ConditionError, match="no condition in force"):
        two.unet(*inputs(3, dtype=torch.float64))


def test_nested_conditions_the_inner_wins_and_the_outer_comes_back() -> None:
    handle = film_unet(None)
    outer, inner = call(handle, 1), None
    with handle.condition(features=features(3, 1)):
        with handle.condition(features=features(3, 2)):
            inner = handle.unet(*inputs(3, seed=2, dtype=torch.float64))
        again = handle.unet(*inputs(3, seed=1, dtype=torch.float64))
    assert torch.equal(again, outer)
    assert torch.equal(inner, call(handle, 2))


def test_equal_conditions_nested_leave_the_stack_in_order() -> None:
    handle = film_unet(None)
    same = features(1, 1)
    with handle.condition(features=same):
        outer = conditioning.condition_for(handle.film)
        with handle.condition(features=same[:, :]):
            pass
        assert conditioning.condition_for(handle.film) is outer


def test_a_condition_is_taken_out_when_the_block_raises() -> None:
    handle = film_unet(None)
    with pytest.raises(KeyError), handle.condition(features=features(1, 1)):
        raise KeyError
    assert not conditioning.stacks.conditions


def test_threads_have_conditions_of_their_own() -> None:
    handle = film_unet(None)
    expected = {seed: call(handle, seed).detach() for seed in range(4)}
    barrier = threading.Barrier(4)
    results: dict[int, bool] = {}
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            with handle.condition(features=features(3, seed)):
                barrier.wait(20)
                for _ in range(5):
                    with torch.no_grad():
                        results[seed] = torch.equal(handle.unet(*inputs(3, seed=seed, dtype=torch.float64)), expected[seed])
                    barrier.wait(20)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert results == dict.fromkeys(range(4), True)


def test_a_condition_does_not_reach_another_thread() -> None:
    handle = film_unet(None)
    caught: list[BaseException] = []

    def work() -> None:
        try:
            handle.unet(*inputs(3, dtype=torch.float64))
        except BaseException as error:
            caught.append(error)

    with handle.condition(features=features(3, 0)):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert [type(error) for error in caught] == [ConditionError]


def test_bind_without_an_open_frame_is_the_function_itself() -> None:
    def function() -> None: ...

    assert recompute.bind(function) is function


def test_a_bound_function_restores_the_frames_around_it_and_keeps_its_name() -> None:
    handle = film_unet(None)
    bound: list[Callable[[], list[conditioning.ForwardContext]]] = []

    def contexts() -> list[conditioning.ForwardContext]:
        """Contexts now."""
        return list(conditioning.stacks.contexts)

    hook = handle.unet.ups[0][0].register_forward_hook(lambda *_: bound.append(recompute.bind(contexts)))
    call(handle, 1)
    hook.remove()
    assert [context.film for context in bound[0]()] == [handle.film]
    assert bound[0].__name__ == "contexts"
    assert bound[0].__doc__ == "Contexts now."
    assert contexts() == []


def test_the_features_of_a_frame_get_no_gradient() -> None:
    handle = film_unet(None)
    given = features(3, 1).requires_grad_()
    with handle.condition(features=given):
        handle.unet(*inputs(3, dtype=torch.float64)).sum().backward()
    assert given.grad is None


@BOTH
def test_a_deepcopy_recomputes_with_its_own_heads(use_reentrant: bool) -> None:
    handle = film_unet(use_reentrant)
    twin = copy.deepcopy(handle.unet)
    randomise(twin.vlm_film, 7)
    with handle.condition(features=features(3, 1)):
        a = handle.unet(*inputs(3, seed=1, dtype=torch.float64))
        b = twin(*inputs(3, seed=1, dtype=torch.float64))
    assert not torch.equal(a, b)
    b.sum().backward()
    assert all(parameter.grad is None for parameter in handle.unet.parameters())
    assert all(parameter.grad is not None for parameter in twin.parameters())


class _OwnCheckpoint(torch.autograd.Function):
    """A checkpoint of the guided-diffusion kind: inputs and parameters go in, the forward runs again in backward."""

    @staticmethod
    def forward(ctx: Any, run: Any, count: int, *args: Tensor) -> Tensor:
        ctx.run, ctx.inputs, ctx.parameters = run, args[:count], args[count:]
        with torch.no_grad():
            return run(*ctx.inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        inputs = [x.detach().requires_grad_(True) for x in ctx.inputs]
        with torch.enable_grad():
            output = ctx.run(*[x.view_as(x) for x in inputs])
        found = torch.autograd.grad(output, [*inputs, *ctx.parameters], gradients, allow_unused=True)
        return (None, None, *found)


def test_a_block_that_checkpoints_inside_its_own_forward_is_modulated_outside_of_it() -> None:
    def wrap(unet: SmallUNet) -> SmallUNet:
        for stage in unet.ups:
            inner = stage[1].forward
            stage[1].forward = lambda x, t, inner=inner, block=stage[1]: _OwnCheckpoint.apply(inner, 2, x, t, *block.parameters())
        return unet

    results = []
    for is_wrapped in (False, True):
        torch.manual_seed(0)
        unet = SmallUNet().double()
        handle = attach(wrap(unet) if is_wrapped else unet, feature_dim=FEATURES, cond_dim=4)
        randomise(handle.film)
        losses = []
        for seed in range(2):
            with handle.condition(features(2, seed)):
                losses.append(unet(*inputs(2, seed=seed, dtype=torch.float64)).square().sum() * (seed + 1))
        sum(losses).backward()  # type: ignore[union-attr]
        results.append({name: parameter.grad for name, parameter in unet.named_parameters()})
    assert results[0]["vlm_film.image_to_cond.proj.weight"].norm() > 0
    assert all(torch.allclose(results[0][name], gradient, rtol=1e-10, atol=1e-12) for name, gradient in results[1].items())
