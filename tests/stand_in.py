"""A copy of the demo's host with a tiny data set: the stand-in for a host that cannot be installed."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import yaml
from processes import DEMO_HOST, forked, succeed

from vlmfilm_plugin.demo.dataset import make_dataset

SETTINGS = {
    "VLM_FILM_ENCODER": "descriptor",
    "VLM_FILM_COND_DIM": "16",
    "VLM_FILM_TEXT_MLP_HIDDEN_DIM": "16",
    "VLM_FILM_FILM_DEBUG_LINES": "full",
}


class StandIn:
    """A host folder, its data and a place for its output."""

    def __init__(self, root: Path) -> None:
        self.root, self.repo, self.data = root, root / "host", root / "data"
        shutil.copytree(DEMO_HOST, self.repo, ignore=shutil.ignore_patterns("__pycache__"))
        make_dataset(self.data, train=4, val=1, test=3, size=32, seed=0)

    def config(self, name: str, model: dict[str, Any] | None = None, **top: Any) -> Path:
        content = yaml.safe_load((self.repo / "configs" / "flow.yaml").read_text())
        content |= {"seed": 0, "output": str(self.root / "runs" / name), "debug": False, **top}
        content["model"] |= {"timesteps": 2, "model_channels": 8, "channel_mult": [1, 2], "attn_resolutions": [], **(model or {})}
        content["data"] |= {"train_bs": 2, **{f"{split}_dir": str(self.data / split) for split in ("train", "val", "test")}}
        content["trainer"] |= {"max_epochs": 2, "check_val_every_n_epoch": 1, "log_every_n_steps": 1}
        path = self.root / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    def train(self, name: str, mode: str | None, model: dict[str, Any] | None = None, **variables: str) -> str:
        config = self.config(name, model)
        return succeed(forked("scripts/train.py", "--config", config, cwd=self.repo, VLM_FILM_MODE=mode, **self._variables(mode, variables)))

    def evaluate(self, name: str, mode: str | None, arch: str = "medsegdiff_flow", label: str = "", **variables: str) -> str:
        arguments = ["--data", "angio", "--models", arch, "--checkpoint", self.checkpoint(name), "--output", self.output(f"{name}{label}-{mode}")]
        # Nothing but the mode: the checkpoint says the rest.
        return succeed(
            forked("scripts/evaluate.py", *arguments, cwd=self.repo, VLM_FILM_MODE=mode, VLM_FILM_CACHE_DIR=str(self.root / "cache"), **variables)
        )

    def checkpoint(self, name: str) -> Path:
        return self.root / "runs" / name / "checkpoints" / "last.ckpt"

    def output(self, label: str) -> Path:
        return self.root / "results" / label

    def digest(self) -> str:
        files = sorted(path for path in self.repo.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        return hashlib.sha256(b"".join(str(path).encode() + path.read_bytes() for path in files)).hexdigest()

    def _variables(self, mode: str | None, variables: dict[str, str]) -> dict[str, str]:
        return {**SETTINGS, "VLM_FILM_CACHE_DIR": str(self.root / "cache"), **variables} if mode else variables
