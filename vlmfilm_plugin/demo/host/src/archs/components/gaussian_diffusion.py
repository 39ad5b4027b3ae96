"""Gaussian diffusion (DDPM) over masks, predicting the clean mask."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from src.archs.components.diffusion_unet import MedSegDiffUNet
from src.registry.base import MODEL_REGISTRY


def cosine_alphas(timesteps, offset=0.008):
    """Return the cumulative products of alpha, (timesteps + 1,), the first one 1."""
    steps = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    curve = torch.cos((steps + offset) / (1 + offset) * math.pi / 2) ** 2
    betas = (1 - curve[1:] / curve[:-1]).clamp(max=0.999)
    return torch.cat((torch.ones(1, dtype=torch.float64), (1 - betas).cumprod(0))).float()


class GaussianDiffusionModel(nn.Module):
    """Masks are [0, 1] outside and [-1, 1] inside."""

    def __init__(self, model, timesteps=1000):
        super().__init__()
        self.model = model
        self.num_timesteps = timesteps
        self.mask_channels = model.mask_channels
        self.register_buffer("alphas_cumprod", cosine_alphas(timesteps))

    def forward(self, img, cond_img):
        """Return the training loss of masks `img` under images `cond_img`."""
        clean = img * 2 - 1
        time = torch.randint(0, self.num_timesteps, (img.shape[0],), device=img.device)
        level = self.alphas_cumprod[time + 1][:, None, None, None]
        noisy = level.sqrt() * clean + (1 - level).sqrt() * torch.randn_like(clean)
        return F.mse_loss(self.model(noisy, time, cond_img), clean)

    @torch.no_grad()
    def sample(self, cond_img, save_steps=None):
        """Return masks in [0, 1]; with `save_steps`, also the predictions at these times."""
        batch, _, height, width = cond_img.shape
        x = torch.randn(batch, self.mask_channels, height, width, device=cond_img.device)
        saved = {}
        for step in reversed(range(self.num_timesteps)):
            time = torch.full((batch,), step, device=cond_img.device)
            clean = self.model(x, time, cond_img).clamp(-1, 1)
            if step in (save_steps or ()):
                saved[step] = (clean + 1) / 2
            x = clean if step == 0 else self._step_back(x, clean, step)
        mask = (x + 1) / 2
        return mask if save_steps is None else {"final": mask, "steps": saved}

    def _step_back(self, x, clean, step):
        now, before = self.alphas_cumprod[step + 1], self.alphas_cumprod[step]
        alpha = now / before
        mean = (before.sqrt() * (1 - alpha) * clean + alpha.sqrt() * (1 - before) * x) / (1 - now)
        return mean + ((1 - alpha) * (1 - before) / (1 - now)).sqrt() * torch.randn_like(x)


@MODEL_REGISTRY.register("medsegdiff", {"task": "diffusion"})
def create_medsegdiff(image_size=224, dim=64, timesteps=1000, conditioning_fmap_size=None, **_):
    unet = MedSegDiffUNet(
        dim=dim,
        image_size=image_size,
        dim_mult=(1, 2, 4, 8),
        full_self_attn=(False, False, True, True),
        mid_transformer_depth=0,
        conditioning_fmap_size=conditioning_fmap_size,
    )
    return GaussianDiffusionModel(unet, timesteps=timesteps)
