"""What one call of `apply_vlm_film` says of itself: `vlm_cond["_dbg"]`, the step, training or validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmfilm_plugin.errors import ConditionError
from vlmfilm_plugin.log import is_rank_zero

# Fields of `_dbg` that steer the lines and stand in none of them.
_STEERING = frozenset({"should_log", "keys", "images"})


@dataclass(frozen=True)
class Call:
    """One call.

    Attributes:
        debug: `vlm_cond["_dbg"]`, or None.
        step: None where there is no `_dbg`, and nothing else tells a step.
        epoch: what the model says, else `_dbg`.
        is_training: by the model, else by `_dbg["stage"]`, else yes.
    """

    debug: Mapping[str, Any] | None
    step: int | None
    epoch: object
    is_training: bool

    @classmethod
    def of(cls, vlm_cond: object, module: object, step: int | None) -> Call:
        """Read a call.

        Raises:
            ConditionError: `_dbg` is no mapping, or it tells no step and nothing else does.
        """
        debug = vlm_cond.get("_dbg") if isinstance(vlm_cond, Mapping) else None
        if debug is not None and not isinstance(debug, Mapping):
            facts = {"found": f"{type(debug).__name__} {debug!r}", "expected": "a mapping of fields, `step` at least"}
            raise ConditionError("cannot use vlm_cond['_dbg']", facts, "pass what `compute_condition` returned, or take `_dbg` out")
        fields = debug or {}
        training = getattr(module, "training", None)
        epoch = getattr(module, "current_epoch", None)
        return cls(
            debug,
            _first_step(debug, [step, fields.get("step"), getattr(module, "global_step", None)]),
            fields.get("epoch") if epoch is None else epoch,
            training if isinstance(training, bool) else fields.get("stage", "train") == "train",
        )

    @property
    def is_logged(self) -> bool:
        """Tell whether this call writes `[FILM-DBG]`: only then may the device be read."""
        return self.debug is not None and bool(self.debug.get("should_log")) and is_rank_zero()

    def told(self) -> dict[str, Any]:
        """Return the fields for the log line that the caller told."""
        return {name: value for name, value in (self.debug or {}).items() if name not in _STEERING}

    def names(self, rows: int) -> list[str]:
        """Return what tells the images of the rows apart: their keys, or, where none are known, their positions.

        Raises:
            ConditionError: the keys are not one a row.
        """
        keys = self._told_keys()
        if keys is None:
            return [f"row {row}" for row in range(rows)]
        if not isinstance(keys, list | tuple) or len(keys) != rows:
            found = len(keys) if isinstance(keys, list | tuple) else type(keys).__name__
            raise ConditionError(
                "cannot shuffle: the keys in vlm_cond['_dbg'] do not fit cond_vec",
                {"keys": found, "cond_vec": rows, "expected": "one key a row"},
                "repeat or select `_dbg['keys']` as the rows of cond_vec are",
            )
        return [str(key) for key in keys]

    def keys(self, rows: int) -> list[str] | None:
        """Return what tells the images of the rows apart, where their keys are known and are one a row."""
        keys = self._told_keys()
        return [str(key) for key in keys] if isinstance(keys, list | tuple) and len(keys) == rows else None

    def _told_keys(self) -> object:
        fields = self.debug or {}
        return fields.get("keys") if fields.get("images") is None else fields["images"]


def _first_step(debug: Mapping[str, Any] | None, candidates: Sequence[object]) -> int | None:
    told = next((value for value in candidates if value is not None), None)
    if told is None and debug is None:
        return None
    if isinstance(told, int) and not isinstance(told, bool):
        return told
    found = "no `step` in it, no `global_step` of the module" if told is None else f"{type(told).__name__} {told!r}"
    raise ConditionError(
        "cannot apply FiLM: vlm_cond['_dbg'] tells no step" if told is None else "cannot apply FiLM: not a step",
        {"found": found, "expected": "a whole number"},
        "put the training step into vlm_cond['_dbg']['step'] (`compute_condition` does), or take `_dbg` out",
    )
