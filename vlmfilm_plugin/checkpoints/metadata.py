"""FiLM in checkpoints: the metadata beside the weights, what a file says before its model is built, and the soft-seg port's layout.

Weights themselves travel in the host's own state dict, under the UNet (`...vlm_film.*`); `FilmModule` checks them when they load.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from torch import nn

from vlmfilm_plugin.checkpoints.facts import GATE_SETTINGS, METADATA, TRAINED_STAGES
from vlmfilm_plugin.checkpoints.optimizer_state import match_optimizer_states
from vlmfilm_plugin.checkpoints.soft_seg_layout import from_port
from vlmfilm_plugin.checkpoints.soft_seg_reading import LATER_ENCODER_SETTINGS, PORT_ENCODER_SETTINGS, PORT_HEADS
from vlmfilm_plugin.film.module import MARKER, FilmModule, film_modules
from vlmfilm_plugin.settings.mode import MODE_VARIABLE
from vlmfilm_plugin.settings.record import Settings

_ENCODER_SETTINGS = dict.fromkeys(
    ["encoder", "revision", "min_pixels", "max_pixels", "prompt_templates", "questionnaire", *PORT_ENCODER_SETTINGS, *LATER_ENCODER_SETTINGS]
)

# For whoever opens a checkpoint that a plain process would not load.
NOTE = (
    f"This checkpoint holds FiLM (the keys with {MARKER!r} in them), which a host by itself reports as unexpected keys. To load it, install "
    f"vlmfilm-plugin and set {MODE_VARIABLE}=off, which gives the host's own output, or on, or shuffle."
)


def write_metadata(model: nn.Module, settings: Settings, checkpoint: MutableMapping[str, Any]) -> None:
    """Add FiLM's metadata to a checkpoint that is about to be saved: under `vlm_film`, and the port's `vlm_film_trained_stages`."""
    films = film_modules(model)
    if not films:
        return
    architecture = films[0].architecture
    # Plain values: a checkpoint is read without objects of ours.
    values = settings.as_dict()
    gate = [name for name in GATE_SETTINGS if settings.is_explicit(name)]
    checkpoint[METADATA] = {
        "architecture": architecture.as_dict(),
        "settings": {name: values[name] for name in (*_ENCODER_SETTINGS, *gate) if name in values},
        "mode": films[0].mode,
        "note": NOTE,
    }
    checkpoint[TRAINED_STAGES] = [stage.index for stage in architecture.stages]


def adapt(model: nn.Module, checkpoint: MutableMapping[str, Any], settings: Settings) -> None:
    """Make a checkpoint fit a model that carries FiLM, before its strict load: the port's names, and the order of optimizer state.

    Args:
        settings: those the model's FiLM was built with. Where they freeze the host, its optimizer holds FiLM's parameters alone.

    Raises:
        CheckpointError: the port's heads do not fit or act elsewhere, or optimizer state cannot be matched to parameters.
    """
    state = checkpoint.get("state_dict")
    films = [(name, module) for name, module in model.named_modules() if isinstance(module, FilmModule)]
    if not isinstance(state, MutableMapping) or not films:
        return
    order = [str(name) for name in state]
    renamed: dict[str, str] = {}
    if any(name.startswith(PORT_HEADS) for name in order):
        renamed = from_port(checkpoint, films, settings)
    match_optimizer_states(model, checkpoint, [renamed.get(name, name) for name in order], settings.freeze_host)
