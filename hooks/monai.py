"""Host adapter for MONAI's UNets, in one to three dimensions: where the decoder of each class is, read off the built net.

`import monai` imports all of them: nothing happens before one is built.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from vlmfilm_plugin.host_spec import HostSpec, UNet, by_resolution, hookimpl, one_each, own_class

NAME = "MONAI"


@hookimpl
def vlmfilm_host(module: ModuleType) -> HostSpec | None:
    """Describe the UNet classes of one module of `monai.networks.nets`, or what cuts windows, or return None."""
    if module.__name__ == "monai.inferers.utils":
        return HostSpec(name=NAME, windows=["sliding_window_inference"], is_library=True) if hasattr(module, "sliding_window_inference") else None
    if not module.__name__.startswith("monai.networks.nets."):
        return None
    unets = []
    for name, (targets, stages, channels) in _DECODERS.items():
        cls = own_class(module, name)
        if cls is not None:
            unets.append(UNet(cls=cls, targets={"post_block2": targets}, stages=stages, channels=channels, channel_axis=1, condition=None))
    return HostSpec(name=NAME, unets=unets, is_library=True) if unets else None


def diffusion_stages(unet: Any) -> list[str]:
    """Return the up blocks of DiffusionModelUNet: each but the last upsamples behind its ResNet blocks."""
    return one_each("up_blocks", unet.up_blocks)


def basic_stages(unet: Any) -> list[str]:
    """Return the blocks of BasicUNet in order of execution, which is that of falling numbers."""
    return [f"upcat_{number}" for number in (4, 3, 2, 1)]


def swin_stages(unet: Any) -> list[str]:
    """Return the blocks of SwinUNETR in order of execution: decoder5 is next to the bottleneck."""
    return [f"decoder{number}" for number in (5, 4, 3, 2, 1)]


def unetr_stages(unet: Any) -> list[str]:
    """Return the blocks of UNETR in order of execution: decoder5 is next to the bottleneck."""
    return [f"decoder{number}" for number in (5, 4, 3, 2)]


def dynamic_stages(unet: Any) -> list[list[str]]:
    """Return the blocks of DynUNet by resolution: one whose transposed convolution has stride 1 stays at that of the one before."""
    return by_resolution(one_each("upsamples", unet.upsamples), (upsamples(block.transp_conv.conv.stride) for block in unet.upsamples))


def segresnet_stages(unet: Any) -> list[str]:
    """Return the groups of ResBlocks of SegResNet: each follows an upsampling."""
    return one_each("up_layers", unet.up_layers)


def nested_blocks(unet: Any) -> list[str]:
    """Return the upsampling layers of UNet, bottleneck first, without the outermost, whose output are the logits."""
    return [path for path, _ in _nested(unet)]


def nested_stages(unet: Any) -> list[list[str]]:
    """Return the upsampling layers of UNet by resolution."""
    return by_resolution(nested_blocks(unet), (upsamples(stride) for _, stride in _nested(unet)))


def _nested(unet: Any) -> list[tuple[str, Any]]:
    """Return path and stride of each inner upsampling layer: a level is Sequential(down, SkipConnection(inner level), up)."""
    found: list[tuple[str, Any]] = []
    level, path = unet.model, "model"
    for stride in unet.strides:
        found.append((f"{path}.2", stride))
        level, path = level[1].submodule, f"{path}.1.submodule"
    return found[:0:-1]


def upsamples(stride: int | Sequence[int]) -> bool:
    """Tell whether a block of this stride upsamples, and so begins a stage."""
    return math.prod((stride,) if isinstance(stride, int) else stride) > 1


def resnet_channels(block: Any) -> int:
    """Return the channels of a ResNet block of DiffusionModelUNet."""
    channels: int = block.out_channels
    return channels


def unetr_channels(block: Any) -> int:
    """Return the channels of a block of DynUNet, SwinUNETR or UNETR: those of its second convolution."""
    channels: int = block.conv_block.conv2.conv.out_channels
    return channels


def upcat_channels(block: Any) -> int:
    """Return the channels of a block of BasicUNet: those of its second convolution."""
    channels: int = block.convs.conv_1.conv.out_channels
    return channels


def residual_channels(block: Any) -> int:
    """Return the channels of a ResBlock of SegResNet."""
    channels: int = block.conv2.conv.out_channels if hasattr(block.conv2, "conv") else block.conv2.out_channels
    return channels


def nested_channels(block: Any) -> int:
    """Return the channels of an upsampling layer of UNet: a transposed convolution, with or without a residual unit behind it."""
    channels: int = (block if hasattr(block, "out_channels") else block[0]).out_channels
    return channels


# Class -> its blocks, their stages, their channels.
_DECODERS: dict[str, tuple[str | Callable[[Any], list[str]], Callable[[Any], Sequence[str | Sequence[str]]], Callable[[Any], int]]] = {
    "DiffusionModelUNet": ("up_blocks.*.resnets.*", diffusion_stages, resnet_channels),
    "DynUNet": ("upsamples.*", dynamic_stages, unetr_channels),
    "BasicUNet": ("upcat_*", basic_stages, upcat_channels),
    "SwinUNETR": ("decoder*", swin_stages, unetr_channels),
    "UNETR": ("decoder*", unetr_stages, unetr_channels),
    "SegResNet": ("up_layers.*.*", segresnet_stages, residual_channels),
    "UNet": (nested_blocks, nested_stages, nested_channels),
}
