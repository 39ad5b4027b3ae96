"""The UNets of libraries, the real classes, each in several configurations: where FiLM goes, and that it acts, trains, and is nothing in `off`."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from library_nets import NETS, Net
from torch import Tensor

from vlmfilm_plugin.forward.attach import install
from vlmfilm_plugin.forward.handle import FilmHandle
from vlmfilm_plugin.settings.layers import layers_of, resolve

ALL = [
    pytest.param(net, id=name, marks=pytest.mark.skipif(not net.is_installed, reason=f"{net.package} is not installed")) for name, net in NETS.items()
]
FEATURES = 6


def built(net: Net) -> Any:
    torch.manual_seed(0)
    unet = net.build(net.cls())
    # Fresh nets end in zeros: nothing that happens before would be seen.
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in unet.parameters():
            if not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return unet.eval()


def attached(net: Net, unet: Any, mode: str, **settings: Any) -> FilmHandle:
    settings = {"cond_dim": 8, "text_mlp_hidden_dim": 8, "feature_transform": "none", **settings}
    return install(unet, resolve(layers_of({}, arguments=settings)), mode, net.record(), feature_dim=FEATURES)


def wake(film: Any) -> None:
    with torch.no_grad():
        for parameter in film.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(2))


def leaves(output: Any) -> list[Tensor]:
    output = getattr(output, "sample", output)
    return [output] if isinstance(output, Tensor) else [leaf for each in output for leaf in leaves(each)]


def called(unet: Any, inputs: dict[str, Any]) -> list[Tensor]:
    torch.manual_seed(7)
    return leaves(unet(**inputs))


def can_be_pickled(unet: Any) -> bool:
    """Tell whether the plain net can: some libraries hold lambdas."""
    try:
        pickle.dumps(unet)
    except (AttributeError, pickle.PicklingError):
        return False
    return True


@pytest.mark.parametrize("net", ALL)
def test_film_is_where_the_adapter_says_acts_trains_and_is_nothing_in_off(net: Net) -> None:
    unet, inputs = built(net), net.inputs()
    rows = next(iter(inputs.values())).shape[0]
    with torch.no_grad():
        plain, after_plain = called(unet, inputs), torch.get_rng_state()
    weights = {name: value.clone() for name, value in unet.state_dict().items()}

    torch.manual_seed(3)
    before = torch.get_rng_state()
    handle = attached(net, unet, "off")
    assert torch.equal(torch.get_rng_state(), before), "attaching drew from the host's random stream"
    wake(handle.film)
    with torch.no_grad():
        off = called(unet, inputs)
    assert torch.equal(torch.get_rng_state(), after_plain)
    assert len(off) == len(plain) and all(map(torch.equal, off, plain))
    held = unet.state_dict()
    assert all(torch.equal(held[name], value) for name, value in weights.items())
    assert all("vlm_film." in name for name in held.keys() - weights.keys())
    handle.remove()
    assert unet.state_dict().keys() == weights.keys()

    handle = attached(net, unet, "on")
    stages: dict[int, list[int]] = {}
    for stage in handle.stages:
        stages.setdefault(stage.index, []).append(stage.channels)
    assert [stages[index] for index in sorted(stages)] == net.stages
    features = torch.randn(rows, FEATURES, generator=torch.Generator().manual_seed(4))
    with handle.condition(features=features), torch.no_grad():
        fresh = called(unet, inputs)
    assert all(map(torch.equal, fresh, plain)), "fresh heads are the identity"
    wake(handle.film)
    with handle.condition(features=features):
        on = called(unet, inputs)
    assert any(not torch.equal(*pair) for pair in zip(on, plain, strict=True))
    sum(leaf.float().pow(2).mean() for leaf in on).backward()
    dead = [name for name, p in handle.film.named_parameters() if p.grad is None or not p.grad.any()]
    assert not dead, dead
    assert {head.split(".")[1] for head, _ in handle.film.named_parameters() if head.startswith("heads.")} == {str(i) for i in range(len(net.stages))}


@pytest.mark.parametrize("net", ALL[::3])
def test_copies_and_pickles_modulate_by_heads_of_their_own(net: Net) -> None:
    unet, inputs = built(net), net.inputs()
    is_pickled = can_be_pickled(unet)
    handle = attached(net, unet, "on")
    wake(handle.film)
    copied = copy.deepcopy(unet)
    features = torch.randn(next(iter(inputs.values())).shape[0], FEATURES)
    with torch.no_grad(), handle.condition(features=features):
        own, other = called(unet, inputs), called(copied, inputs)
        assert all(map(torch.equal, own, other))
        for parameter in copied.vlm_film.parameters():
            parameter.zero_()
        assert any(not torch.equal(*pair) for pair in zip(own, called(copied, inputs), strict=True))
        assert all(map(torch.equal, own, called(unet, inputs)))
    if is_pickled:
        assert pickle.loads(pickle.dumps(unet)).state_dict().keys() == unet.state_dict().keys()


@pytest.mark.parametrize("net", ALL)
def test_every_block_is_modulated_by_its_own_head_at_its_own_place(net: Net) -> None:
    unet, inputs = built(net), net.inputs()
    handle = attached(net, unet, "on")
    wake(handle.film)
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(path: str) -> None:
        block = unet.get_submodule(path)
        held: list[Tensor] = []
        block.register_forward_hook(lambda module, args, output: held.append(output.clone()), prepend=True)
        block.register_forward_hook(lambda module, args, output: seen.update({path: (held[0], output)}))

    for stage in handle.stages:
        watch(stage.path)
    features = torch.randn(next(iter(inputs.values())).shape[0], FEATURES, generator=torch.Generator().manual_seed(4))
    with torch.no_grad(), handle.condition(features=features):
        called(unet, inputs)
        vector = handle.film.project(features)
        for position, stage in enumerate(handle.stages):
            gamma, beta = (each.flatten(1) for each in handle.film.head(position)(vector))
            x, y = seen[stage.path]
            shape = (*gamma.shape, *[1] * (x.dim() - 2))
            assert torch.allclose(y, gamma.view(shape) * x + beta.view(shape), atol=1e-5), stage.path
    sizes = [seen[stage.path][0].shape[2:].numel() for stage in handle.stages]
    assert sizes == sorted(sizes)
