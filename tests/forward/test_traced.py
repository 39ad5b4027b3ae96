"""A graph of one forward must not hold one image's gamma and beta for ever: tracers are refused, by hand and in a host's step."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_unet import SmallUNet, inputs, randomise
from torch.fx.experimental.proxy_tensor import make_fx

import vlmfilm_plugin
from vlmfilm_plugin.errors import ConditionError


def exported(unet: Any) -> Any:
    return torch.export.export(unet, inputs(2), strict=False).module()


def exported_strictly(unet: Any) -> Any:
    return torch.export.export(unet, inputs(2), strict=True).module()


def traced(unet: Any) -> Any:
    return torch.jit.trace(unet, inputs(2), check_trace=False)


def made(unet: Any) -> Any:
    return make_fx(unet)(*inputs(2))


def symbolic(unet: Any) -> Any:
    return torch.fx.symbolic_trace(unet)


def onnx(unet: Any) -> Any:
    torch.onnx.export(unet, inputs(2), io.BytesIO(), dynamo=False)


def film_unet(mode: str) -> tuple[SmallUNet, vlmfilm_plugin.FilmHandle]:
    torch.manual_seed(0)
    unet = SmallUNet()
    handle = vlmfilm_plugin.attach(unet, feature_dim=4, mode=mode)
    randomise(handle.film)
    return unet.eval(), handle


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tracer", [exported, traced, made, onnx])
@pytest.mark.parametrize("mode", ["on", "shuffle"])
def test_a_tracer_is_refused_by_name(tracer: Callable[[Any], Any], mode: str) -> None:
    if tracer is onnx and importlib.util.find_spec("onnx") is not None:
        pytest.skip("with onnx installed its errors are its own")
    unet, handle = film_unet(mode)
    with torch.no_grad(), handle.condition(features=torch.rand(2, 4)), pytest.raises(Exception, match="cannot trace this SmallUNet") as error:
        tracer(unet)
    assert isinstance(error.value, ConditionError) or "ConditionError" in repr(error.value.__cause__) or "ConditionError" in str(error.value)
    # And it runs as before.
    with torch.no_grad(), handle.condition(features=torch.rand(2, 4)):
        unet(*inputs(2))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tracer", [exported_strictly, symbolic])
def test_other_tracers_fail_loudly(tracer: Callable[[Any], Any]) -> None:
    unet, handle = film_unet("on")
    with handle.condition(features=torch.rand(2, 4)), pytest.raises(Exception, match=r".+"):
        tracer(unet)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tracer", [exported, traced, made])
def test_in_mode_off_a_graph_is_the_hosts_own_network(tracer: Callable[[Any], Any]) -> None:
    unet, _ = film_unet("off")
    with torch.no_grad():
        graph = tracer(unet)
        x = inputs(2, seed=3)
        assert torch.allclose(graph(*x), unet(*x), atol=1e-6)


def test_compiled_code_is_not_refused_and_follows_its_condition() -> None:
    unet, handle = film_unet("on")
    compiled = torch.compile(unet, backend="eager")
    x = inputs(2)
    with torch.no_grad():
        for seed in range(3):
            features = torch.rand(2, 4, generator=torch.Generator().manual_seed(seed))
            with handle.condition(features=features):
                assert torch.allclose(compiled(*x), unet(*x), atol=1e-6)
