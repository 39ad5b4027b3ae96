"""The block `junction_gating_config`: its entries, their defaults (the soft-seg port's), and what is wrong with one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from typing import Any

from vlmfilm_plugin.settings.parsing import BadEntries, check, describe, setting


@dataclass(frozen=True)
class JunctionGating:
    """How the gate `vessel_junctions` finds the neighbourhoods of vessel junctions, and what it does there.

    Attributes:
        enabled: whether the gate is in force.
        source: where the mask comes from: `pred`, a first pass of the UNet, sigmoid of its output; `gt`, the ground truth of a training
            batch; `state`, the mask in the UNet's input.
        threshold: a pixel is vessel where the mask is above it.
        degree_threshold: a skeleton pixel with that many skeleton neighbours (of 8) is a junction.
        radius_px: how far a neighbourhood reaches, in steps along the axes: a diamond; 0 is the junction pixel itself.
        gate_value_in_junction: the gate there: 0 leaves the host's features alone, 1 is FiLM; elsewhere it is 1.
        apply_stages: decoder stages that are gated; None (`same_as_film`) is all that carry FiLM.
        interp: how the gate is resized to a stage.
        warmup_epochs: in a fit, FiLM acts everywhere before this epoch; None and 0 gate from the start.
    """

    enabled: bool = setting(False, "bool")
    source: str = setting("pred", "str", choices=("pred", "gt", "state"))
    threshold: float = setting(0.5, "float", low=0.0, high=1.0)
    degree_threshold: int = setting(3, "int", low=1, high=8)
    radius_px: int = setting(8, "int", low=0)
    gate_value_in_junction: float = setting(0.0, "float", low=0.0, high=1.0)
    apply_stages: tuple[int, ...] | None = setting(None, "stages_or_all", optional=True)
    interp: str = setting("nearest", "str", choices=("nearest", "bilinear"))
    warmup_epochs: int | None = setting(None, "int", low=0, optional=True)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values under the names of the block."""
        values = asdict(self)
        values["apply_stages"] = "same_as_film" if self.apply_stages is None else list(self.apply_stages)
        return values


ENTRIES = {item.name: item.metadata for item in fields(JunctionGating)}


def parse_junctions(raw: object, is_text: bool) -> JunctionGating:
    """Read the block.

    Raises:
        TypeError, ValueError: it is no mapping. BadEntries: entries are unknown or wrong; all of them are named.
    """
    if isinstance(raw, JunctionGating):
        return raw
    content = json.loads(str(raw)) if is_text else raw
    if not isinstance(content, Mapping):
        raise TypeError(raw)
    values: dict[str, Any] = {}
    wrong: dict[str, str] = {}
    for name, value in content.items():
        if name not in ENTRIES:
            closest = get_close_matches(str(name), ENTRIES, n=1)
            wrong[str(name)] = "unknown name" + (f", closest {closest[0]!r}" if closest else f"; legal names: {', '.join(ENTRIES)}")
            continue
        try:
            values[name] = check(ENTRIES[name], value, False)
        except (TypeError, ValueError, OverflowError):
            wrong[name] = f"found {value!r}, expected {describe(ENTRIES[name])}"
    if wrong:
        raise BadEntries(wrong)
    return JunctionGating(**values)
