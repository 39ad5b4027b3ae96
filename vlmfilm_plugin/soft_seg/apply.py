"""`apply_vlm_film`: the soft-seg port's function for models that apply FiLM by hand."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from vlmfilm_plugin.errors import ConditionError, FeatureError
from vlmfilm_plugin.features.shuffle import Shuffle, permutation_hash
from vlmfilm_plugin.film.layers import identity_for, modulate
from vlmfilm_plugin.film.statistics import statistics
from vlmfilm_plugin.log import film_logger
from vlmfilm_plugin.settings.mode import read_mode


def apply_vlm_film(
    x: Tensor,
    vlm_cond: Mapping[str, Any] | Tensor | None,
    vlm_film_heads: nn.ModuleList | None,
    stage_idx: int,
    module: Any = None,
    *,
    mode: str | None = None,
    step: int | None = None,
) -> tuple[Tensor, dict[str, Any] | None]:
    """Modulate the features of one decoder stage.

    Args:
        x: (B, C, H, W), after block2 and before attention.
        vlm_cond: what `compute_condition` returned, or cond_vec (B, cond_dim) itself; None leaves x alone.
        vlm_film_heads: one head a selected stage, ascending; None leaves x alone.
        stage_idx: decoder stage, 0 next to the bottleneck.
        module: the model; its `vlm_film_decoder_stages` selects stages, its `global_step` seeds `shuffle`.
        mode: `on`, `off` or `shuffle`; None takes `VLM_FILM_MODE`, and `on` where that is unset.
        step: the seed of `shuffle`, instead of `module.global_step`.

    Returns:
        (x modulated, payload): payload holds gamma and beta (B, C, 1, 1) detached, the mode and the stage, and `statistics`, which
        reads the device when called; (x, None) where no FiLM applies.

    Raises:
        ConditionError: cond_vec's rows are not x's rows. FeatureError: wrong widths. SettingsError: a wrong mode.
    """
    head = _head_of(vlm_film_heads, stage_idx, module)
    cond_vec = vlm_cond.get("cond_vec") if isinstance(vlm_cond, Mapping) else vlm_cond
    if head is None or cond_vec is None:
        return x, None
    mode = read_mode({"VLM_FILM_MODE": mode}) if mode is not None else read_mode(os.environ) or "on"
    if cond_vec.shape[0] != x.shape[0]:
        raise ConditionError(
            "cannot apply FiLM: cond_vec does not fit x",
            {"cond_vec": tuple(cond_vec.shape), "x": tuple(x.shape), "expected": "equal numbers of rows"},
            "give one condition a row of x",
        )
    permutation: list[int] | None = None
    if mode == "shuffle":
        cond_vec, permutation = _exchanged(cond_vec, module, step)
    if mode == "off":
        gamma, beta = identity_for(x)
        y = x
    else:
        gamma, beta = _gamma_and_beta(head, cond_vec, x, stage_idx)
        y = modulate(x, gamma, beta)
    payload = {
        "gamma": gamma.detach(),
        "beta": beta.detach(),
        "film_mode": mode,
        "film_bypass": mode == "off",
        "film_stage_idx": stage_idx,
        "shuffle_perm_hash": None if permutation is None else permutation_hash(permutation),
        "statistics": lambda: statistics(x, y, gamma, beta, cond_vec),
    }
    return y, payload


def _head_of(heads: nn.ModuleList | None, stage_idx: int, module: Any) -> nn.Module | None:
    if heads is None:
        return None
    stages = getattr(module, "vlm_film_decoder_stages", None)
    order = sorted(set(stages)) if stages is not None else list(range(len(heads)))
    if stage_idx not in order:
        return None
    if len(order) != len(heads):
        raise FeatureError(
            "cannot apply FiLM: heads and selected decoder stages do not fit",
            {"heads": len(heads), "stages": order, "expected": "one head a selected stage"},
            "correct `vlm_film_decoder_stages`",
        )
    return heads[order.index(stage_idx)]


def _gamma_and_beta(head: nn.Module, cond_vec: Tensor, x: Tensor, stage_idx: int) -> tuple[Tensor, Tensor]:
    gamma, beta = head(cond_vec)
    if gamma.shape[1] != x.shape[1]:
        raise FeatureError(
            f"cannot apply FiLM at decoder stage {stage_idx}: the head is for another number of channels",
            {"head": gamma.shape[1], "x": tuple(x.shape), "expected": f"a head for {x.shape[1]} channels"},
            "pass the heads in stage order",
        )
    return gamma, beta


def _exchanged(cond_vec: Tensor, module: Any, step: int | None) -> tuple[Tensor, list[int]]:
    """Return the rows of cond_vec (B, cond_dim) permuted by the step, and the permutation."""
    seed = step if step is not None else getattr(module, "global_step", None)
    rows = Shuffle().exchange(range(len(cond_vec)), int(seed or 0))
    permutation = rows if rows is not None else list(range(len(cond_vec)))
    _report_shuffle(permutation, module, rows is None)
    return cond_vec[permutation], permutation


# The epoch whose permutation was reported last; by the model's class, since a model need not be hashable.
_reported_epochs: dict[type, object] = {}


def _report_shuffle(permutation: list[int], module: Any, is_alone: bool) -> None:
    """Write `[FILM-SHUFFLE]` once an epoch, and say so where there was nothing to shuffle."""
    epoch = getattr(module, "current_epoch", None)
    if _reported_epochs.get(type(module), _reported_epochs) != epoch:
        _reported_epochs[type(module)] = epoch
        note = " WARNING: all rows are of one image: nothing was shuffled, this equals mode on" if is_alone else ""
        film_logger().info("[FILM-SHUFFLE] perm_first10=%s%s", permutation[:10], note)
