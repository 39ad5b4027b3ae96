"""The log lines of FiLM, from statistics taken on logged steps only: those of a run, and those of a model that calls FiLM by hand.

`[FILM-DBG]` on logged steps: one short line, or in full the port's JSON, one line a block (`film_debug_lines`); the same numbers go on by
`live_metrics`. `[FILM-VAL]` means at the end of a validation, `[FILM-WARN]` when gamma and beta stay constant (the port's; that of a condition
which reaches nothing is in `film/alarm.py`), `[FILM-SHUFFLE]` once an epoch, `[VLM] cache_stats`.
Reading a statistic synchronises the device: nothing here runs else.
"""

from __future__ import annotations

import atexit
import functools
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from vlmfilm_plugin.features.samples import CacheStats
from vlmfilm_plugin.film.alarm import ConditionAlarm
from vlmfilm_plugin.film.architecture import Stage
from vlmfilm_plugin.film.module import MARKER
from vlmfilm_plugin.film.statistics import statistics
from vlmfilm_plugin.film.verdict import StageVerdict
from vlmfilm_plugin.log import film_logger, is_rank_zero
from vlmfilm_plugin.run.live_metrics import LiveMetrics, short_line
from vlmfilm_plugin.run.log_fields import StepFacts, as_json, first_answer, line_of
from vlmfilm_plugin.settings.mode import MODE_VARIABLE
from vlmfilm_plugin.settings.record import Settings

CONSTANT_STD = 1e-6

CONSTANT_INTERVALS = 5


def write_cache_key(key: str, source: str) -> None:
    """Write how the images of a batch are named, `[VLM] cache_key_...`: the first one's key, and what gave it."""
    film_logger().info("[VLM] cache_key_example: %s", key)
    film_logger().info("[VLM] cache_key_source: %s", source)


@functools.cache
def write_how_to_load_at_exit() -> None:
    """Let the last line of a run that trains say how its checkpoints are loaded; asked for again, it is still one line."""
    # What is registered first comes last.
    atexit.register(_write_how_to_load)


def _write_how_to_load() -> None:
    film_logger().info(
        "[VLM] checkpoints of this run hold FiLM: load them with %s=off (the host's own output), on or shuffle; "
        "a plain process reports unexpected keys (%s)",
        MODE_VARIABLE,
        MARKER.strip("."),
    )


class ModelLines:
    """The lines of one model: writes them, and remembers what the next ones need."""

    def __init__(self) -> None:
        self._constant: Counter[tuple[str, int, int | None]] = Counter()
        self._validation: list[dict[str, Any]] = []
        self._shuffled: Hashable = self

    def debug(self, row: dict[str, Any], *, is_validation: bool, is_watched: bool, is_full: bool = True) -> None:
        """Write `[FILM-DBG]` for one block where lines are full, keep it for `[FILM-VAL]` in a validation, and count for `[FILM-WARN]`."""
        if is_full:
            film_logger().info("[FILM-DBG] %s", as_json(row))
        if is_validation:
            self._validation.append(row)
        if is_watched:
            self._watch(row)

    def report_validation(self, calls: int = 0) -> list[dict[str, Any]]:
        """Write `[FILM-VAL]`: means of the validation's logged statistics, which are returned; nothing where there are none and no calls either.

        Args:
            calls: how often FiLM was applied in the validation, logged or not, where that is counted.
        """
        rows, self._validation = self._validation, []
        if not rows:
            if calls:
                film_logger().info("[FILM-VAL] %s", as_json({"stage": "val", "logged_steps": 0}))
            return rows
        # A value may not exist in one row and exist in the next: a batch of one has no cosines.
        numbers = [name for name in rows[0] if any(isinstance(row.get(name), float) for row in rows)]
        means = {name: _mean([row[name] for row in rows if isinstance(row.get(name), float)]) for name in numbers}
        same = {name: rows[-1].get(name) for name in ("stage", "step", "epoch", "film_mode", "film_apply_point")}
        same |= {name: rows[-1][name] for name in ("feature_control",) if name in rows[-1]}
        steps = max(Counter((row["film_stage_idx"], row.get("film_block_idx")) for row in rows).values())
        film_logger().info("[FILM-VAL] %s", as_json({**same, "logged_steps": steps, **means}))
        return rows

    def shuffled(self, epoch: Hashable, permutation: Sequence[int], note: str = "") -> None:
        """Write `[FILM-SHUFFLE]`, once an epoch."""
        if self._shuffled != epoch:
            self._shuffled = epoch
            film_logger().info("[FILM-SHUFFLE] perm_first10=%s%s", list(permutation[:10]), note)

    def _watch(self, row: Mapping[str, Any]) -> None:
        place = (row["stage"], row["film_stage_idx"], row.get("film_block_idx"))
        self._constant[place] = self._constant[place] + 1 if row["gamma_std"] < CONSTANT_STD and row["beta_std"] < CONSTANT_STD else 0
        if self._constant[place] == CONSTANT_INTERVALS:
            film_logger().warning(
                "[FILM-WARN] decoder stage %s: gamma and beta have been constant (std < %g) for %d logged intervals, "
                "up to step %s: FiLM does nothing there",
                row["film_stage_idx"] if place[2] is None else f"{place[1]}.{place[2]}",
                CONSTANT_STD,
                CONSTANT_INTERVALS,
                row["step"],
            )


