"""`apply_vlm_film`: the soft-seg port's function for models that apply FiLM by hand."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vlmfilm_plugin.errors import ConditionError, FeatureError
from vlmfilm_plugin.features.shuffle import distances_of, permutation_hash
from vlmfilm_plugin.film.gates import check_gate
from vlmfilm_plugin.film.layers import identity_for, modulate
from vlmfilm_plugin.film.statistics import gate_statistics, statistics
from vlmfilm_plugin.run.log_fields import line_of
from vlmfilm_plugin.settings.mode import MODE_VARIABLE, read_mode
from vlmfilm_plugin.soft_seg.call import Call
from vlmfilm_plugin.soft_seg.model_state import ModelState, shuffle_of_environment, state_of


def apply_vlm_film(
    x: Tensor,
    vlm_cond: Mapping[str, Any] | Tensor | None,
    vlm_film_heads: nn.ModuleList | None,
    stage_idx: int,
    module: Any = None,
    apply_point: str = "post_block2",
    junction_gate: Tensor | None = None,
    junction_warmup_active: bool = False,
    *,
    mode: str | None = None,
    step: int | None = None,
    seed: int | None = None,
) -> tuple[Tensor, dict[str, Any] | None]:
    """Modulate the features of one decoder stage, and write the log lines that `vlm_cond["_dbg"]` asks for.

    Args:
        x: (B, C, H, W), after block2 and before attention.
        vlm_cond: what `compute_condition` returned, or cond_vec (B, cond_dim) itself; None leaves x alone. Its `_dbg` (the fields of
            `log_lines.FIELDS`, `step` at least) writes `[FILM-DBG]` where `should_log` is true; its `keys`, one a row, tell images apart.
        vlm_film_heads: one head a selected stage, ascending; None leaves x alone.
        stage_idx: decoder stage, 0 next to the bottleneck.
        module: the model; its `vlm_film_decoder_stages` selects stages, `training` tells validation from training, `current_epoch`
            epochs, `global_step` the step where `_dbg` does not. The lines of a model are its own and die with it.
        apply_point: where in the block this is; a label for the log.
        junction_gate: (B, 1, H, W) in [0, 1], resized to x (nearest): x + gate * (film(x) - x). Mode off needs none.
        junction_warmup_active: the gate is one that a warm-up leaves open; a label for the log.
        mode: `on`, `off` or `shuffle`; None takes `VLM_FILM_MODE`, and `on` where that is unset.
        step: draws `shuffle`, instead of `_dbg["step"]` and `module.global_step`; 0 where nothing tells a step.
        seed: draws `shuffle`, instead of the setting `shuffle_seed` in the environment.

    Returns:
        (x modulated, payload): payload holds gamma and beta (B, C, 1, 1) detached, the mode and the stage, and `statistics`, which
        reads the device when called; on a logged call also every field of the line. (x, None) where no FiLM applies. The device is
        read on logged calls alone.

    In a training `[FILM-WARN]` says when gamma and beta have become the same for every image.

    Raises:
        ConditionError: cond_vec's rows are not x's rows; `_dbg` without a step; a gate that does not fit; `shuffle` with one image.
        FeatureError: wrong widths. SettingsError: a wrong mode.
    """
    head = _head_of(vlm_film_heads, stage_idx, module)
    cond_vec = vlm_cond.get("cond_vec") if isinstance(vlm_cond, Mapping) else vlm_cond
    if head is None or cond_vec is None:
        return x, None
    mode = read_mode({MODE_VARIABLE: mode}) if mode is not None else read_mode(os.environ) or "on"
    if cond_vec.shape[0] != x.shape[0]:
        raise ConditionError(
            "cannot apply FiLM: cond_vec does not fit x",
            {"cond_vec": tuple(cond_vec.shape), "x": tuple(x.shape), "expected": "equal numbers of rows"},
            "give one condition a row of x",
        )
    call, state = Call.of(vlm_cond, module, step), state_of(module, vlm_film_heads)
    state.enter(call)
    permutation: list[int] | None = None
    if mode == "shuffle":
        cond_vec, permutation = _shuffled(cond_vec, vlm_cond, call, seed, state)
    elif mode == "on":
        state.watch.see(call, cond_vec, _heads_by_stage(vlm_film_heads, module), stage_idx)
    gate: Tensor | None = None
    if mode == "off":
        gamma, beta = identity_for(x)
        y = x
    else:
        gamma, beta = _gamma_and_beta(head, cond_vec, x, stage_idx)
        y = modulate(x, gamma, beta)
        if junction_gate is not None:
            gate = _resized(check_gate(junction_gate, x), x)
            y = torch.lerp(x, y, gate)
    payload: dict[str, Any] = {
        "film_mode": mode,
        "film_bypass": mode == "off",
        "film_stage_idx": stage_idx,
        "film_apply_point": apply_point,
        "shuffle_perm_hash": None if permutation is None else permutation_hash(permutation),
        "junction_gate_enabled": gate is not None,
        "junction_gate_warmup_active": bool(junction_warmup_active),
    }
    if call.is_logged:
        with torch.no_grad():
            numbers = statistics(x, y, gamma, beta, cond_vec) | gate_statistics(gate)
        own = {"stage": "train" if call.is_training else "val", "B": x.shape[0]}
        payload = line_of(numbers, own, call.told(), {"step": call.step, "epoch": call.epoch}, payload)
        # By the model, whatever `stage` says: that is what ends a validation. Off is constant by itself.
        state.lines.debug(dict(payload), is_validation=not call.is_training, is_watched=mode != "off")
    payload |= {"gamma": gamma.detach(), "beta": beta.detach(), "statistics": lambda: statistics(x, y, gamma, beta, cond_vec)}
    return y, payload


def _head_of(heads: nn.ModuleList | None, stage_idx: int, module: Any) -> nn.Module | None:
    if heads is None:
        return None
    order = _stages_of(heads, module)
    if stage_idx not in order:
        return None
    if len(order) != len(heads):
        raise FeatureError(
            "cannot apply FiLM: heads and selected decoder stages do not fit",
            {"heads": len(heads), "stages": order, "expected": "one head a selected stage"},
            "correct `vlm_film_decoder_stages`",
        )
    return heads[order.index(stage_idx)]


def _stages_of(heads: nn.ModuleList, module: Any) -> list[int]:
    stages = getattr(module, "vlm_film_decoder_stages", None)
    return sorted(set(stages)) if stages is not None else list(range(len(heads)))


def _heads_by_stage(heads: nn.ModuleList | None, module: Any) -> dict[int | str, nn.Module]:
    return {} if heads is None else dict(zip(_stages_of(heads, module), heads, strict=True))


def _shuffled(cond_vec: Tensor, vlm_cond: Any, call: Call, seed: int | None, state: ModelState) -> tuple[Tensor, list[int]]:
    """Return the rows of cond_vec (B, cond_dim) exchanged between images, and the row that each one's condition came from."""
    names, step, shuffle = call.names(cond_vec.shape[0]), call.step or 0, shuffle_of_environment()
    if seed is not None:
        shuffle = replace(shuffle, seed=seed)
    permutation = shuffle.exchange(names, step, names=names, distances=lambda: distances_of(cond_vec))
    if permutation is not None:
        state.write_pairs(shuffle, names, permutation, step)
        state.shuffled(call, permutation, "" if call.step is not None else " WARNING: no step is known: every call has this permutation")
        return cond_vec.index_select(0, torch.tensor(permutation, device=cond_vec.device)), permutation
    donor = vlm_cond.get("donor_cond_vec") if isinstance(vlm_cond, Mapping) else None
    if donor is None:
        raise ConditionError(
            "cannot shuffle: all rows are of one image",
            {"rows": len(names), "image": names[0], "expected": "rows of two images or more"},
            f"use a batch of several images, or `compute_condition` under {MODE_VARIABLE}=shuffle, which finds a donor",
        )
    permutation = [0] * len(names)
    state.shuffled(call, permutation, f" batch of one image: {names[0]} is conditioned on {call.told().get('shuffle_donor')}")
    return donor, permutation


def _resized(gate: Tensor, x: Tensor) -> Tensor:
    """Return a gate (B or 1, 1, H, W) at the size of x (B, C, h, w), in its dtype; (B, C, h, w)."""
    sized = gate if gate.shape[-2:] == x.shape[-2:] else nn.functional.interpolate(gate, size=x.shape[-2:], mode="nearest")
    return sized.to(x.dtype).expand_as(x)


def _gamma_and_beta(head: nn.Module, cond_vec: Tensor, x: Tensor, stage_idx: int) -> tuple[Tensor, Tensor]:
    gamma, beta = head(cond_vec)
    if gamma.shape[1] != x.shape[1]:
        raise FeatureError(
            f"cannot apply FiLM at decoder stage {stage_idx}: the head is for another number of channels",
            {"head": gamma.shape[1], "x": tuple(x.shape), "expected": f"a head for {x.shape[1]} channels"},
            "pass the heads in stage order",
        )
    return gamma, beta
