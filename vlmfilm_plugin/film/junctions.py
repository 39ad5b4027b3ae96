"""Vessel junctions: where the skeleton of a mask branches, and the gate that keeps FiLM away from there.

The mask of a row is, in this order: `batch["junction_mask"]`, or what `JunctionGating.source` names. Runs on the CPU, once a forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vlmfilm_plugin.errors import ConditionError, SettingsError
from vlmfilm_plugin.settings.junctions import JunctionGating

if TYPE_CHECKING:
    from vlmfilm_plugin.film.gate_view import GateView

Array = np.ndarray[Any, Any]


def vessel_junctions(view: GateView) -> Tensor | None:
    """Return the gate of a forward (R, 1, H, W): `gate_value_in_junction` near junctions and 1 elsewhere; None where FiLM acts everywhere.

    FiLM acts everywhere in the epochs of `warmup_epochs` of a fit and, with `source: gt`, outside of training, where a model must not be
    shown the truth.

    Raises:
        ConditionError: the host does not say where its mask is, or a given mask cannot be mapped to the rows.
        SettingsError: scikit-image (the extra `gate`) is not installed.
    """
    rule = view.junctions
    is_warming_up = rule.warmup_epochs is not None and view.epoch is not None and view.epoch < rule.warmup_epochs
    if is_warming_up and view.phase in ("train", "val"):
        return None
    mask = _mask(view, rule)
    if mask is None:
        return None
    if mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[0] != view.x.shape[0]:
        facts = {"found": tuple(mask.shape), "source": rule.source, "expected": f"({view.x.shape[0]}, 1, H, W)"}
        raise ConditionError("cannot find vessel junctions in this mask", facts, "correct `UNet.masks` of the host adapter")
    binary = (mask.detach()[:, 0] > rule.threshold).cpu().numpy()
    gates = [np.where(junctions(row, rule.degree_threshold, rule.radius_px), rule.gate_value_in_junction, 1.0) for row in binary]
    return torch.from_numpy(np.stack(gates).astype(np.float32))[:, None]


def _mask(view: GateView, rule: JunctionGating) -> Tensor | None:
    if isinstance(view.batch, Mapping) and view.batch.get("junction_mask") is not None:
        return _of_rows(view, view.batch["junction_mask"], "junction_mask")
    if rule.source == "gt":
        return _of_rows(view, view.truth(), "the ground truth") if view.phase == "train" else None
    return view.prediction() if rule.source == "pred" else view.state()


def _of_rows(view: GateView, mask: Any, name: str) -> Tensor:
    """Return the mask of each row (R, 1, H, W) from one mask a sample, or one a row, of the size of x."""
    rows, size = view.x.shape[0], tuple(view.x.shape[-2:])
    found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    is_fitting = isinstance(mask, Tensor) and mask.dim() == 4 and tuple(mask.shape[-2:]) == size
    if is_fitting and mask.shape[0] == rows and (view.rows is None or rows != view.samples):
        per_row: Tensor = mask[:, :1].as_subclass(Tensor)
        return per_row
    if is_fitting and mask.shape[0] == (view.samples or rows):
        plain: Tensor = mask[:, :1].as_subclass(Tensor)
        return plain if view.rows is None else plain.index_select(0, view.rows.to(mask.device))
    raise ConditionError(
        f"cannot map {name} to the rows of this UNet forward",
        {"found": found, "rows": (rows, 1, *size), "expected": "one mask a sample or a row, of the size of the UNet's input"},
        "the rows are patches or windows whose place is not known: take `source: pred`, or give one mask a patch",
    )


def junctions(mask: Array, degree_threshold: int = 3, radius_px: int = 8) -> Array:
    """Return the pixels (H, W) within `radius_px` steps of a skeleton pixel with `degree_threshold` or more skeleton neighbours.

    Args:
        mask: (H, W), truth values.
        radius_px: steps along the axes: the neighbourhood is a diamond.
    """
    try:
        from skimage import morphology
    except ImportError as error:
        facts = {"error": error, "expected": "scikit-image"}
        raise SettingsError(
            "cannot find vessel junctions", facts, "pip install 'vlmfilm-plugin[gate]', or take `spatial_gate` and `junction_gating_config` out"
        ) from error
    tools: Any = morphology
    truth = np.asarray(mask, dtype=bool)
    if not truth.any():
        return truth
    skeleton = tools.skeletonize(truth)
    padded = np.pad(skeleton.astype(np.uint8), 1)
    height, width = skeleton.shape
    degree = sum(padded[1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width] for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx)
    found: Array = skeleton & (np.asarray(degree) >= degree_threshold)
    for _ in range(min(radius_px, height + width) if found.any() else 0):
        grown = found.copy()
        grown[1:] |= found[:-1]
        grown[:-1] |= found[1:]
        grown[:, 1:] |= found[:, :-1]
        grown[:, :-1] |= found[:, 1:]
        found = grown
    return found
