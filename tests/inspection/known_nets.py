"""Nets whose decoders were read off their own code by hand: which blocks, in which order, with how many channels, at which part of the input.

Nothing here comes from an inspection. `stages` goes from the bottleneck on: (paths, channels, by how much the input is larger).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Stage = tuple[list[str], int, int]


@dataclass(frozen=True)
class KnownNet:
    """A net, one call of it, and its decoder. `size` is the input's along each axis, `rank` the number of axes."""

    package: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    stages: list[Stage]
    size: int
    rank: int = 2
    others: tuple[str, ...] = ()
    is_without_torchvision: bool = True

    @property
    def missing(self) -> str:
        """Return why it cannot be built here; empty where it can."""
        return "" if find_spec(self.package) is not None else f"{self.package} is not installed"


def x(channels: int, size: int, rank: int = 2, rows: int = 1) -> Tensor:
    return torch.randn(rows, channels, *[size] * rank, generator=torch.Generator().manual_seed(1))


def numbered(pattern: str, channels: list[int], first: int, count: range | None = None) -> list[Stage]:
    """Return stages of one block each; each has twice the size of the one before."""
    return [
        ([pattern.format(number)], wide, first >> step)
        for step, (number, wide) in enumerate(zip(count or range(len(channels)), channels, strict=True))
    ]


def monai(name: str, *args: Any, **more: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(importlib.import_module("monai.networks.nets"), name)(*args, **more)


def _monai_nets() -> dict[str, KnownNet]:
    found = {}
    for rank, size in ((2, 64), (3, 32)):
        for name, net, stages in (
            # UpCat 4 to 1, each an upsampling and a TwoConv `convs`; the last one has features[5] channels.
            (
                "BasicUNet",
                monai("BasicUNet", rank, 1, 1, features=(4, 8, 12, 16, 20, 6)),
                numbered("upcat_{}.convs", [16, 12, 8, 6], 8, range(4, 0, -1)),
            ),
            # The upsamples are built from the bottleneck on; a block is a UnetBasicBlock `conv_block` behind a transposed convolution.
            (
                "DynUNet",
                monai("DynUNet", rank, 1, 1, [3] * 4, [1, 2, 2, 2], [2] * 3, filters=[4, 8, 12, 16]),
                numbered("upsamples.{}.conv_block", [12, 8, 4], 4),
            ),
            # Each up layer is a Sequential of ResBlocks, one by default.
            (
                "SegResNet",
                monai("SegResNet", rank, 4, 1, 1, norm=("GROUP", {"num_groups": 4})),
                numbered("up_layers.{}.0", [16, 8, 4], 4),
            ),
            # Each level: a transposed convolution, and a ResidualUnit of one unit; nested in skip connections, so the bottleneck's is the deepest.
            (
                "UNet",
                monai("UNet", rank, 1, 3, (4, 8, 12, 16), (2, 2, 2), num_res_units=2),
                [(["model.1.submodule.1.submodule.2.1"], 8, 4), (["model.1.submodule.2.1"], 4, 2), (["model.2.1"], 3, 1)],
            ),
            # decoder5 takes the transformer's tokens at 1/16, and gives 1/8; decoder2 gives the input's size.
            (
                "UNETR",
                monai("UNETR", 1, 1, (size,) * rank, feature_size=4, hidden_size=24, mlp_dim=32, num_heads=2, spatial_dims=rank),
                numbered("decoder{}.conv_block", [32, 16, 8, 4], 8, range(5, 1, -1)),
            ),
            # Levels are lists; each up block has num_res_blocks + 1 ResnetBlocks.
            (
                "DiffusionModelUNet",
                monai("DiffusionModelUNet", rank, 1, 1, (1, 1), (4, 8), (False, True), norm_num_groups=4, num_head_channels=4),
                [([f"up_blocks.{level}.resnets.{block}" for block in range(2)], wide, 2 - level) for level, wide in ((0, 8), (1, 4))],
            ),
        ):
            more = (torch.tensor([3]),) if name == "DiffusionModelUNet" else ()
            found[f"MONAI {name} {rank}-D"] = KnownNet("monai", net, lambda s=size, r=rank, m=more: (x(1, s, r), *m), stages, size, rank)  # type: ignore[misc]
        # decoder5 to decoder1, from 1/16 on to the input's size; decoder1 is behind the one that is as wide as itself.
        swin = monai("SwinUNETR", 1, 1, feature_size=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), spatial_dims=rank)
        stages = numbered("decoder{}.conv_block", [96, 48, 24, 12, 12], 16, range(5, 0, -1))
        found[f"MONAI SwinUNETR {rank}-D"] = KnownNet("monai", swin, lambda r=rank: (x(1, 64, r),), stages, 64, rank)  # type: ignore[misc]
    plain = monai("UNet", 2, 1, 3, (4, 8, 12, 16), (2, 2, 2))
    # Without residual units a level up is its transposed convolution alone.
    stages = [(["model.1.submodule.1.submodule.2"], 8, 4), (["model.1.submodule.2"], 4, 2), (["model.2"], 3, 1)]
    found["MONAI UNet without residual units"] = KnownNet("monai", plain, lambda: (x(1, 64),), stages, 64)
    vnet = monai("VNet", spatial_dims=2, in_channels=1, out_channels=1)
    # Two of its levels have two convolutions, two have one.
    stages = [([f"up_tr{wide}.ops"], wide, part) for wide, part in ((256, 8), (128, 4), (64, 2), (32, 1))]
    found["MONAI VNet"] = KnownNet("monai", vnet, lambda: (x(1, 64),), stages, 64)
    return found


