"""Optimizer state of a checkpoint, matched to parameters by name."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from torch import nn

from vlmfilm_plugin.errors import CheckpointError


def match_optimizer_states(model: nn.Module, checkpoint: MutableMapping[str, Any], saved_order: list[str], is_frozen: bool) -> None:
    """Re-key optimizer state by parameter name: FiLM's parameters stand inside the UNet, so the positions of others shift."""
    states = checkpoint.get("optimizer_states") or []
    parameters = dict(model.named_parameters())
    saved = [name for name in saved_order if name in parameters]
    if not states or saved == list(parameters):
        return
    # Where the host is frozen its optimizer holds FiLM alone.
    current = [name for name, p in parameters.items() if p.requires_grad or not is_frozen]
    position = {name: index for index, name in enumerate(current)}
    for state in states:
        groups = state.get("param_groups", [])
        if len(groups) != 1 or list(groups[0].get("params", [])) != list(range(len(saved))):
            raise CheckpointError(
                "cannot resume from this checkpoint: its optimizer state cannot be matched to the parameters with FiLM",
                {"found": f"{len(groups)} parameter groups, {len(saved)} known parameters", "expected": "one group over all parameters in order"},
                "start a new run from its weights instead of resuming",
            )
        state["state"] = {position[saved[index]]: value for index, value in state["state"].items() if saved[index] in position}
        groups[0]["params"] = list(range(len(current)))
