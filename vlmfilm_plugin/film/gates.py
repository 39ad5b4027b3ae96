"""Spatial gates: where in the image FiLM acts. `y = x + gate * (film(x) - x)`, gate (R, 1, H, W) in [0, 1], resized to each stage.

A gate is a function of one UNet forward that returns it, or None where FiLM acts everywhere. `register_gate` adds one by name; the
settings `spatial_gate` and `junction_gating_config` choose it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlmfilm_plugin.errors import ConditionError, SettingsError
from vlmfilm_plugin.film.gate_view import GateView
from vlmfilm_plugin.film.junctions import vessel_junctions
from vlmfilm_plugin.film.layout import Layout
from vlmfilm_plugin.settings.junctions import JunctionGating
from vlmfilm_plugin.settings.record import Settings

if TYPE_CHECKING:
    from vlmfilm_plugin.film.architecture import Stage

Gate = Callable[[GateView], Tensor | None]
TWO_DIMENSIONS = Layout()


@dataclass(frozen=True)
class SpatialGate:
    """The gate of one forward.

    Attributes:
        values: (R, 1, H, W) or (1, 1, H, W) in [0, 1].
        interp: how it is resized to a stage: `nearest`, or `bilinear` with antialiasing.
        stages: the decoder stages it acts at; None is all.
    """

    values: Tensor
    interp: str = "bilinear"
    stages: frozenset[int] | None = None

    def apply(self, stage: int, x: Tensor, y: Tensor, layout: Layout = TWO_DIMENSIONS) -> Tensor:
        """Return `x + gate * (y - x)` in x's dtype, the gate resized to x (R, C, h, w); y at a stage that is not gated.

        Raises:
            ConditionError: x has not two dimensions of space.
        """
        if self.stages is not None and stage not in self.stages:
            return y
        if layout.rank != 2:
            facts = {"found": f"features {tuple(x.shape)}, of {layout.rank} dimensions of space", "expected": "two"}
            raise ConditionError("cannot apply a spatial gate to these features", facts, "take the gate out")
        gate = layout.resize(self.values, x, self.interp)
        return torch.lerp(x, y, gate.clamp(0, 1).to(x.dtype).expand_as(x))


GATES: dict[str, Gate] = {"vessel_junctions": vessel_junctions}


def register_gate(name: str, gate: Gate) -> Callable[[], None]:
    """Add a gate under a name for the setting `spatial_gate`; return a function that takes it out again.

    Raises:
        SettingsError: the name is taken.
    """
    if name in GATES:
        raise SettingsError(f"cannot register gate {name!r}: the name is taken", {"known": sorted(GATES)}, "choose another name")
    GATES[name] = gate

    def undo() -> None:
        if GATES.get(name) is gate:
            del GATES[name]

    return undo


def find_gate(name: str | None, origin: str = "argument") -> Gate | None:
    """Return the gate of that name; None for None.

    Raises:
        SettingsError: there is no such gate.
    """
    if name is None:
        return None
    if name not in GATES:
        closest = get_close_matches(name, GATES, n=1)
        facts = {"found": f"{name!r}   (from {origin})", "known": ", ".join(sorted(GATES))}
        raise SettingsError("cannot use `spatial_gate`: unknown name", facts, f"set it to {closest[0] if closest else sorted(GATES)[0]!r}")
    return GATES[name]


def gate_of(settings: Settings, view: GateView, stages: Sequence[Stage]) -> SpatialGate | None:
    """Return the gate that the settings put in force for a forward; None where FiLM acts everywhere.

    Raises:
        SettingsError: there is no gate of that name, or it is to act at stages that carry no FiLM.
        ConditionError: the gate cannot be computed, or what it returns is none.
    """
    gate = find_gate(settings.gate_name, settings.origin("spatial_gate"))
    if gate is None:
        return None
    rule = settings.junction_gating_config or JunctionGating(enabled=True)
    is_ours = gate is vessel_junctions
    extra = sorted(set(rule.apply_stages or ()) - {stage.index for stage in stages}) if is_ours else []
    if extra:
        facts = {"found": f"apply_stages {list(rule.apply_stages or ())}", "without FiLM": extra, "expected": [stage.index for stage in stages]}
        raise SettingsError("cannot use `junction_gating_config`: it gates stages that carry no FiLM", facts, "correct `apply_stages`")
    values = gate(replace(view, junctions=rule))
    if values is None:
        return None
    checked = check_gate(values, view.x)
    if not is_ours:
        return SpatialGate(checked)
    return SpatialGate(checked, rule.interp, None if rule.apply_stages is None else frozenset(rule.apply_stages))


def describe_gate(settings: Settings) -> str | None:
    """Return the gate that the settings put in force and what it costs, for the log; None where there is none."""
    if settings.gate_name != "vessel_junctions":
        return settings.gate_name
    rule = settings.junction_gating_config or JunctionGating(enabled=True)
    values = " ".join(f"{name}={value}" for name, value in rule.as_dict().items() if name != "enabled" and value is not None)
    cost = {
        "pred": "every forward of the UNet is made twice",
        "gt": "in evaluation FiLM acts everywhere",
        "state": "no further forward is made",
    }[rule.source]
    warm_up = f"; before epoch {rule.warmup_epochs} of a training FiLM acts everywhere" if rule.warmup_epochs else ""
    return f"vessel_junctions {values}: {cost}{warm_up}"


def check_gate(gate: Tensor, x: Tensor) -> Tensor:
    """Return a gate on x's device, checked.

    Raises:
        ConditionError: it is not (R, 1, H, W) with R x's rows (or 1), or, on the CPU, has values outside [0, 1].
    """
    found = f"{type(gate).__name__} {tuple(getattr(gate, 'shape', ()))}"
    if not isinstance(gate, Tensor) or gate.dim() != 4 or gate.shape[1] != 1 or gate.shape[0] not in (1, x.shape[0]):
        raise ConditionError(
            "cannot use this spatial gate", {"found": found, "expected": f"a tensor ({x.shape[0]}, 1, H, W)"}, "correct the gate's shape"
        )
    if gate.device.type == "cpu" and not bool(((gate >= 0) & (gate <= 1)).all()):
        facts = {"found": f"values {float(gate.min()):g} to {float(gate.max()):g}", "expected": "values in [0, 1]"}
        raise ConditionError("cannot use this spatial gate", facts, "clamp it")
    return gate.detach().to(x.device, torch.float32)
