"""The log lines of a FiLM run, from statistics taken on logged steps only.

`[FILM-DBG]` one line a stage on logged steps, `[FILM-VAL]` means at the end of a validation, `[FILM-WARN]` when gamma and beta stay
constant, `[FILM-SHUFFLE]` once an epoch, `[VLM] cache_stats`. Reading a statistic synchronises the device: nothing here runs else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vlmfilm_plugin.features.provider import CacheStats
from vlmfilm_plugin.features.shuffle import permutation_hash
from vlmfilm_plugin.film.statistics import statistics
from vlmfilm_plugin.log import film_logger
from vlmfilm_plugin.settings.record import Settings

CONSTANT_STD = 1e-6

CONSTANT_INTERVALS = 5


@dataclass
class StepFacts:
    """What is known of a logged step before any block runs; blocks add their statistics to it."""

    phase: str
    step: int | None
    epoch: int | None
    batch_idx: int | None
    samples: int
    mode: str
    apply_point: str
    cond_source: str
    keys: Sequence[str] = ()
    cache: CacheStats = field(default_factory=CacheStats)
    has_mixed_keys: bool = False
    permutation: Sequence[int] | None = None
    response: Mapping[str, Any] | None = None

    def head(self) -> dict[str, Any]:
        """Return the fields that are the same for every stage."""
        key = self.keys[0] if self.keys else None
        return {
            "stage": self.phase,
            "step": self.step,
            "epoch": self.epoch,
            "batch_idx": self.batch_idx,
            "B": self.samples,
            "split_key": key.split(":", 1)[0] if key else None,
            "cache_key_example": key,
            "cond_source": self.cond_source,
            "film_mode": self.mode,
            "film_bypass": self.mode == "off",
            "film_apply_point": self.apply_point,
            **({} if self.response is None else {"vlm_response_debug": self.response}),
        }

    def tail(self) -> dict[str, Any]:
        """Return the fields of cache and shuffling."""
        return {
            "cache_total": self.cache.total,
            "cache_hit": self.cache.hit,
            "cache_miss": self.cache.miss,
            "hit_rate": round(self.cache.hit_rate, 4),
            "mem_hit": self.cache.mem_hit,
            "disk_hit": self.cache.disk_hit,
            "mixed_keys": self.has_mixed_keys,
            "shuffle_perm_hash": None if self.permutation is None else permutation_hash(self.permutation),
        }


class Diagnostics:
    """Decide which steps are logged, and write the lines."""

    def __init__(self, settings: Settings) -> None:
        self._is_enabled = settings.film_debug_enabled
        self._responses_every = settings.vlm_response_debug_every_n_steps if settings.vlm_response_debug_enabled else None
        self._every = {"train": settings.film_log_every_n_steps_train}
        self._every_other = settings.film_log_every_n_steps_val
        self._stats_every = settings.vlm_cache_stats_every_n_steps if settings.vlm_cache_stats_enabled else None
        self._logged_step: int | None = None
        self._shuffled: tuple[str, int | None] | None = None
        self._stats_step: int | None = None
        self._constant: dict[int, int] = {}
        self._validation: list[dict[str, Any]] = []

    def is_logged(self, phase: str, step: int | None, batch_idx: int | None) -> bool:
        """Tell whether this step is logged; with gradient accumulation, the first batch of a step alone."""
        count = step if phase == "train" else batch_idx
        if not self._is_enabled or count is None or count % self._every.get(phase, self._every_other):
            return False
        if phase == "train":
            is_repeated, self._logged_step = step == self._logged_step, step
            return not is_repeated
        return True

    def response(self, facts: StepFacts, note: str | None) -> Mapping[str, Any] | None:
        """Return what the model answered about the first image of a batch, where `vlm_response_debug_enabled` asks for it at this step."""
        if self._responses_every is None or note is None or (facts.phase == "train" and (facts.step or 0) % self._responses_every):
            return None
        return {"image_id": facts.keys[0], "prompt_idx": 0, "source": "generated" if facts.cache.miss else "cache", **_first_answer(note)}

    def enter_phase(self, phase: str) -> None:
        """Note the phase of a step that begins: the first training step after a validation reports that validation."""
        if phase == "train":
            self.report_validation()

    def report_validation(self) -> None:
        """Write `[FILM-VAL]`: means of the validation's logged statistics; nothing where there are none."""
        rows, self._validation = self._validation, []
        if not rows:
            return
        numbers = [name for name, value in rows[0].items() if isinstance(value, float)]
        means = {name: _mean([row[name] for row in rows if row[name] is not None]) for name in numbers}
        same = {name: rows[-1][name] for name in ("stage", "step", "epoch", "film_mode", "film_apply_point")}
        film_logger().info("[FILM-VAL] %s", _json({**same, "logged_steps": len({row["batch_idx"] for row in rows}), **means}))

    def shuffled(self, phase: str, epoch: int | None, permutation: Sequence[int], note: str = "") -> None:
        """Write `[FILM-SHUFFLE]` once an epoch and phase."""
        if self._shuffled != (phase, epoch):
            self._shuffled = (phase, epoch)
            film_logger().info("[FILM-SHUFFLE] perm_first10=%s%s", list(permutation[:10]), note)

    def cache_stats(self, step: int | None, stats: CacheStats) -> None:
        """Write `[VLM] cache_stats` every so many steps, where it is enabled."""
        if self._stats_every and step is not None and step % self._stats_every == 0 and step != self._stats_step:
            self._stats_step = step
            film_logger().info("[VLM] cache_stats: %s", stats)

    def add(self, facts: StepFacts, stage: int, numbers: dict[str, Any]) -> None:
        """Write `[FILM-DBG]` for one stage of a logged step, and keep count for the other lines."""
        row = {**facts.head(), "film_stage_idx": stage, **numbers, **facts.tail()}
        film_logger().info("[FILM-DBG] %s", _json(row))
        if facts.phase == "val":
            self._validation.append(row)
        elif facts.phase == "train" and facts.mode != "off":
            self._watch(stage, numbers, facts)

    def _watch(self, stage: int, numbers: dict[str, Any], facts: StepFacts) -> None:
        is_constant = numbers["gamma_std"] < CONSTANT_STD and numbers["beta_std"] < CONSTANT_STD
        self._constant[stage] = self._constant.get(stage, 0) + 1 if is_constant else 0
        if self._constant[stage] == CONSTANT_INTERVALS:
            film_logger().warning(
                "[FILM-WARN] decoder stage %d: gamma and beta have been constant (std < %g) for %d logged intervals, "
                "up to step %s: FiLM does nothing there",
                stage,
                CONSTANT_STD,
                CONSTANT_INTERVALS,
                facts.step,
            )


