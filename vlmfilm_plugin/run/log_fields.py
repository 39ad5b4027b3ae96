"""What the log lines of FiLM hold: the fields of a line and their order, and how they are written."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmfilm_plugin.features.cache_key import split_in
from vlmfilm_plugin.features.samples import CacheStats
from vlmfilm_plugin.features.shuffle import permutation_hash

# What every `[FILM-DBG]` line holds, in this order; None where it does not exist.
FIELDS = (
    *("stage", "step", "B", "split_key", "cache_key_example", "cond_source", "cond_dim", "cond_norm_mean", "cond_norm_std"),
    *("cond_cos_mean", "cond_cos_min", "cond_cos_max", "film_mode", "film_bypass", "gamma_mean", "gamma_std", "gamma_dev_mean", "gamma_dev_std"),
    *("beta_mean", "beta_std", "beta_norm_mean", "beta_norm_std", "x_pre_norm_mean", "x_post_norm_mean", "mean_abs_diff", "max_abs_diff"),
    *("rel_delta_mean", "rel_delta_p50", "rel_delta_p95", "cache_total", "cache_hit", "cache_miss", "hit_rate", "mem_hit", "disk_hit"),
    *("mixed_keys", "shuffle_perm_hash", "film_apply_point", "film_stage_idx"),
)


def line_of(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a `[FILM-DBG]` line in their order, then any others; of several values the last that is not None."""
    row: dict[str, Any] = dict.fromkeys(FIELDS)
    for part in parts:
        row.update({name: value for name, value in part.items() if value is not None or name not in row})
    return row


def key_fields(keys: Sequence[str]) -> dict[str, Any]:
    """Return the fields that name the images of a batch by their keys: `split:name`."""
    splits = {split_in(key) for key in keys}
    return {"split_key": split_in(keys[0]) if keys else None, "cache_key_example": keys[0] if keys else None, "mixed_keys": len(splits) > 1}


def cache_fields(stats: CacheStats) -> dict[str, Any]:
    """Return the fields of the cache."""
    return {
        "cache_total": stats.total,
        "cache_hit": stats.hit,
        "cache_miss": stats.miss,
        "hit_rate": round(stats.hit_rate, 4),
        "mem_hit": stats.mem_hit,
        "disk_hit": stats.disk_hit,
    }


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
    film_id: str = ""
    response: Mapping[str, Any] | None = None
    control: str = "none"
    # The FiLM module, and the trainer of the host's step where it has one.
    film: Any = None
    trainer: Any = None

    def fields(self) -> dict[str, Any]:
        """Return the fields that are the same for every stage."""
        named = key_fields(self.keys)
        return {
            "stage": self.phase,
            "step": self.step,
            "epoch": self.epoch,
            "batch_idx": self.batch_idx,
            "B": self.samples,
            **named,
            "mixed_keys": self.has_mixed_keys or named["mixed_keys"],
            "cond_source": COND_SOURCES.get(self.cond_source, self.cond_source),
            "film_mode": self.mode,
            "film_bypass": self.mode == "off",
            "film_apply_point": self.apply_point,
            # Such a run never passes for FiLM.
            **({} if self.control == "none" else {"feature_control": self.control}),
            **cache_fields(self.cache),
            **({} if self.response is None else {"vlm_response_debug": self.response}),
            "shuffle_perm_hash": None if self.permutation is None else permutation_hash(self.permutation),
        }


# What a condition is made from, in the words of the soft-seg port.
COND_SOURCES = {"image": "image_global", "text": "text_prompt"}


def first_answer(note: str) -> dict[str, Any]:
    """Return the answer to the first prompt, and the best candidates of its values where it has any; a note is a text, or JSON of several."""
    try:
        content = json.loads(note)
    except ValueError:
        return {"response": note}
    if isinstance(content, dict) and "answers" in content:
        return {"response": content["answers"][0], "fields": content["fields"][0]}
    return {"response": content[0] if isinstance(content, list) and content else note}


def as_json(row: Mapping[str, Any]) -> str:
    """Return the fields of a line as JSON, in which NaN and infinity are texts."""
    return json.dumps(_plain(row), default=str)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    # JSON has no NaN and no infinity; a diverged run must stay readable.
    if isinstance(value, float):
        return round(value, 8) if math.isfinite(value) else str(value)
    return value
