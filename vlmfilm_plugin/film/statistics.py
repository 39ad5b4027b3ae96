"""Statistics of what FiLM did at one block. Reading them synchronises the device: for logged steps alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def statistics(before: Tensor, after: Tensor, gamma: Tensor, beta: Tensor, cond_vec: Tensor | None) -> dict[str, Any]:
    """Return the statistics of one block; every value is a float, or None where it does not exist.

    Shape:
        before, after (R, C, H, W); gamma, beta (R, C, 1, 1); cond_vec (S, D) or None.
    """
    x, y = _plain(before).flatten(1), _plain(after).flatten(1)
    g, b = _plain(gamma).flatten(1), _plain(beta).flatten(1)
    delta = (y - x).norm(dim=1) / x.norm(dim=1).clamp_min(1e-12)
    return {
        **condition_statistics(cond_vec),
        **_mean_std("gamma", g),
        **_mean_std("gamma_dev", (g - 1).abs()),
        **_mean_std("beta", b),
        **_mean_std("beta_norm", b.norm(dim=1)),
        "x_pre_norm_mean": float(x.norm(dim=1).mean()),
        "x_post_norm_mean": float(y.norm(dim=1).mean()),
        "mean_abs_diff": float((y - x).abs().mean()),
        "max_abs_diff": float((y - x).abs().max()),
        "rel_delta_mean": float(delta.mean()),
        "rel_delta_p50": float(delta.quantile(0.5)),
        "rel_delta_p95": float(delta.quantile(0.95)),
    }


def gate_statistics(gate: Tensor | None) -> dict[str, Any]:
    """Return the statistics of a spatial gate (R, 1, H, W) at the features' size; None where there is no gate."""
    if gate is None:
        return dict.fromkeys(("junction_gate_mean", "junction_gate_min", "junction_gate_max", "junction_area_pct"))
    g = _plain(gate)
    return {
        "junction_gate_mean": float(g.mean()),
        "junction_gate_min": float(g.min()),
        "junction_gate_max": float(g.max()),
        "junction_area_pct": float((g < 0.99).float().mean() * 100),
    }


def condition_statistics(cond_vec: Tensor | None) -> dict[str, Any]:
    """Return the statistics of condition vectors (S, D); every value None where there are none."""
    empty: dict[str, Any] = dict.fromkeys(("cond_dim", "cond_norm_mean", "cond_norm_std", "cond_cos_mean", "cond_cos_min", "cond_cos_max"))
    if cond_vec is None:
        return empty
    c = _plain(cond_vec)
    empty |= {"cond_dim": c.shape[1], **_mean_std("cond_norm", c.norm(dim=1))}
    if c.shape[0] > 1:
        unit = torch.nn.functional.normalize(c, dim=1)
        first, second = torch.triu_indices(c.shape[0], c.shape[0], offset=1, device=c.device)
        pairs = (unit @ unit.T)[first, second]
        empty |= {"cond_cos_mean": float(pairs.mean()), "cond_cos_min": float(pairs.min()), "cond_cos_max": float(pairs.max())}
    return empty


def _plain(tensor: Tensor) -> Tensor:
    # MONAI's MetaTensor would carry its metadata through every operation.
    return tensor.detach().as_subclass(torch.Tensor).float()


def _mean_std(name: str, values: Tensor) -> dict[str, float]:
    return {f"{name}_mean": float(values.mean()), f"{name}_std": float(values.std(correction=0))}
