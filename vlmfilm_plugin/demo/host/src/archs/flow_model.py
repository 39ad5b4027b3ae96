"""Flow matching: from Gaussian noise to a mask, along a straight path."""

import lightning.pytorch as L
import torch
import torch.nn.functional as F

from src.archs import components  # noqa: F401
from src.archs.inference import dice_and_iou, random_patch_batch, select_patch_params, sliding_window
from src.registry.base import ARCHS_REGISTRY


class FlowModel(L.LightningModule):
    """Train a backbone to predict the velocity noise -> mask; masks are in [-1, 1] inside."""

    def __init__(
        self,
        arch_name: str = "medsegdiff_flow",
        image_size: int = 32,
        patch_plan: list | None = None,
        timesteps: int = 8,
        sigma: float = 0.0,
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-5,
        experiment_name: str | None = None,
        data_name: str = "angio",
        use_sliding_infer: bool = True,
        model_channels: int = 16,
        channel_mult: list | tuple = (1, 2, 2),
        attn_resolutions: list | tuple = (8,),
    ):
        super().__init__()
        self.save_hyperparameters()
        self.experiment_name = experiment_name or f"{data_name}/{arch_name}"
        self.is_multitask = arch_name == "medsegdiff_flow_multitask"
        self.unet = ARCHS_REGISTRY.get(arch_name)(
            img_resolution=image_size, model_channels=model_channels, channel_mult=channel_mult, attn_resolutions=attn_resolutions
        )

    def training_step(self, batch, batch_idx):
        target = batch["geometry"]
        if self.is_multitask:
            target = torch.cat((batch["label"] * 2 - 1, target), dim=1)
        size, number = select_patch_params(self.hparams.patch_plan)
        noise, target, images = random_patch_batch([torch.randn_like(target), target, batch["image"]], size, number)
        t = torch.rand(target.shape[0], device=target.device)
        along = t[:, None, None, None]
        xt = (1 - along) * noise + along * target
        if self.hparams.sigma > 0:
            xt = xt + self.hparams.sigma * torch.randn_like(xt)
        loss = F.mse_loss(self.unet(xt, t, images), target - noise)
        self.log("train/loss", loss, batch_size=target.shape[0])
        return loss

    def sample(self, noise, images):
        """Integrate the flow from `noise` under `images` with `timesteps` Euler steps."""
        steps = self.hparams.timesteps
        x = noise
        for step in range(steps):
            t = torch.full((x.shape[0],), step / steps, device=x.device)
            x = x + self.unet(x, t, images) / steps
        return x

    def _probability(self, noise, images):
        return ((self.sample(noise, images) + 1) / 2).clamp(0, 1)

    def infer(self, images):
        """Return mask probabilities (B, 1, H, W)."""
        batch, channels, height, width = images.shape
        noise = torch.randn(batch, 2 if self.is_multitask else 1, height, width, device=images.device)
        if self.hparams.use_sliding_infer:
            both = torch.cat((images, noise), dim=1)
            found = sliding_window(both, self.hparams.image_size, lambda part: self._probability(part[:, channels:], part[:, :channels]))
        else:
            found = self._probability(noise, images)
        return found[:, :1]

    def _evaluate(self, batch, stage):
        dice, iou = dice_and_iou(self.infer(batch["image"]), batch["label"])
        scores = {f"{stage}/dice": dice.mean(), f"{stage}/iou": iou.mean()}
        self.log_dict(scores, on_epoch=True, batch_size=dice.shape[0])

    def validation_step(self, batch, batch_idx):
        self._evaluate(batch, "val")

    def test_step(self, batch, batch_idx):
        self._evaluate(batch, "test")

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.learning_rate, weight_decay=self.hparams.weight_decay)
