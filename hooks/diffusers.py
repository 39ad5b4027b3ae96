"""Host adapter for diffusers: `UNet2DModel` and `UNet2DConditionModel`. FiLM acts behind each ResNet block of `up_blocks`, before attention."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from vlmfilm_plugin.host_spec import HostSpec, UNet, by_resolution, has_arguments, hookimpl, one_each, own_class

NAME = "diffusers"


@hookimpl
def vlmfilm_host(module: ModuleType) -> HostSpec | None:
    """Describe the UNet of one of the package's modules, or return None."""
    if module.__name__.partition(".")[0] != "diffusers":
        return None
    found = [own_class(module, name) for name in ("UNet2DModel", "UNet2DConditionModel")]
    unets = [
        UNet(cls=cls, targets={"post_block2": "up_blocks.*.resnets.*"}, stages=stages_of, channels=channels_of, channel_axis=1, condition=None)
        for cls in found
        if has_arguments(cls, "__init__", {"up_block_types", "block_out_channels"}) and has_arguments(cls, "forward", {"sample", "timestep"})
    ]
    return HostSpec(name=NAME, unets=unets, is_library=True) if unets else None


def stages_of(unet: Any) -> list[list[str]]:
    """Return the up blocks of each resolution, bottleneck first: an up block upsamples behind its ResNet blocks, or not at all."""
    ends = [(getattr(block, "upsamplers", None) or getattr(block, "resnet_up", None)) is not None for block in unet.up_blocks]
    return by_resolution(one_each("up_blocks", unet.up_blocks), [True, *ends[:-1]])


def channels_of(block: Any) -> int:
    """Return the channels of a ResNet block's output."""
    channels: int = block.out_channels
    return channels
