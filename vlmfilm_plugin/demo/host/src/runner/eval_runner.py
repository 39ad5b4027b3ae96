"""Evaluation of a checkpoint on the test split."""

import json
from pathlib import Path

import lightning as L
import torch
import yaml

from src.runner.factory import create_datamodule, model_class


class EvalRunner:
    """Score checkpoints on dataset `dataset` and write `metrics.json` into `output_dir`."""

    def __init__(self, dataset, output_dir="results", config_path=None):
        self.dataset = dataset
        self.output_dir = Path(output_dir)
        self.config_path = config_path

    def _config(self, checkpoint_path):
        path = Path(self.config_path) if self.config_path else checkpoint_path.parent.parent / "config.yaml"
        return (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.exists() else {}

    def evaluate_model(self, model_name, checkpoint_path):
        checkpoint_path = Path(checkpoint_path)
        model = model_class(model_name).load_from_checkpoint(
            str(checkpoint_path), map_location=torch.device("cpu"), weights_only=False, strict=True
        )
        config = self._config(checkpoint_path)
        if config.get("seed") is not None:
            L.seed_everything(int(config["seed"]), workers=True)
        trainer = L.Trainer(
            accelerator=(config.get("trainer") or {}).get("accelerator", "cpu"),
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        results = trainer.test(model, create_datamodule(self.dataset, config.get("data")))
        metrics = {name.removeprefix("test/"): value for name, value in results[0].items()}
        self.output_dir.mkdir(parents=True, exist_ok=True)
        (self.output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2), encoding="utf-8")
        return metrics
