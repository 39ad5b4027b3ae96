"""Statistics of what FiLM did at one block, and of how it differs between images.

Those that return floats synchronise the device: for logged steps alone. Those that return tensors leave them on the device.
"""

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


def spread_between_images(values: Tensor, images: Tensor | None = None) -> Tensor:
    """Return the standard deviation between images, channel by channel (C,), in the values' unit; of one image it is zero.

    Rows that are equal to the bit have a spread of exactly zero.

    Args:
        values: gamma or beta (R, C, 1, 1), or condition vectors (R, C).
        images: (R,) which image each row is of, numbered from 0 to R - 1 at most; rows of one image count once, by their mean. None: every
            row is another image.
    """
    means, count = _image_means(values, images)
    centred = means - (means.sum(0) / count)
    present = _present(means, images)
    return ((centred * centred * present).sum(0) / count).sqrt()


def share_at_bound(values: Tensor, centre: float, bound: float | None) -> Tensor | None:
    """Return the share of entries, in [0, 1], that lie within a thousandth of their bound; None where there is no bound, or no room inside it.

    Args:
        values: gamma or beta (R, C, 1, 1).
        centre: 1 for gamma, 0 for beta.
        bound: gamma_scale or beta_scale of the head.
    """
    if not bound:
        return None
    return ((_plain(values) - centre).abs() >= 0.999 * bound).float().mean()


def differing_energy(cond_vec: Tensor, images: Tensor | None = None) -> Tensor:
    """Return the share of the condition vectors' energy (the sum of squares) that differs between images, in [0, 1]; a scalar.

    Of equal vectors it is 0, of vectors whose mean is zero 1. A single image has nothing to differ from: 0.

    Args:
        cond_vec: (R, D).
        images: as in `spread_between_images`.
    """
    means, count = _image_means(cond_vec, images, shift=False)
    present = _present(means, images)
    centred = means - (means.sum(0) / count)
    energy = (means * means).sum()
    return (centred * centred * present).sum() / energy.clamp_min(torch.finfo(energy.dtype).tiny)


def _image_means(values: Tensor, images: Tensor | None, *, shift: bool = True) -> tuple[Tensor, Tensor | int]:
    """Return the mean of each image's rows (R, C), zero for numbers that no row has, and how many images there are.

    With `shift` the first row is subtracted from all: what is left of equal rows is exactly zero, whatever their mean rounds to.
    """
    rows = _plain(values).flatten(1)
    if shift:
        rows = rows - rows[:1]
    if images is None:
        return rows, rows.shape[0]
    sums = torch.zeros_like(rows).index_add_(0, images, rows)
    counts = rows.new_zeros(rows.shape[0]).index_add_(0, images, rows.new_ones(rows.shape[0]))
    return sums / counts.clamp_min(1)[:, None], (counts > 0).sum()


def _present(means: Tensor, images: Tensor | None) -> Tensor:
    """Return 1 for the numbers that images have, else 0: (R, 1)."""
    if images is None:
        return means.new_ones(means.shape[0], 1)
    return means.new_zeros(means.shape[0], 1).index_fill_(0, images, 1)


def _plain(tensor: Tensor) -> Tensor:
    # MONAI's MetaTensor would carry its metadata through every operation.
    return tensor.detach().as_subclass(torch.Tensor).float()


def _mean_std(name: str, values: Tensor) -> dict[str, float]:
    return {f"{name}_mean": float(values.mean()), f"{name}_std": float(values.std(correction=0))}
