"""torch.compile of a UNet with FiLM: one graph, no recompilation as conditions change, outputs and gradients of eager."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from processes import run_code, succeed
from small_unet import SmallUNet, inputs, randomise
from torch._dynamo.utils import counters

from vlmfilm_plugin import FilmHandle, attach


@pytest.fixture
def handle() -> FilmHandle:
    torch._dynamo.reset()
    counters.clear()
    handle = attach(SmallUNet(), feature_dim=3, cond_dim=4)
    randomise(handle.film)
    return handle


def gradients(handle: FilmHandle, run: torch.nn.Module, features: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    handle.unet.zero_grad(set_to_none=True)
    with handle.condition(features):
        out = run(*inputs(2))
    out.square().mean().backward()
    return out.detach(), {name: p.grad.clone() for name, p in handle.unet.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_equals_eager_and_is_one_graph_for_every_condition(handle: FilmHandle, backend: str) -> None:
    compiled = torch.compile(handle.unet, backend=backend)
    for step in range(3):
        features = torch.randn(2, 3, generator=torch.Generator().manual_seed(step))
        eager, found = gradients(handle, handle.unet, features), gradients(handle, compiled, features)
        assert torch.allclose(eager[0], found[0], atol=1e-6)
        assert eager[1].keys() == found[1].keys()
        assert all(torch.allclose(eager[1][name], found[1][name], atol=1e-6) for name in eager[1])
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_the_block_loop_compiles_as_one_full_graph(handle: FilmHandle) -> None:
    unet = handle.unet
    unet.forward = torch.compile(unet.forward, backend="eager", fullgraph=True)  # type: ignore[method-assign]
    features = torch.randn(2, 3)
    with torch.no_grad(), handle.condition(features):
        found = unet(*inputs(2))
        del unet.forward
        assert torch.allclose(found, unet(*inputs(2)), atol=1e-6)


def test_off_compiles_to_the_plain_host(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    unet = SmallUNet()
    with torch.no_grad():
        plain = unet(*inputs(2))
        monkeypatch.setenv("VLM_FILM_MODE", "off")
        attach(unet, feature_dim=3)
        assert torch.equal(torch.compile(unet, backend="eager")(*inputs(2)), plain)


def test_a_compiled_unet_without_a_condition_still_raises(handle: FilmHandle) -> None:
    from vlmfilm_plugin import ConditionError

    compiled = torch.compile(handle.unet, backend="eager")
    gradients(handle, compiled, torch.randn(2, 3))
    with pytest.raises(ConditionError, match="no condition in force"):
        compiled(*inputs(2))


def test_a_gate_breaks_the_graph_and_still_gates(handle: FilmHandle) -> None:
    compiled = torch.compile(handle.unet, backend="eager")
    gate = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        for condition_gate in (gate, None, gate):
            with handle.condition(torch.ones(2, 3), gate=condition_gate):
                assert torch.allclose(compiled(*inputs(2)), handle.unet(*inputs(2)), atol=1e-6)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_compiled_blocks_under_checkpointing_have_the_gradients_of_eager(use_reentrant: bool, backend: str) -> None:
    torch._dynamo.reset()
    handles = []
    for compiled in (False, True):
        torch.manual_seed(0)
        unet = SmallUNet(use_reentrant=use_reentrant if compiled else None).double()
        handle = attach(unet, feature_dim=3, cond_dim=4)
        randomise(handle.film)
        if compiled:
            for stage in unet.ups:
                stage[1].compile(backend=backend)
        handles.append(handle)
    for _ in range(2):
        for handle in handles:
            handle.unet.zero_grad(set_to_none=True)
            losses = []
            for seed in (1, 2):
                given = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
                with handle.condition(given):
                    losses.append(handle.unet(*inputs(2, seed=seed, dtype=torch.float64)).square().sum())
            (losses[0] + 3 * losses[1]).backward()
        for (name, a), (_, b) in zip(*(handle.unet.named_parameters() for handle in handles), strict=True):
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-10, atol=1e-12, msg=name)
    assert all(inputs_.gamma is None and not inputs_.has_run for inputs_ in handles[1].film.compiled_inputs)


def test_nothing_of_ours_loads_the_compiler_until_something_is_compiled() -> None:
    code = """
import sys, torch
import vlmfilm_plugin.hosts.patches, vlmfilm_plugin.run.runtime
from small_unet import SmallUNet, inputs
from vlmfilm_plugin import attach
handle = attach(SmallUNet(), feature_dim=3)
with handle.condition(torch.ones(1, 3)):
    out = handle.unet(*inputs(2))
out.sum().backward()
assert "torch._dynamo" not in sys.modules, "loaded"
with handle.condition(torch.ones(1, 3)):
    again = torch.compile(handle.unet, backend="eager")(*inputs(2))
assert torch.equal(out, again)
from torch._dynamo.utils import counters
print(counters["stats"]["unique_graphs"], dict(counters["graph_break"]))
"""
    assert succeed(run_code(code, PYTHONPATH=str(Path(__file__).parents[1]))).strip() == "1 {}"
