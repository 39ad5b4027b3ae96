"""Spatial gates: where in the image FiLM acts. `y = x + gate * (film(x) - x)`, gate (R, 1, H, W) in [0, 1], resized to each stage.

A gate is a function of one UNet forward; `register_gate` adds one by name, the setting `spatial_gate` chooses it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmfilm_plugin.errors import ConditionError, SettingsError

JUNCTION_RADIUS = 3


@dataclass(frozen=True)
class GateView:
    """One UNet forward, as a gate sees it.

    Attributes:
        x: the UNet's input (R, C, H, W): the current state of the mask, noise at the start of a solver.
        image: the condition image (R, C, H, W), or None.
        batch: the running batch of the host, or None where a caller gave the condition.
        phase: `train`, `val`, `test` or `predict`, or None likewise.
    """

    x: Tensor
    image: Tensor | None
    batch: Any = None
    phase: str | None = None


Gate = Callable[[GateView], Tensor]


def vessel_junctions(view: GateView) -> Tensor:
    """Keep FiLM away from vessel junctions: 0 within 3 pixels of a branching point, 1 elsewhere.

    The mask is `batch["junction_mask"]` (R, 1, H, W), values in [0, 1], where the batch has one row a UNet row, else the current
    prediction: channel 0 of x above 0. Runs on the CPU, once a forward; needs scikit-image (extra `gate`).
    """
    given = view.batch.get("junction_mask") if isinstance(view.batch, Mapping) else None
    fits = isinstance(given, Tensor) and given.shape[0] == view.x.shape[0] and given.shape[-2:] == view.x.shape[-2:]
    mask = given[:, 0] > 0.5 if fits and given is not None else view.x[:, 0] > 0
    gates = [1.0 - junctions(row).astype(np.float32) for row in mask.detach().cpu().numpy()]
    return torch.from_numpy(np.stack(gates))[:, None]


def junctions(mask: np.ndarray[Any, Any], radius: int = JUNCTION_RADIUS) -> np.ndarray[Any, Any]:
    """Return the pixels (H, W) within `radius` of a skeleton pixel with three or more skeleton neighbours.

    Args:
        mask: (H, W), truth values.
    """
    try:
        from skimage import morphology
    except ImportError as error:
        facts = {"error": error, "expected": "scikit-image"}
        raise SettingsError("cannot find vessel junctions", facts, "pip install 'vlmfilm-plugin[gate]', or take `spatial_gate` out") from error
    tools: Any = morphology
    skeleton = tools.skeletonize(np.asarray(mask, dtype=bool))
    padded = np.pad(skeleton.astype(np.uint8), 1)
    height, width = skeleton.shape
    degree = sum(padded[1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width] for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx)
    points = skeleton & (np.asarray(degree) >= 3)
    found: np.ndarray[Any, Any] = tools.dilation(points, tools.disk(radius))
    return found


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
