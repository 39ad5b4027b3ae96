"""Run the demo: plain training, FiLM training, and the ablation on, off, shuffle, all by the host's own scripts.

The scripts are run as a user runs them, as subprocesses with `VLM_FILM_MODE` in the environment; nothing of the host is imported here.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vlmfilm_plugin.demo.dataset import make_dataset
from vlmfilm_plugin.demo.folder import DemoError, one_demo
from vlmfilm_plugin.demo.scripts import HostScripts, Say
from vlmfilm_plugin.settings.yaml_file import loads

HOST = Path(__file__).parent / "host"
ARCH = "medsegdiff_flow"
_BATCH = 8
_EPOCHS = 10
_STEPS = 400
_QUICK_STEPS = 20


@dataclass(frozen=True)
class Score:
    """Dice and IoU of one evaluation on the test split, both in [0, 1]."""

    dice: float
    iou: float


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured and where its files are.

    `scores` has the keys plain, on, off and shuffle; `seconds` has one entry a step; `digest` is that of the host's files,
    equal before and after.
    """

    folder: Path
    scores: Mapping[str, Score]
    seconds: Mapping[str, float]
    digest: str

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        scores = {mode: {"dice": score.dice, "iou": score.iou} for mode, score in self.scores.items()}
        return {"folder": str(self.folder), "scores": scores, "seconds": dict(self.seconds), "host_digest": self.digest, "host_unmodified": True}

    def table(self) -> str:
        """Return the ablation table."""
        rows = [f"{mode:<8} {score.dice:>6.3f} {score.iou:>6.3f}" for mode, score in self.scores.items()]
        return "\n".join([f"{'mode':<8} {'Dice':>6} {'IoU':>6}", *rows])


def run_demo(folder: str | Path, *, seed: int = 0, steps: int | None = None, quick: bool = False, say: Say = print) -> DemoResult:
    """Make a dataset and a copy of the host under `folder`, train plainly and with FiLM, and evaluate.

    Args:
        folder: absent or empty, or that of a demo that was interrupted or failed, which starts over.
        seed: of the dataset, of both trainings and of the evaluations.
        steps: training steps of each run; default: enough to learn the task.
        quick: a smoke run of a few steps whose scores mean nothing.
        say: takes each line of progress.

    Raises:
        DemoError: the folder holds something else or cannot be written, a script failed (with the end of its log), or the host's files changed.
        Interrupted: Ctrl-C; the next demo in the folder starts over.
    """
    with one_demo(folder) as (root, lock):
        return _run(_Run(root, lock, say), seed, steps or (_QUICK_STEPS if quick else _STEPS), quick)


def _run(run: _Run, seed: int, steps: int, quick: bool) -> DemoResult:
    root = run.root
    _prepare(root, seed, steps, quick)
    before = digest(root / "host")
    run.say(f"dataset and host copy: {root}")
    scores: dict[str, Score] = {}
    run.train("plain", None)
    scores["plain"] = run.evaluate("plain", "plain", None)
    run.train("film", "on")
    if not (root / "cache").exists():
        facts = {"found": "no feature was stored", "log": root / "logs" / "train_film.log"}
        raise DemoError("the demo's FiLM training ran without the plugin", facts, "install the package into this Python: pip install vlmfilm-plugin")
    for mode in ("on", "off", "shuffle"):
        scores[mode] = run.evaluate(mode, "film", mode)
    if digest(root / "host") != before:
        raise DemoError("the host's files changed during the demo", {"host": root / "host"}, "report this")
    run.say(f"host unmodified: its files have the digest {before[:16]} before and after")
    return DemoResult(root, scores, run.seconds, before)


def digest(folder: Path) -> str:
    """Return the SHA-256 of all names and contents under `folder`, byte code aside."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            total.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return total.hexdigest()


def copy_host(folder: Path) -> Path:
    """Copy the small host to `folder` and return it."""
    return Path(shutil.copytree(HOST, folder, ignore=shutil.ignore_patterns("__pycache__")))


def _prepare(root: Path, seed: int, steps: int, quick: bool) -> None:
    """Write the dataset, the host copy and one config a training."""
    copy_host(root / "host")
    template: Any = loads((HOST / "configs" / "flow.yaml").read_text(encoding="utf-8"))
    per_epoch = max(1, min(steps, _STEPS) // _EPOCHS)
    epochs = max(1, round(steps / per_epoch))
    test, val = (4, 2) if quick else (40, 8)
    make_dataset(root / "data", train=per_epoch * _BATCH, val=val, test=test, size=template["model"]["image_size"], seed=seed)
    for name in ("plain", "film"):
        template["seed"] = seed
        template["output"] = str(root / "runs" / name)
        template["data"].update(train_bs=_BATCH, **{f"{split}_dir": str(root / "data" / split) for split in ("train", "val", "test")})
        template["trainer"].update(max_epochs=epochs, check_val_every_n_epoch=epochs)
        (root / f"{name}.yaml").write_text(yaml.safe_dump(template, sort_keys=False), encoding="utf-8")


class _Run(HostScripts):
    """Trainings and evaluations by the host's scripts."""

    @property
    def _settings(self) -> Mapping[str, object]:
        return {"encoder": "descriptor", "cache_dir": self.root / "cache"}

    def train(self, name: str, mode: str | None) -> None:
        """Run the host's training with the config `name`."""
        self.run(f"train {name}", mode, ["train.py", "--config", self.root / f"{name}.yaml"], self._settings)

    def evaluate(self, label: str, name: str, mode: str | None) -> Score:
        """Run the host's evaluation on the checkpoint of training `name`."""
        checkpoint, output = self.root / "runs" / name / "checkpoints" / "last.ckpt", self.root / "results" / label
        arguments = ["evaluate.py", "--data", "angio", "--models", ARCH, "--checkpoint", checkpoint, "--output", output]
        self.run(f"evaluate {label}", mode, arguments, self._settings)
        metrics = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
        return Score(metrics["dice"], metrics["iou"])
