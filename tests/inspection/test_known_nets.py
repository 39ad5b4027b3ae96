"""Every net whose decoder was read off its code by hand is inspected rightly; nothing in it or beside it is changed by that."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from known_nets import NETS, KnownNet, monai, x
from processes import run_code, succeed
from torch import nn
from torch.nn.modules import module as global_hooks

import vlmfilm_plugin
from vlmfilm_plugin import HostError, Inspection

ROOT = Path(__file__).parents[2]


def stages_of(found: Inspection, size: int) -> list[tuple[list[str], int, int]]:
    return [(stage["paths"], stage["channels"], size // stage["size"][0]) for stage in found.as_json()["unets"][0]["stages"]]


def state() -> list[Any]:
    hooks = [value for name, value in vars(global_hooks).items() if name.startswith("_global_") and isinstance(value, dict)]
    return [torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist(), random.getstate(), [dict(each) for each in hooks]]


def state_of(net: nn.Module) -> list[Any]:
    buffers = {name: (id(buffer), buffer.clone()) for name, buffer in net.named_buffers()}
    weights = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    flags = [each.training for each in net.modules()]
    hooks = [len(each._forward_hooks) + len(each._forward_pre_hooks) for each in net.modules()]
    return [buffers, weights, flags, hooks]


def same(before: Any, after: Any) -> bool:
    if isinstance(before, torch.Tensor):
        return torch.equal(before, after)
    if isinstance(before, dict):
        return list(before) == list(after) and all(same(before[key], after[key]) for key in before)
    if isinstance(before, list | tuple):
        return len(before) == len(after) and all(map(same, before, after))
    return bool(before == after)


@pytest.mark.parametrize("name", NETS)
def test_blocks_order_channels_and_sizes_are_those_of_the_nets_own_code(name: str) -> None:
    net = NETS[name]
    if net.missing:
        pytest.skip(net.missing)
    torch.manual_seed(3)
    unet = net.build().train()
    before = state(), state_of(unet)
    found = vlmfilm_plugin.inspect(unet, *net.inputs())
    assert same(before, (state(), state_of(unet)))
    seen = found.unets[0]
    assert stages_of(found, net.size) == net.stages
    assert (seen.rank, seen.refusal, seen.uncovered, seen.output) == (net.rank, "", (), None)
    assert seen.cls == f"{type(unet).__module__}:{type(unet).__qualname__}" and seen.path == ""
    again = vlmfilm_plugin.inspect(unet, *net.inputs())
    assert again == found


@pytest.mark.parametrize("name", ["MONAI BasicUNet 2-D", "MONAI SwinUNETR 2-D", "med-seg-diff-pytorch", "MONAI UNet 3-D"])
def test_what_was_seen_can_be_attached_as_it_is(name: str) -> None:
    net = NETS[name]
    if net.missing:
        pytest.skip(net.missing)
    unet = net.build().eval()
    seen = vlmfilm_plugin.inspect(unet, *net.inputs()).unets[0]
    groups = [list(stage.paths) for stage in seen.stages]
    channels = {path: wide for stage in seen.stages for path, wide in zip(stage.paths, stage.channels, strict=True)}
    handle = vlmfilm_plugin.attach(unet, feature_dim=3, stages=groups, channels=channels, rank=seen.rank, channel_axis=1, mode="on")
    with torch.no_grad():
        for parameter in handle.film.parameters():
            parameter.add_(0.3)
        with handle.condition(torch.ones(1, 3)):
            conditioned = unet(*net.inputs())
        with handle.mode("off"):
            off = unet(*net.inputs())
    handle.remove()
    with torch.no_grad():
        assert torch.equal(unet(*net.inputs()), off)
    assert not torch.equal(conditioned, off)


def test_the_highway_decoder_of_official_medsegdiff_is_kept_apart() -> None:
    repo = os.environ.get("VLMFILM_MEDSEGDIFF_REPO")
    if not repo:
        pytest.skip("set VLMFILM_MEDSEGDIFF_REPO to a checkout of the official MedSegDiff")
    code = f"""
    import sys
    sys.path[:0] = [{str(ROOT / "tests" / "hosts")!r}, {repo!r}]
    from torchvision_stand_in import provide_torchvision
    provide_torchvision()
    import json, torch, vlmfilm_plugin
    from guided_diffusion.unet import UNetModel
    net = UNetModel(image_size=256, in_channels=4, model_channels=32, out_channels=2, num_res_blocks=2, attention_resolutions=(16,),
                    channel_mult=(1, 1, 1, 1, 1, 16), num_heads=1)
    print(json.dumps(vlmfilm_plugin.inspect(net, torch.randn(1, 4, 256, 256), torch.tensor([3])).as_json()))
    """
    import json

    seen = json.loads(succeed(run_code(code, PYTHONDONTWRITEBYTECODE="1")).splitlines()[-1])["unets"][0]
    # Three ResBlocks a level (num_res_blocks + 1), the widest next to the bottleneck; attention and upsampling stand behind a ResBlock.
    expected = [
        {
            "index": level,
            "paths": [f"output_blocks.{3 * level + block}.0" for block in range(3)],
            "channels": 32 if level else 512,
            "size": [size] * 2,
        }
        for level, size in enumerate((8, 16, 32, 64, 128, 256))
    ]
    assert seen["stages"] == expected
    assert list(seen["others"]) == ["hwm.conv_blocks_localization.*"]
    assert any("another decoder" in warning for warning in seen["warnings"])


def test_the_unets_of_the_sofl_seg_repo_are_inspected_rightly() -> None:
    repo = os.environ.get("VLMFILM_HOST_REPO")
    if not repo:
        pytest.skip("set VLMFILM_HOST_REPO to a checkout of sofl-seg at 535acb4")
    code = f"""
    import sys
    sys.argv = [{os.path.join(repo, "scripts", "train.py")!r}]
    sys.path[:0] = [{str(ROOT / "tests" / "hosts")!r}, {repo!r}]
    from small_machine import provide_torchvision
    provide_torchvision()
    import json, torch, vlmfilm_plugin
    import src.registry
    from src.archs.components import diffusion_unet
    x, t = torch.randn(2, 1, 64, 64), torch.rand(2)
    for name in ("MedSegDiffUNet", "SegDiffUNet", "SimpleConcatUNet"):
        net = getattr(diffusion_unet, name)(dim=16, image_size=64)
        print(json.dumps(vlmfilm_plugin.inspect(net, x, t, x).as_json()["unets"][0]["stages"]))
    """
    lines = succeed(run_code(code, cwd=repo, PYTHONDONTWRITEBYTECODE="1")).splitlines()[-3:]
    import json

    for line in lines:
        found = [(stage["paths"], stage["channels"], stage["size"][0]) for stage in json.loads(line)]
        # dim_mult (1, 2, 4, 8): a level up is as wide as what it returns to.
        assert found == [([f"ups.{level}.0", f"ups.{level}.1"], wide, 8 << level) for level, wide in enumerate((128, 64, 32, 16))]


@pytest.mark.parametrize(
    ("net", "words"),
    [
        (monai("BasicUNetPlusPlus", 2, 1, 1, features=(4, 8, 12, 16, 20, 6)), "several decoders, one inside the other"),
        (monai("ViT", 1, (64, 64), (8, 8), hidden_size=24, mlp_dim=32, num_heads=2, spatial_dims=2), "looks like a UNet"),
        (monai("DenseNet121", 2, 1, 1), "looks like a UNet"),
    ],
    ids=["UNet++", "ViT", "DenseNet"],
)
def test_what_is_no_unet_is_said_so_in_words(net: Any, words: str) -> None:
    pytest.importorskip("monai")
    try:
        seen = vlmfilm_plugin.inspect(net(), x(1, 64))
    except HostError as error:
        assert words in error.headline
        assert any(label.startswith("seen in") for label in error.facts)
    else:
        assert words in seen.unets[0].refusal


def test_deeplab_is_no_unet() -> None:
    net = NETS["smp.Unet"]
    if net.missing:
        pytest.skip(net.missing)
    from known_nets import _from

    build = _from("segmentation_models_pytorch", "DeepLabV3Plus", "efficientnet-b0", encoder_weights=None)
    with pytest.raises(HostError, match="looks like a UNet"):
        vlmfilm_plugin.inspect(build(), x(3, 64, rows=2))


class Tokens(nn.Module):
    """A UNet of tokens (B, N, C): four, then one, then four."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Sequential(nn.Linear(4, 4), nn.GELU()), nn.Sequential(nn.Linear(4, 4), nn.GELU())

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        low = self.down(tokens).reshape(1, -1, 4, 4).mean(2)
        return self.up(low.repeat_interleave(4, 1) + tokens)


def test_a_net_of_tokens_is_said_to_be_one() -> None:
    with pytest.raises(HostError) as raised:
        vlmfilm_plugin.inspect(Tokens(), torch.randn(1, 16, 4))
    assert "tokens (B, N, C)" in str(raised.value) and "up (1, 16, 4)" in str(raised.value)


@pytest.fixture(autouse=True)
def _imports_are_put_back() -> Iterator[None]:
    path = list(sys.path)
    yield
    sys.path[:] = path


def test_every_net_of_the_table_has_stages_that_grow() -> None:
    for name, net in NETS.items():
        assert isinstance(net, KnownNet) and len(net.stages) > 1, name
        assert [part for _, _, part in net.stages] == sorted((part for _, _, part in net.stages), reverse=True), name
