"""Diffusion over masks, sampled with an exponential moving average of the weights."""

from copy import deepcopy

import lightning.pytorch as L
import torch

from src.archs import components  # noqa: F401
from src.archs.inference import dice_and_iou, sliding_window
from src.registry.base import MODEL_REGISTRY


class DiffusionModel(L.LightningModule):
    def __init__(
        self,
        arch_name: str = "medsegdiff",
        image_size: int = 32,
        dim: int = 16,
        timesteps: int = 50,
        learning_rate: float = 2e-4,
        weight_decay: float = 1e-5,
        experiment_name: str | None = None,
        data_name: str = "angio",
        use_ema: bool = True,
        ema_decay: float = 0.999,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.experiment_name = experiment_name or f"{data_name}/{arch_name}"
        self.diffusion_model = MODEL_REGISTRY.get(arch_name)(image_size=image_size, dim=dim, timesteps=timesteps)
        self.use_ema = use_ema
        self.ema_decay = ema_decay
        self.ema_model = None
        if use_ema:
            self.ema_model = deepcopy(self.diffusion_model).eval()
            self.ema_model.requires_grad_(False)

    def forward(self, img, cond_img):
        return self.diffusion_model(img, cond_img)

    def training_step(self, batch, batch_idx):
        loss = self(batch["label"], batch["image"])
        self.log("train/loss", loss, batch_size=batch["image"].shape[0])
        return loss

    @torch.no_grad()
    def update_ema(self):
        for mean, current in zip(self.ema_model.parameters(), self.diffusion_model.parameters()):  # noqa: B905
            mean.lerp_(current, 1 - self.ema_decay)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.use_ema:
            self.update_ema()

    def sample(self, cond_img, save_steps=None):
        model = self.diffusion_model if self.ema_model is None else self.ema_model
        return model.sample(cond_img, save_steps)

    def _evaluate(self, batch, stage):
        dice, iou = dice_and_iou(sliding_window(batch["image"], self.hparams.image_size, self.sample), batch["label"])
        self.log_dict({f"{stage}/dice": dice.mean(), f"{stage}/iou": iou.mean()}, on_epoch=True, batch_size=dice.shape[0])

    def validation_step(self, batch, batch_idx):
        self._evaluate(batch, "val")

    def test_step(self, batch, batch_idx):
        self._evaluate(batch, "test")

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.learning_rate, weight_decay=self.hparams.weight_decay)
