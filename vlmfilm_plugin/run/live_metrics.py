"""FiLM's statistics of logged steps, where a run's other numbers are: its own Lightning loggers, as `film/...`, and `film_stats.jsonl` in its folder.

`film_stats.jsonl` holds one JSON object a line, appended: one for each logged training step, one for the means of each validation. A run that is
resumed repeats steps: the last line of a step holds. Rank zero writes. Fields, null where there is none:

- `phase`: `train` or `val`; `step`, `epoch`: those of the host, of a validation its last logged batch's.
- `film`: 0, or for further UNets with FiLM 1, 2, ... in the order in which they were first logged.
- `film_mode`: `on`, `off` or `shuffle`; `feature_control`: `none`, or the control that the run was trained with.
- `cond_cos`: mean cosine of the pairs of condition vectors of a batch.
- `stored`: share of the batch's features that were not encoded for it, in [0, 1].
- `grad_norm`: norm of the gradients of all heads together as the update used them; null in validation, and where no update came.
- `stages`: by decoder stage, `"0"`, or block of a stage that has several, `"0.1"`: `gamma_dev` (mean of |gamma - 1|), `beta_norm` (mean over rows of
  the norm over channels), `rel_delta` (mean over rows of |y - x| / |x|), and where the alarm has read them `gamma_between_images`,
  `beta_between_images`, `gamma_at_bound`, `beta_at_bound`.

Loggers get the same numbers as `film/cond_cos`, `film/stored`, `film/grad_norm`, `film/stage0/gamma_dev`, ..., in validation `film/val/...`, and of
a further UNet `film1/...`.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakSet, ref

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from vlmfilm_plugin.errors import StoreError
from vlmfilm_plugin.film.module import FilmModule
from vlmfilm_plugin.log import film_logger, is_rank_zero
from vlmfilm_plugin.run.log_fields import StepFacts, as_json
from vlmfilm_plugin.settings.record import Settings

FILE = "film_stats.jsonl"
_OF_STAGE = {"gamma_dev_mean": "gamma_dev", "beta_norm_mean": "beta_norm", "rel_delta_mean": "rel_delta"}
_OF_ALARM = ("gamma_between_images", "beta_between_images", "gamma_at_bound", "beta_at_bound")


# Of one process: each writes at its end what still waits.
_living: WeakSet[LiveMetrics] = WeakSet()


@atexit.register
def _flush_all() -> None:
    for metrics in list(_living):
        metrics.flush()


class LiveMetrics:
    """Writes the rows of a run; a training step's after the update that follows it, since only then its gradients are there."""

    def __init__(self, settings: Settings) -> None:
        self._folder = settings.film_stats_dir
        self._numbers: dict[str, int] = {}
        self._waiting: dict[str, tuple[dict[str, Any], Any]] = {}
        self._hooks: dict[str, Any] = {}
        self._said: set[str] = set()
        self._refusing: set[int] = set()
        _living.add(self)

    def step(self, facts: StepFacts, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take the `[FILM-DBG]` rows of a logged training step, one a block; write them once their gradients are known."""
        self.flush(facts.film_id)
        self._waiting[facts.film_id] = self.row(facts.film_id, rows), facts.trainer
        film: FilmModule = facts.film
        heads = [parameter for parameter in film.heads.parameters() if parameter.requires_grad]
        if not heads:
            self.flush(facts.film_id)
            return
        film_ref, own = ref(film), {id(parameter) for parameter in heads}

        def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            # It stays until the next logged step: torch is going through its hooks, and would not have one taken out meanwhile.
            if facts.film_id not in self._waiting or torch.compiler.is_compiling():
                return
            held = film_ref()
            if held is not None:
                if not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
                    return
                self._waiting[facts.film_id][0]["grad_norm"] = _grad_norm(held)
            self._write(*self._waiting.pop(facts.film_id))

        self._hooks[facts.film_id] = register_optimizer_step_post_hook(after)

    def validation(self, film_id: str, rows: Sequence[Mapping[str, Any]], trainer: Any) -> None:
        """Write the means of a validation's logged rows."""
        self._write(self.row(film_id, rows), trainer)

    def flush(self, film_id: str | None = None) -> None:
        """Write what waits for its gradients, as it is."""
        for name in list(self._waiting) if film_id is None else [film_id]:
            hook = self._hooks.pop(name, None)
            if hook is not None:
                hook.remove()
            if name in self._waiting:
                self._write(*self._waiting.pop(name))

    def row(self, film_id: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the row of `[FILM-DBG]` rows, as it stands in the file; where there are several of a block, their means."""
        last, by_stage = rows[-1], dict[str, list[Mapping[str, Any]]]()
        for row in rows:
            block = row.get("film_block_idx")
            by_stage.setdefault(str(row["film_stage_idx"]) if block is None else f"{row['film_stage_idx']}.{block}", []).append(row)
        return {
            "phase": last["stage"],
            "step": last["step"],
            "epoch": last.get("epoch"),
            "film": self._numbers.setdefault(film_id, len(self._numbers)),
            "film_mode": last["film_mode"],
            "feature_control": last.get("feature_control", "none"),
            "cond_cos": _mean(rows, "cond_cos_mean"),
            "stored": _mean(rows, "hit_rate") if last["cache_total"] else None,
            "grad_norm": None,
            "stages": {label: _stage(own) for label, own in by_stage.items()},
        }

    def _write(self, row: dict[str, Any], trainer: Any) -> None:
        if not is_rank_zero():
            return
        loggers = list(getattr(trainer, "loggers", None) or ())
        # Before the file: a CSV logger looks at what is in its folder when it is first used.
        for logger in loggers:
            self._log(logger, row)
        folder = self._folder or folder_of(trainer, loggers)
        if folder is None:
            self._say(f"no folder of this run is known: set `film_stats_dir` to have {FILE}")
            return
        path = Path(folder) / FILE
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "ab", buffering=0) as file:
                file.write((as_json(row) + "\n").encode())
        except OSError as error:
            facts = {"file": path, "system said": error.strerror or str(error), "expected": "a folder that can be written"}
            raise StoreError("cannot write the statistics of FiLM", facts, "set `film_stats_dir`, or `film_debug_enabled: false`") from error

    def _log(self, logger: Any, row: Mapping[str, Any]) -> None:
        if id(logger) in self._refusing:
            return
        try:
            logger.log_metrics(scalars_of(row), step=row["step"])
        except Exception as error:  # someone's own logger: no reason to end their training, and not to be kept quiet
            self._refusing.add(id(logger))
            self._say(f"WARNING: {type(logger).__name__} takes no numbers of FiLM: {type(error).__name__}: {error}")

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            film_logger().info("[VLM] live metrics: %s", text)


def scalars_of(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a row by the names that loggers show."""
    prefix = "film" if row["film"] == 0 else f"film{row['film']}"
    prefix += "/val" if row["phase"] == "val" else ""
    plain = {f"{prefix}/{name}": row[name] for name in ("cond_cos", "stored", "grad_norm")}
    staged = {f"{prefix}/stage{label}/{name}": value for label, values in row["stages"].items() for name, value in values.items()}
    return {name: value for name, value in (plain | staged).items() if value is not None}


def folder_of(trainer: Any, loggers: Sequence[Any]) -> str | None:
    """Return the folder of a Lightning run: that of its first logger which has one, else of its checkpoints; None where neither is known.

    The trainer's own `log_dir` is not asked: all processes must ask it together.
    """
    found = [getattr(logger, name, None) for logger in loggers for name in ("log_dir", "save_dir")]
    found += [getattr(callback, "dirpath", None) for callback in getattr(trainer, "checkpoint_callbacks", None) or ()]
    return next((os.fspath(folder) for folder in found if folder), None)


def _stage(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    found = {name: _mean(rows, field) for field, name in _OF_STAGE.items()}
    return found | {name: _mean(rows, name) for name in _OF_ALARM if name in rows[-1]}


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = [float(row[name]) for row in rows if row.get(name) is not None]
    return sum(values) / len(values) if values else None


@torch.no_grad()
def _grad_norm(film: FilmModule) -> float | None:
    """Return the norm of what this process holds of the heads' gradients; reads the device."""
    grads: list[Any] = [parameter.grad for parameter in film.heads.parameters() if parameter.grad is not None]
    held = [(grad.to_local() if hasattr(grad, "to_local") else grad).float().square().sum() for grad in grads]
    return float(torch.stack(held).sum().sqrt()) if held else None


def short_line(row: Mapping[str, Any]) -> str:
    """Return what a logged step says in one line for people."""
    parts = [
        f"{label}: gamma {values['gamma_dev']:.3g} beta {values['beta_norm']:.3g} change {100 * (values['rel_delta'] or 0):.2g} %"
        for label, values in row["stages"].items()
        if values["gamma_dev"] is not None
    ]
    control = "" if row["feature_control"] == "none" else f" feature_control={row['feature_control']}"
    cosine = "" if row["cond_cos"] is None else f" cosine {row['cond_cos']:.3f}"
    stored = "" if row["stored"] is None else f" stored {100 * row['stored']:.0f} %"
    return f"{row['phase']} step {row['step']} {row['film_mode']}{control}{cosine}{stored} | {' | '.join(parts)}"