class Diagnostics:
    """Decide which steps are logged, and write the lines."""

    def __init__(self, settings: Settings) -> None:
        self._is_enabled = settings.film_debug_enabled
        self._responses_every = settings.vlm_response_debug_every_n_steps if settings.vlm_response_debug_enabled else None
        self._every = {"train": settings.film_log_every_n_steps_train}
        self._every_other = settings.film_log_every_n_steps_val
        self._stats_every = settings.vlm_cache_stats_every_n_steps if settings.vlm_cache_stats_enabled else None
        self._logged_step: int | None = None
        self._stats_step: int | None = None
        self._warned_of_tensors: set[str] = set()
        # By `film_id`: a UNet and its copies.
        self._lines: defaultdict[str, ModelLines] = defaultdict(ModelLines)
        self._alarms: dict[str, ConditionAlarm] = {}
        # A short line has no room for what a model answered.
        is_asked = settings.film_debug_lines == "short" and self._responses_every is not None
        self._debug_lines, self.metrics = "full" if is_asked else settings.film_debug_lines, LiveMetrics(settings)
        self._trainer: ReferenceType[Any] | None = None

    def is_logged(self, phase: str, step: int | None, batch_idx: int | None) -> bool:
        """Tell whether this step is logged, on rank zero; with gradient accumulation, the first batch of a step alone."""
        count = step if phase == "train" else batch_idx
        if not (self._is_enabled and is_rank_zero()) or count is None or count % self._every.get(phase, self._every_other):
            return False
        if phase == "train":
            is_repeated, self._logged_step = step == self._logged_step, step
            return not is_repeated
        return True

    def response(self, facts: StepFacts, note: str | None) -> Mapping[str, Any] | None:
        """Return what the model answered about the first image of a batch, where `vlm_response_debug_enabled` asks for it at this step."""
        if self._responses_every is None or note is None or (facts.phase == "train" and (facts.step or 0) % self._responses_every):
            return None
        return {"image_id": facts.keys[0], "prompt_idx": 0, "source": "generated" if facts.cache.miss else "cache", **first_answer(note)}

    def alarm(self, film_id: str, settings: Settings) -> ConditionAlarm:
        """Return what watches the condition of a UNet and its copies."""
        if film_id not in self._alarms:
            self._alarms[film_id] = ConditionAlarm.of(settings)
        return self._alarms[film_id]

    def enter_phase(self, phase: str) -> None:
        """Note the phase of a step that begins: the first step of another phase after a validation reports that validation."""
        if phase != "val":
            self.report_validation()

    def report_validation(self) -> None:
        """Write `[FILM-VAL]`, one line a model that was validated."""
        trainer = None if self._trainer is None else self._trainer()
        for film_id, lines in self._lines.items():
            if rows := lines.report_validation():
                self.metrics.validation(film_id, rows, trainer)

    def shuffled(self, phase: str, epoch: int | None, permutation: Sequence[int], note: str = "") -> None:
        """Write `[FILM-SHUFFLE]` once an epoch and phase."""
        self._lines[""].shuffled((phase, epoch), permutation, note)

    def warn_of_tensors(self, phase: str) -> None:
        """Say once a phase that images are encoded as the host passes them, since no file was found for them."""
        if phase in self._warned_of_tensors:
            return
        self._warned_of_tensors.add(phase)
        cost = "each crop is encoded anew" if phase == "train" else "where training read files, these features are not of the same kind"
        film_logger().warning(
            "[VLM] WARNING: no source file was found for %s images: they are encoded as the host passes them, augmented, cropped or normalised, "
            "and %s (give `dataset_root`, or file paths in the batch)",
            phase,
            cost,
        )

    def cache_stats(self, step: int | None, stats: CacheStats) -> None:
        """Write `[VLM] cache_stats` every so many steps, where it is enabled."""
        if self._stats_every and step is not None and step % self._stats_every == 0 and step != self._stats_step:
            self._stats_step = step
            film_logger().info("[VLM] cache_stats: %s", stats)

    def add(self, facts: StepFacts, stage: Stage, numbers: dict[str, Any]) -> dict[str, Any]:
        """Take the statistics of one block of a logged step, and return its row; where lines are full, write it."""
        block = {} if stage.block is None else {"film_block_idx": stage.block}
        row = line_of(facts.fields(), {"film_stage_idx": stage.index, **block}, numbers)
        is_watched = facts.phase == "train" and facts.mode != "off"
        self._lines[facts.film_id].debug(row, is_validation=facts.phase == "val", is_watched=is_watched, is_full=self._debug_lines == "full")
        return row

    def finish(self, facts: StepFacts, rows: Sequence[dict[str, Any]]) -> None:
        """Take the rows of all blocks of a logged step: the short line, and the live metrics of a training step."""
        if self._debug_lines == "short":
            film_logger().info("[FILM-DBG] %s", short_line(self.metrics.row(facts.film_id, rows)))
        if facts.phase == "val":
            self._trainer = None if facts.trainer is None else ref(facts.trainer)
        if facts.phase == "train":
            self.metrics.step(facts, rows)


class StageRecorder:
    """Takes the statistics of each block once, for one UNet forward of a logged step."""

    def __init__(self, diagnostics: Diagnostics, facts: StepFacts, verdicts: Mapping[int | str, StageVerdict]) -> None:
        self._diagnostics, self._facts, self._verdicts = diagnostics, facts, verdicts
        self._rows: dict[int | str, dict[str, Any]] = {}

    def record(self, stage: Stage, before: Tensor, after: Tensor, gamma: Tensor, beta: Tensor, cond_vec: Tensor | None) -> None:
        """Compute and write the statistics of one block (shapes: `conditioning.Recorder`)."""
        if stage.key in self._rows:
            return
        with torch.no_grad():
            numbers = statistics(before, after, gamma, beta, cond_vec)
        if stage.key in self._verdicts:
            numbers |= self._verdicts[stage.key].fields()
        self._rows[stage.key] = self._diagnostics.add(self._facts, stage, numbers)
        if self._facts.film is not None and len(self._rows) == len(self._facts.film.architecture.stages):
            self._diagnostics.finish(self._facts, list(self._rows.values()))


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
