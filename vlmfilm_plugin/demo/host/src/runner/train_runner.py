"""Training from a config."""

from pathlib import Path

import lightning as L
import yaml
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, StochasticWeightAveraging

from src.runner.factory import create_datamodule, known_arguments, model_class


class EpochPrinter(Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        scores = {name: float(value) for name, value in trainer.callback_metrics.items()}
        text = "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
        print(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  {text}", flush=True)


class TrainRunner:
    """Run the config's `model:` on its `data:` with its `trainer:`."""

    def __init__(self, config):
        self.config = config
        self.model_cfg = config["model"]
        self.data_cfg = config["data"]
        self.trainer_cfg = config.get("trainer") or {}
        self.debug = bool(config.get("debug", False))
        self.output = Path(config.get("output", "runs/default"))

    def run(self):
        if self.config.get("seed") is not None:
            L.seed_everything(int(self.config["seed"]), workers=True)
        self.output.mkdir(parents=True, exist_ok=True)
        (self.output / "config.yaml").write_text(yaml.safe_dump(self.config, sort_keys=False), encoding="utf-8")
        datamodule = create_datamodule(self.data_cfg["name"], self.data_cfg)
        model = self._create_model()
        trainer = self._create_trainer(self._create_callbacks())
        trainer.fit(model, datamodule)
        print(f"checkpoints: {self.output / 'checkpoints'}", flush=True)

    def _create_model(self):
        cls = model_class(self.model_cfg["arch_name"])
        return cls(**known_arguments(cls, self.model_cfg))

    def _create_callbacks(self):
        checkpoints = ModelCheckpoint(self.output / "checkpoints", filename="best", monitor="val/dice", mode="max", save_last=True, enable_version_counter=False)
        callbacks = [checkpoints, EpochPrinter()]
        if not self.debug:
            callbacks.append(StochasticWeightAveraging(swa_lrs=self.model_cfg.get("learning_rate", 1e-3) / 10))
        return callbacks

    def _create_trainer(self, callbacks):
        cfg = self.trainer_cfg
        return L.Trainer(
            max_epochs=cfg.get("max_epochs", 10),
            accelerator=cfg.get("accelerator", "cpu"),
            devices=cfg.get("devices", 1),
            precision=cfg.get("precision", "32-true"),
            check_val_every_n_epoch=cfg.get("check_val_every_n_epoch", 1),
            gradient_clip_val=cfg.get("gradient_clip_val"),
            accumulate_grad_batches=cfg.get("accumulate_grad_batches", 1),
            limit_train_batches=cfg.get("limit_train_batches", 1.0),
            limit_val_batches=cfg.get("limit_val_batches", 1.0),
            num_sanity_val_steps=cfg.get("num_sanity_val_steps", 2),
            log_every_n_steps=cfg.get("log_every_n_steps", 50),
            callbacks=callbacks,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
