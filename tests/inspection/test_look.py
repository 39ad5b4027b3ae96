"""`inspect` leaves nothing behind, also where the forward raises; and says what is odd about a net."""

from __future__ import annotations

import random
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

import vlmfilm_plugin
from vlmfilm_plugin import HostError


class Block(nn.Module):
    def __init__(self, inner: int, outer: int, *, returns: str = "tensor") -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(inner, outer, 3, padding=1), nn.BatchNorm2d(outer)
        self.second, self.drop, self.returns = nn.Conv2d(outer, outer, 3, padding=1), nn.Dropout(0.5), returns

    def forward(self, x: Tensor) -> Any:
        x = self.second(self.drop(torch.relu(self.norm(self.first(x)))))
        return {"tensor": x, "tuple": (x.mean(), x), "dict": {"aux": x.mean(), "features": x}}[self.returns]


class Net(nn.Module):
    """Three levels; `odd` is what is odd about it."""

    def __init__(self, odd: str = "") -> None:
        super().__init__()
        returns = odd if odd in ("tuple", "dict") else "tensor"
        self.down = nn.ModuleList([Block(1, 4), Block(4, 6), Block(6, 8)])
        self.up = nn.ModuleList([Block(14, 6, returns=returns), Block(10, 4, returns=returns)])
        self.odd, self.out = odd, nn.Conv2d(4, 1, 1)
        self.tail = Block(4, 4) if odd == "tail" else None
        self.aux = Block(4, 4) if odd == "smaller" else None

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for level, block in enumerate(self.down):
            x = block(nn.functional.max_pool2d(x, 2) if level else x)
            kept.append(x)
        random.random(), numpy.random.rand(), torch.rand(1)
        if self.odd == "raises":
            raise ValueError("the net's own words")
        for level, block in enumerate(self.up):
            given = torch.cat([nn.functional.interpolate(x, scale_factor=2.0), kept[1 - level]], 1)
            for _ in range(2 if self.odd == "twice" else 1):
                found = block(given)
            x = found[1] if isinstance(found, tuple) else found["features"] if isinstance(found, dict) else found
        x = x if self.tail is None else self.tail(x)
        if self.aux is not None:
            self.aux(nn.functional.max_pool2d(x, 2))
        return self.out(x)


def everything(net: nn.Module) -> tuple[Any, ...]:
    hooks = [list(value) for name, value in vars(global_hooks).items() if name.startswith("_global_") and isinstance(value, dict)]
    own = [(list(each._forward_hooks), list(each._forward_pre_hooks), each.training) for each in net.modules()]
    buffers = [(id(buffer), buffer.tolist()) for buffer in net.buffers()]
    return torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist(), random.getstate(), hooks, own, buffers


@pytest.mark.parametrize("odd", ["", "raises"])
@pytest.mark.parametrize("training", [True, False])
def test_streams_buffers_flags_and_hooks_are_as_they_were(odd: str, training: bool) -> None:
    net = Net(odd).train(training)
    net.down[1].eval()
    before = everything(net)
    if odd:
        with pytest.raises(HostError, match="forward raised") as raised:
            vlmfilm_plugin.inspect(net, torch.randn(2, 1, 16, 16, generator=torch.Generator()))
        assert "the net's own words" in str(raised.value) and "(2, 1, 16, 16) float32" in str(raised.value)
    else:
        vlmfilm_plugin.inspect(net, torch.randn(2, 1, 16, 16, generator=torch.Generator()))
    assert everything(net) == before
    assert torch.is_grad_enabled()


def test_a_net_that_was_inspected_trains_to_the_bit_as_one_that_was_not() -> None:
    outputs = []
    for is_inspected in (False, True):
        torch.manual_seed(0)
        net = Net()
        x = torch.randn(2, 1, 16, 16)
        if is_inspected:
            vlmfilm_plugin.inspect(net, x)
        net(x).sum().backward()
        outputs.append([parameter.grad for parameter in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


@pytest.mark.parametrize(("odd", "place"), [("tuple", 1), ("dict", "features")])
def test_blocks_that_return_several_values_are_flagged_with_the_place_of_the_features(odd: str, place: object) -> None:
    seen = vlmfilm_plugin.inspect(Net(odd), torch.randn(1, 1, 16, 16)).unets[0]
    assert seen.output == place and any("several values" in warning for warning in seen.warnings)
    assert [stage.paths for stage in seen.stages] == [("up.0",), ("up.1",)]


def test_blocks_that_run_twice_make_no_host_adapter() -> None:
    seen = vlmfilm_plugin.inspect(Net("twice"), torch.randn(1, 1, 16, 16)).unets[0]
    assert "ran more than once" in seen.refusal and "up.0" in seen.refusal


def test_blocks_behind_the_decoder_are_named() -> None:
    seen = vlmfilm_plugin.inspect(Net("tail"), torch.randn(1, 1, 16, 16)).unets[0]
    assert seen.after == ("tail",) and not seen.refusal


def test_a_smaller_block_behind_it_makes_no_host_adapter() -> None:
    seen = vlmfilm_plugin.inspect(Net("smaller"), torch.randn(1, 1, 16, 16)).unets[0]
    assert "aux runs at a smaller size" in seen.refusal


def test_attention_behind_a_block_is_never_taken_into_it() -> None:
    class Attention(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.weigh = nn.Conv2d(channels, channels, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.softmax(self.weigh(x), 1)

    net = Net()
    for level, channels in enumerate((6, 4)):
        net.up[level] = nn.Sequential(net.up[level], Attention(channels))
    seen = vlmfilm_plugin.inspect(net, torch.randn(1, 1, 16, 16)).unets[0]
    assert [stage.paths for stage in seen.stages] == [("up.0.0",), ("up.1.0",)]


def test_a_compiled_net_is_looked_at_uncompiled() -> None:
    net = Net().eval()
    compiled = torch.compile(net, backend="eager")
    seen = vlmfilm_plugin.inspect(compiled, torch.randn(1, 1, 16, 16)).unets[0]
    assert seen.cls.endswith(":Net") and [stage.paths for stage in seen.stages] == [("up.0",), ("up.1",)]
    # And is compiled afterwards as before.
    x = torch.randn(1, 1, 16, 16)
    assert torch.allclose(compiled(x), net(x))


def test_a_net_that_another_thread_runs_meanwhile_is_not_recorded() -> None:
    import threading

    other, stop = Net().eval(), threading.Event()

    def run() -> None:
        while not stop.is_set():
            other(torch.zeros(1, 1, 16, 16))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        found = [vlmfilm_plugin.inspect(Net(), torch.randn(1, 1, 16, 16)) for _ in range(20)]
    finally:
        stop.set()
        thread.join()
    assert all(each == found[0] for each in found)


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(HostError, match="no module"):
        vlmfilm_plugin.inspect(print, torch.randn(1))  # type: ignore[arg-type]


def test_json_has_the_form_that_was_agreed_on_and_is_read_back() -> None:
    from vlmfilm_plugin.inspection.report import unets_from

    found = vlmfilm_plugin.inspect(Net(), torch.randn(1, 1, 16, 16))
    unet = found.as_json()["unets"][0]
    assert unet["stages"] == [
        {"index": 0, "paths": ["up.0"], "channels": 6, "size": [8, 8]},
        {"index": 1, "paths": ["up.1"], "channels": 4, "size": [16, 16]},
    ]
    assert unet["class"].endswith(":Net") and unet["warnings"] == []
    assert unets_from(found.as_json()) == found
    assert "up.1" in str(found) and "16x16" in str(found)
