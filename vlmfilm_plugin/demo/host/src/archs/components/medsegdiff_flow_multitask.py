"""A flow backbone with two heads (hard and soft mask) on the UNet's last features."""

import torch
from torch import nn

from src.archs.components.diffusion_unet import MedSegDiffUNet
from src.archs.components.medsegdiff_flow import attention_flags
from src.registry.base import ARCHS_REGISTRY, MODEL_REGISTRY


@MODEL_REGISTRY.register("medsegdiff_flow_multitask", {"task": "flow"})
@ARCHS_REGISTRY.register("medsegdiff_flow_multitask")
class MedSegDiffFlowMultiTask(nn.Module):
    def __init__(self, img_resolution, model_channels=64, channel_mult=(1, 2, 4, 8), attn_resolutions=(16, 8), time_scale=1000.0, **_):
        super().__init__()
        self.time_scale = float(time_scale)
        self.base_unet = MedSegDiffUNet(
            dim=model_channels,
            image_size=img_resolution,
            mask_channels=2,
            dim_mult=tuple(channel_mult),
            full_self_attn=attention_flags(img_resolution, channel_mult, attn_resolutions),
            attn_dim_head=max(8, model_channels // 2),
        )
        self._feat = None
        self.base_unet.final_res_block.register_forward_hook(self._keep_features)
        self.hard_head = nn.Conv2d(model_channels, 1, 1)
        self.soft_head = nn.Conv2d(model_channels, 1, 1)

    def _keep_features(self, module, args, output):
        self._feat = output

    def forward(self, x, time, cond):
        self.base_unet(x, time * self.time_scale, cond)
        features, self._feat = self._feat, None
        return torch.cat((self.hard_head(features), self.soft_head(features)), dim=1)