class StageRecorder:
    """Takes the statistics of each block once, for one UNet forward of a logged step."""

    def __init__(self, diagnostics: Diagnostics, facts: StepFacts) -> None:
        self._diagnostics, self._facts = diagnostics, facts
        self._seen: set[int] = set()

    def record(self, stage: int, before: Tensor, after: Tensor, gamma: Tensor, beta: Tensor, cond_vec: Tensor | None) -> None:
        """Compute and write the statistics of one block (shapes: `conditioning.Recorder`)."""
        if stage in self._seen:
            return
        self._seen.add(stage)
        with torch.no_grad():
            numbers = statistics(before, after, gamma, beta, cond_vec)
        self._diagnostics.add(self._facts, stage, numbers)


def _first_answer(note: str) -> dict[str, Any]:
    """Return the answer to the first prompt, and the best candidates of its values where it has any; a note is a text, or JSON of several."""
    try:
        content = json.loads(note)
    except ValueError:
        return {"response": note}
    if isinstance(content, dict) and "answers" in content:
        return {"response": content["answers"][0], "fields": content["fields"][0]}
    return {"response": content[0] if isinstance(content, list) and content else note}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _json(row: dict[str, Any]) -> str:
    return json.dumps({name: _number(value) if isinstance(value, float) else value for name, value in row.items()})


def _number(value: float) -> float | str:
    # JSON has no NaN and no infinity; a diverged run must stay readable.
    return round(value, 8) if math.isfinite(value) else str(value)