def _ups(channels: list[int]) -> list[Stage]:
    """Return the stages of a UNet of the MedSegDiff kind: `ups.{i}` = [block1, block2, attention, upsample]; block1 and block2 are as wide."""
    count = len(channels)
    return [([f"ups.{level}.0", f"ups.{level}.1"], wide, 2 ** (count - 1 - level)) for level, wide in enumerate(channels)]


def _med_seg_diff() -> nn.Module:
    from med_seg_diff_pytorch.med_seg_diff_pytorch import Unet

    net: nn.Module = Unet(dim=8, image_size=32, mask_channels=1, input_img_channels=1, dim_mults=(1, 2, 4), full_self_attn=(False, False, False))
    return net


def _diffusers(name: str, **more: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        net: nn.Module = getattr(importlib.import_module("diffusers"), name)(
            sample_size=32, in_channels=1, out_channels=1, block_out_channels=(8, 12, 16), norm_num_groups=4, attention_head_dim=4, **more
        )
        return net

    return build


def _from(module: str, name: str, *args: Any, **more: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        if module.startswith(("denoising", "segmentation")):
            sys.path.append(str(Path(__file__).parents[1] / "hosts"))
            from torchvision_stand_in import provide_torchvision

            provide_torchvision()
        net: nn.Module = getattr(importlib.import_module(module), name)(*args, **more)
        return net

    return build


def _nnunet(conv: Any, norm: Any, *, deep_supervision: bool) -> Callable[[], nn.Module]:
    known = {"conv_bias": True, "norm_op": norm, "nonlin": nn.LeakyReLU, "deep_supervision": deep_supervision}
    return _from("dynamic_network_architectures.architectures.unet", "PlainConvUNet", 1, 4, (4, 8, 12, 16), conv, 3, (1, 2, 2, 2), 2, 2, 2, **known)


TIME = torch.tensor([3])
NETS = {
    **_monai_nets(),
    # dims (8, 8, 16, 32) in pairs, from the last on: a level up has the width of its pair's end.
    "med-seg-diff-pytorch": KnownNet("med_seg_diff_pytorch", _med_seg_diff, lambda: (x(1, 32), TIME, x(1, 32)), _ups([32, 16, 8]), 32),
    "denoising-diffusion-pytorch": KnownNet(
        "denoising_diffusion_pytorch",
        _from("denoising_diffusion_pytorch", "Unet", dim=8, dim_mults=(1, 2, 4), flash_attn=False),
        lambda: (x(3, 32), TIME),
        _ups([32, 16, 8]),
        32,
    ),
    # layers_per_block + 1 resnets a block up; the last block has no upsampler.
    "diffusers UNet2DModel": KnownNet(
        "diffusers",
        _diffusers(
            "UNet2DModel",
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        ),
        lambda: (x(1, 32), 3),
        [([f"up_blocks.{level}.resnets.{block}" for block in range(2)], wide, 4 >> level) for level, wide in enumerate((16, 12, 8))],
        32,
    ),
    "diffusers UNet2DConditionModel": KnownNet(
        "diffusers",
        _diffusers(
            "UNet2DConditionModel",
            layers_per_block=2,
            cross_attention_dim=8,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        ),
        lambda: (x(1, 32), 3, torch.ones(1, 2, 8)),
        [([f"up_blocks.{level}.resnets.{block}" for block in range(3)], wide, 4 >> level) for level, wide in enumerate((16, 12, 8))],
        32,
    ),
    **{
        f"smp.Unet{' with scse' if attention else ''}": KnownNet(
            "segmentation_models_pytorch",
            _from(
                "segmentation_models_pytorch",
                "Unet",
                "efficientnet-b0",
                encoder_weights=None,
                decoder_channels=(64, 48, 32, 16, 16),
                decoder_attention_type=attention,
            ),
            lambda: (x(3, 64),),
            numbered("decoder.blocks.{}", [64, 48, 32, 16, 16], 16),
            64,
        )
        for attention in (None, "scse")
    },
    # A stage is StackedConvBlocks, which holds its convolutions in the Sequential `convs`.
    "nnU-Net PlainConvUNet 2-D": KnownNet(
        "dynamic_network_architectures",
        _nnunet(nn.Conv2d, nn.InstanceNorm2d, deep_supervision=False),
        lambda: (x(1, 32),),
        numbered("decoder.stages.{}.convs", [12, 8, 4], 4),
        32,
    ),
    "nnU-Net PlainConvUNet 3-D, deep supervision": KnownNet(
        "dynamic_network_architectures",
        _nnunet(nn.Conv3d, nn.InstanceNorm3d, deep_supervision=True),
        lambda: (x(1, 16, 3),),
        numbered("decoder.stages.{}.convs", [12, 8, 4], 4),
        16,
        3,
    ),
}
