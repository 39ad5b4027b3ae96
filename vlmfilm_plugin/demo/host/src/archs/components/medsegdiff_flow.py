"""The MedSegDiff UNet as a flow-matching backbone."""

from torch import nn

from src.archs.components.diffusion_unet import MedSegDiffUNet
from src.registry.base import ARCHS_REGISTRY, MODEL_REGISTRY


def attention_flags(image_size, channel_mult, attn_resolutions):
    """Tell for each stage whether its feature map has one of the resolutions with full attention."""
    return tuple((image_size >> index) in set(attn_resolutions) for index in range(len(channel_mult)))


@MODEL_REGISTRY.register("medsegdiff_flow", {"task": "flow"})
@ARCHS_REGISTRY.register("medsegdiff_flow")
class MedSegDiffFlow(nn.Module):
    def __init__(self, img_resolution, model_channels=64, channel_mult=(1, 2, 4, 8), attn_resolutions=(16, 8), time_scale=1000.0, **_):
        super().__init__()
        self.time_scale = float(time_scale)
        self.base_unet = MedSegDiffUNet(
            dim=model_channels,
            image_size=img_resolution,
            mask_channels=1,
            dim_mult=tuple(channel_mult),
            full_self_attn=attention_flags(img_resolution, channel_mult, attn_resolutions),
            attn_dim_head=max(8, model_channels // 2),
        )

    def forward(self, x, time, cond):
        return self.base_unet(x, time * self.time_scale, cond)
