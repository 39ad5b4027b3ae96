"""Building blocks of the UNet."""

import math

import torch
import torch.nn.functional as F
from torch import nn


class Residual(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x, *args):
        return x + self.fn(x, *args)


class ChannelNorm(nn.Module):
    """Layer norm over the channels of (B, C, H, W)."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x):
        x = x - x.mean(dim=1, keepdim=True)
        return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + 1e-5) * self.weight + self.bias


class SinusoidalPosEmb(nn.Module):
    """Time (B,) -> (B, dim)."""

    def __init__(self, dim):
        super().__init__()
        half = dim // 2
        self.register_buffer("freqs", torch.exp(-math.log(10000.0) * torch.arange(half) / max(half - 1, 1)), persistent=False)

    def forward(self, time):
        angles = time.float()[:, None] * self.freqs
        return torch.cat((angles.sin(), angles.cos()), dim=-1)


class Block(nn.Module):
    def __init__(self, dim, dim_out, groups=8):
        super().__init__()
        self.proj = nn.Conv2d(dim, dim_out, 3, padding=1)
        self.norm = nn.GroupNorm(groups, dim_out)
        self.act = nn.SiLU()

    def forward(self, x, scale_shift=None):
        x = self.norm(self.proj(x))
        if scale_shift is not None:
            scale, shift = scale_shift
            x = torch.addcmul(shift, x, 1 + scale)
        return self.act(x)


class ResnetBlock(nn.Module):
    """Two blocks and a shortcut; the first one is modulated by the time embedding."""

    def __init__(self, dim, dim_out, time_emb_dim=None, groups=8):
        super().__init__()
        self.mlp = None if time_emb_dim is None else nn.Sequential(nn.SiLU(), nn.Linear(time_emb_dim, 2 * dim_out))
        self.block1 = Block(dim, dim_out, groups)
        self.block2 = Block(dim_out, dim_out, groups)
        self.res_conv = nn.Identity() if dim == dim_out else nn.Conv2d(dim, dim_out, 1)

    def forward(self, x, time_emb=None):
        scale_shift = None
        if self.mlp is not None and time_emb is not None:
            scale_shift = self.mlp(time_emb)[:, :, None, None].chunk(2, dim=1)
        return self.block2(self.block1(x, scale_shift)) + self.res_conv(x)


class LinearAttention(nn.Module):
    """Attention whose cost grows with H * W, for the large feature maps."""

    def __init__(self, dim, heads=4, dim_head=32):
        super().__init__()
        self.heads = heads
        self.pre_norm = ChannelNorm(dim)
        self.to_qkv = nn.Conv2d(dim, 3 * heads * dim_head, 1, bias=False)
        self.to_out = nn.Sequential(nn.Conv2d(heads * dim_head, dim, 1), ChannelNorm(dim))

    def forward(self, x):
        # q, k, v: (B, heads, D, H * W)
        q, k, v = self.to_qkv(self.pre_norm(x)).flatten(2).unflatten(1, (3, self.heads, -1)).unbind(1)
        summary = v @ k.softmax(dim=-1).transpose(-1, -2)
        out = summary @ (q.softmax(dim=-2) * q.shape[-2] ** -0.5)
        return self.to_out(out.flatten(1, 2).unflatten(-1, x.shape[-2:]))


class Attention(nn.Module):
    """Full self-attention; with `context`, the queries come from there."""

    def __init__(self, dim, heads=4, dim_head=32):
        super().__init__()
        self.heads = heads
        self.pre_norm = ChannelNorm(dim)
        self.pre_norm_q = ChannelNorm(dim)
        self.to_q = nn.Conv2d(dim, heads * dim_head, 1, bias=False)
        self.to_kv = nn.Conv2d(dim, 2 * heads * dim_head, 1, bias=False)
        self.to_out = nn.Conv2d(heads * dim_head, dim, 1)

    def forward(self, x, context=None):
        q = self.to_q(self.pre_norm_q(x if context is None else context)).flatten(2).unflatten(1, (self.heads, -1))
        k, v = self.to_kv(self.pre_norm(x)).flatten(2).unflatten(1, (2, self.heads, -1)).unbind(1)
        q, k, v = (part.transpose(-1, -2) for part in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2)
        return self.to_out(out.flatten(1, 2).unflatten(-1, x.shape[-2:]))


def feed_forward(dim, mult=4):
    return nn.Sequential(ChannelNorm(dim), nn.Conv2d(dim, dim * mult, 1), nn.GELU(), nn.Conv2d(dim * mult, dim, 1))


class MIDTransformer(nn.Module):
    """Bottleneck layers in which mask features attend with queries of the image features."""

    def __init__(self, dim, heads=4, dim_head=32, depth=1):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList([Residual(Attention(dim, heads, dim_head)), Residual(feed_forward(dim))]) for _ in range(depth)
        )

    def forward(self, x, c):
        for attention, feed in self.layers:
            x = feed(attention(x, c))
        return x


class FFTConditioning(nn.Module):
    """Mix image features into mask features, which pass a learned filter in frequency space first."""

    def __init__(self, fmap_size, dim):
        super().__init__()
        self.ff_parser_attn_map = nn.Parameter(torch.ones(dim, fmap_size, fmap_size // 2 + 1))
        self.norm_input = ChannelNorm(dim)
        self.norm_condition = ChannelNorm(dim)
        self.block = ResnetBlock(dim, dim)

    def forward(self, x, c):
        height, width = x.shape[-2:]
        spectrum = torch.fft.rfft2(x)
        gain = self.ff_parser_attn_map
        if gain.shape[-2:] != spectrum.shape[-2:]:
            gain = F.interpolate(gain[None], spectrum.shape[-2:], mode="bilinear", align_corners=False)[0]
        filtered = torch.fft.irfft2(spectrum * gain, s=(height, width))
        return self.block(self.norm_input(filtered) * self.norm_condition(c) * c)
