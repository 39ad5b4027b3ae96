"""The MedSegDiff UNet: one encoder for the noisy mask, one for the image, one decoder."""

import copy
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from src.archs.components.blocks import Attention, FFTConditioning, LinearAttention, MIDTransformer, ResnetBlock, Residual, SinusoidalPosEmb


def downsample(dim, dim_out):
    return nn.Conv2d(dim, dim_out, 4, stride=2, padding=1)


def upsample(dim, dim_out):
    return nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(dim, dim_out, 3, padding=1))


class MedSegDiffUNet(nn.Module):
    """Predict a mask-shaped field from a noisy mask x, a time and an image cond."""

    # "reentrant" or "nonreentrant": recompute the decoder's second blocks in the backward pass.
    use_checkpoint: str | None = None

    def __init__(
        self,
        dim,
        image_size,
        mask_channels=1,
        input_img_channels=1,
        init_dim=None,
        dim_mult=(1, 2, 4, 8),
        full_self_attn=(False, False, True, True),
        attn_dim_head=32,
        attn_heads=4,
        mid_transformer_depth=1,
        resnet_block_groups=8,
        conditioning_fmap_size=None,
    ):
        super().__init__()
        self.image_size = image_size
        self.mask_channels = mask_channels
        self.input_img_channels = input_img_channels
        init_dim = dim if init_dim is None else init_dim
        time_dim = 4 * dim
        dims = [init_dim, *(dim * mult for mult in dim_mult)]
        stages = list(zip(dims[:-1], dims[1:], full_self_attn, strict=True))
        block = partial(ResnetBlock, time_emb_dim=time_dim, groups=resnet_block_groups)
        attention = {"heads": attn_heads, "dim_head": attn_dim_head}

        self.init_conv = nn.Conv2d(mask_channels, init_dim, 7, padding=3)
        self.cond_init_conv = nn.Conv2d(input_img_channels, init_dim, 7, padding=3)
        self.time_mlp = nn.Sequential(SinusoidalPosEmb(dim), nn.Linear(dim, time_dim), nn.GELU(), nn.Linear(time_dim, time_dim))

        self.downs = nn.ModuleList()
        self.conditioners = nn.ModuleList()
        fmap_size = min(image_size, conditioning_fmap_size or image_size)
        for index, (dim_in, dim_out, full) in enumerate(stages):
            is_last = index == len(stages) - 1
            self.conditioners.append(FFTConditioning(max(1, fmap_size >> index), dim_in))
            resize = nn.Conv2d(dim_in, dim_out, 3, padding=1) if is_last else downsample(dim_in, dim_out)
            attn = Residual((Attention if full else LinearAttention)(dim_in, **attention))
            self.downs.append(nn.ModuleList([block(dim_in, dim_in), block(dim_in, dim_in), attn, resize]))

        self.mid_block1 = block(dims[-1], dims[-1])
        self.mid_transformer = MIDTransformer(dims[-1], depth=mid_transformer_depth, **attention)
        self.mid_block2 = block(dims[-1], dims[-1])
        self.cond_downs = copy.deepcopy(self.downs)
        self.cond_mid_block1 = copy.deepcopy(self.mid_block1)

        self.ups = nn.ModuleList()
        for index, (dim_in, dim_out, full) in enumerate(reversed(stages)):
            is_last = index == len(stages) - 1
            resize = nn.Conv2d(dim_out, dim_in, 3, padding=1) if is_last else upsample(dim_out, dim_in)
            attn = Residual((Attention if full else LinearAttention)(dim_out, **attention))
            self.ups.append(nn.ModuleList([block(dim_out + dim_in, dim_out), block(dim_out + dim_in, dim_out), attn, resize]))

        self.final_res_block = block(2 * init_dim, dim)
        self.final_conv = nn.Conv2d(dim, mask_channels, 1)

    def _second_block(self, block, x, t):
        if self.use_checkpoint is None:
            return block(x, t)
        return checkpoint(block, x, t, use_reentrant=self.use_checkpoint == "reentrant")

    def _encode(self, x, c, t):
        skips = []
        for mask_stage, image_stage, conditioner in zip(self.downs, self.cond_downs, self.conditioners, strict=True):
            block1, block2, attn, resize = mask_stage
            cond_block1, cond_block2, cond_attn, cond_resize = image_stage
            x = block1(x, t)
            skips.append(x)
            c = cond_attn(cond_block2(cond_block1(c, t), t))
            x = conditioner(attn(block2(x, t)), c)
            skips.append(x)
            x, c = resize(x), cond_resize(c)
        return x, c, skips

    def forward(self, x, time, cond):
        x = self.init_conv(x)
        first = x
        t = self.time_mlp(time)
        x, c, skips = self._encode(x, self.cond_init_conv(cond), t)

        c = self.cond_mid_block1(c, t)
        x = self.mid_block1(x, t) + c
        x = self.mid_block2(self.mid_transformer(x, c), t)

        for block1, block2, attn, resize in self.ups:
            x = block1(torch.cat((x, skips.pop()), dim=1), t)
            x = self._second_block(block2, torch.cat((x, skips.pop()), dim=1), t)
            x = resize(attn(x))

        x = self.final_res_block(torch.cat((x, first), dim=1), t)
        return self.final_conv(x)
