"""Host adapter for the networks of nnU-Net: `PlainConvUNet`, `ResidualEncoderUNet` and `ResidualUNet`, in one to three dimensions."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

from vlmfilm_plugin.host_spec import HostSpec, UNet, by_resolution, has_arguments, hookimpl, one_each, own_class

NAME = "nnU-Net's dynamic_network_architectures"


@hookimpl
def vlmfilm_host(module: ModuleType) -> HostSpec | None:
    """Describe `dynamic_network_architectures.architectures.unet`, or return None."""
    if module.__name__.partition(".")[0] != "dynamic_network_architectures":
        return None
    found = [own_class(module, name) for name in ("PlainConvUNet", "ResidualEncoderUNet", "ResidualUNet")]
    unets = [
        UNet(cls=cls, targets={"post_block2": "decoder.stages.*"}, stages=stages_of, channels=channels_of, channel_axis=1, condition=None)
        for cls in found
        if has_arguments(cls, "__init__", {"n_stages", "features_per_stage", "n_conv_per_stage_decoder"})
    ]
    return HostSpec(name=NAME, unets=unets, is_library=True) if unets else None


def stages_of(unet: Any) -> list[list[str]]:
    """Return the blocks of the decoder by resolution: one whose transposed convolution has stride 1 stays at that of the one before."""
    upsamples = unet.decoder.transpconvs
    return by_resolution(one_each("decoder.stages", upsamples), (math.prod(upsample.stride) > 1 for upsample in upsamples))


def channels_of(block: Any) -> int:
    """Return the channels of a block of the decoder."""
    channels: int = block.output_channels
    return channels
