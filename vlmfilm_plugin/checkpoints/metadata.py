"""FiLM in checkpoints: the metadata beside the weights, what a file says before its model is built, and the soft-seg port's layout.

Weights themselves travel in the host's own state dict, under the UNet (`...vlm_film.*`); `FilmModule` checks them when they load.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from torch import nn

from vlmfilm_plugin.checkpoints.facts import METADATA, TRAINED_STAGES
from vlmfilm_plugin.checkpoints.optimizer_state import match_optimizer_states
from vlmfilm_plugin.checkpoints.soft_seg_layout import (
    PORT_ENCODER_SETTINGS,
    PORT_HEADS,
    from_port,
)
from vlmfilm_plugin.film.module import FilmModule, film_modules
from vlmfilm_plugin.settings.record import Settings

_ENCODER_SETTINGS = ("encoder", "revision", "min_pixels", "max_pixels", "prompt_templates", "questionnaire", *PORT_ENCODER_SETTINGS)
_ANSWER_SETTINGS = ("use_logits_feature_cond", "logits_feature_mode", "logits_logit_temp", "logits_l2norm", "logits_include_unknown")
# Where FiLM acts was trained, too: an evaluation that is not told would let it act everywhere.
_GATE_SETTINGS = ("spatial_gate", "junction_gating_config")


def write_metadata(model: nn.Module, settings: Settings, checkpoint: MutableMapping[str, Any]) -> None:
    """Add FiLM's metadata to a checkpoint that is about to be saved: under `vlm_film`, and the port's `vlm_film_trained_stages`."""
    films = film_modules(model)
    if not films:
        return
    architecture = films[0].architecture
    checkpoint[METADATA] = {
        "architecture": architecture.as_dict(),
        "settings": {name: settings.as_dict()[name] for name in (*_ENCODER_SETTINGS, *_ANSWER_SETTINGS, *_GATE_SETTINGS)},
        "mode": films[0].mode,
    }
    checkpoint[TRAINED_STAGES] = [stage.index for stage in architecture.stages]


def adapt(model: nn.Module, checkpoint: MutableMapping[str, Any], *, is_frozen: bool = False) -> None:
    """Make a checkpoint fit a model that carries FiLM, before its strict load: the port's names, and the order of optimizer state.

    Args:
        is_frozen: the host does not train, so that its optimizer holds FiLM's parameters alone.

    Raises:
        CheckpointError: the port's heads do not fit, or optimizer state cannot be matched to parameters.
    """
    state = checkpoint.get("state_dict")
    films = [(name, module) for name, module in model.named_modules() if isinstance(module, FilmModule)]
    if not isinstance(state, MutableMapping) or not films:
        return
    order = [str(name) for name in state]
    renamed: dict[str, str] = {}
    if any(name.startswith(PORT_HEADS) for name in order):
        renamed = from_port(state, films)
    match_optimizer_states(model, checkpoint, [renamed.get(name, name) for name in order], is_frozen)
