"""Host adapter for segmentation_models.pytorch: `Unet`, whichever encoder it has. FiLM acts inside a decoder block, before its attention."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from vlmfilm_plugin.host_spec import HostSpec, UNet, has_arguments, hookimpl, own_class

NAME = "segmentation_models.pytorch"
TARGETS = {"post_block2": "decoder.blocks.*.conv2", "post_block1": "decoder.blocks.*.conv1"}


@hookimpl
def vlmfilm_host(module: ModuleType) -> HostSpec | None:
    """Describe `segmentation_models_pytorch.decoders.unet.model`, or return None."""
    if module.__name__.partition(".")[0] != "segmentation_models_pytorch":
        return None
    cls = own_class(module, "Unet")
    if not has_arguments(cls, "__init__", {"encoder_name", "decoder_channels"}):
        return None
    unet = UNet(cls=cls, targets=TARGETS, stages=stages_of, channel_axis=1, condition=None)
    return HostSpec(name=NAME, unets=[unet], is_library=True)


def stages_of(unet: Any) -> list[str]:
    """Return the blocks of the decoder, bottleneck first: each begins by upsampling to the size of its skip connection."""
    return [f"decoder.blocks.{number}" for number in range(len(unet.decoder.blocks))]
