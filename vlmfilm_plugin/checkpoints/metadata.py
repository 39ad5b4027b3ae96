"""FiLM in checkpoints: the metadata beside the weights, what a file says before its model is built, and the soft-seg port's layout.

Weights themselves travel in the host's own state dict, under the UNet (`...vlm_film.*`); `FilmModule` checks them when they load.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

from torch import nn

from vlmfilm_plugin.checkpoints.facts import GATE_SETTINGS, METADATA, TRAINED_STAGES
from vlmfilm_plugin.checkpoints.optimizer_state import remember_names
from vlmfilm_plugin.checkpoints.soft_seg_layout import from_port
from vlmfilm_plugin.checkpoints.soft_seg_reading import LATER_ENCODER_SETTINGS, PORT_ENCODER_SETTINGS, PORT_HEADS
from vlmfilm_plugin.film.architecture import indices_of
from vlmfilm_plugin.film.module import MARKER, FilmModule, film_modules
from vlmfilm_plugin.settings.mode import MODE_VARIABLE
from vlmfilm_plugin.settings.record import Settings

_ROWS = "rows"
_ENCODER_SETTINGS = dict.fromkeys(
    ["encoder", "revision", "min_pixels", "max_pixels", "prompt_templates", "questionnaire", *PORT_ENCODER_SETTINGS, *LATER_ENCODER_SETTINGS]
)

# For whoever opens a checkpoint that a plain process would not load.
NOTE = (
    f"This checkpoint holds FiLM (the keys with {MARKER!r} in them), which a host by itself reports as unexpected keys. To load it, install "
    f"vlmfilm-plugin and set {MODE_VARIABLE}=off, which gives the host's own output, or on, or shuffle."
)


def write_metadata(model: nn.Module, settings: Settings, checkpoint: MutableMapping[str, Any], rows: str | None = None) -> None:
    """Add FiLM's metadata to a checkpoint that is about to be saved: under `vlm_film`, and the port's `vlm_film_trained_stages`.

    Args:
        rows: the kind of feature it was trained on, where that is known.
    """
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
        **({} if rows is None else {_ROWS: rows}),
    }
    checkpoint[TRAINED_STAGES] = indices_of(architecture.stages)


def rows_in(checkpoint: Mapping[str, Any]) -> object:
    """Return the kind of feature that a checkpoint's FiLM was trained on, as it was recorded; None where it was not."""
    metadata = checkpoint.get(METADATA)
    return metadata.get(_ROWS) if isinstance(metadata, Mapping) else None


def adapt(model: nn.Module, checkpoint: MutableMapping[str, Any], settings: Settings) -> None:
    """Make a checkpoint fit a model that carries FiLM, before its strict load: names of the port's and of compiled modules.

    Args:
        settings: those the model's FiLM was built with.

    Raises:
        CheckpointError: the port's heads do not fit or act elsewhere.
    """
    state = checkpoint.get("state_dict")
    films = [(name, module) for name, module in model.named_modules() if isinstance(module, FilmModule)]
    if not isinstance(state, MutableMapping) or not films:
        return
    as_the_model_names(model, state)
    order = [str(name) for name in state]
    renamed: dict[str, str] = {}
    if any(name.startswith(PORT_HEADS) for name in order):
        renamed = from_port(checkpoint, films, settings)
    remember_names(model, [renamed.get(name, name) for name in order], is_of_port=bool(renamed))


def as_the_model_names(model: nn.Module, state: MutableMapping[str, Any]) -> None:
    """Rename the tensors of a state dict, in place and in order, where they differ from a model's by what wrappers put into names alone."""
    own = [name for name in model.state_dict() if MARKER not in name]
    host = [name for name in state if MARKER not in name]
    wanted, found = {_unwrapped(name): name for name in own}, {_unwrapped(name) for name in host}
    is_unique = len(host) == len(found) == len(own)
    if not host or set(host) == set(own) or found != set(wanted) or not is_unique:
        return
    prefixes = {_unwrapped(name): name for name, module in model.named_modules() if isinstance(module, FilmModule)}

    def renamed(name: str) -> str:
        plain = _unwrapped(name)
        if MARKER not in name:
            return wanted[plain]
        return next((full + plain[len(prefix) :] for prefix, full in prefixes.items() if plain.startswith(f"{prefix}.")), name)

    tensors = [(renamed(name), value) for name, value in state.items()]
    for name in list(state):
        del state[name]
    state.update(tensors)


def _unwrapped(name: str) -> str:
    """Return a name without what `torch.compile` and DistributedDataParallel put into it."""
    return ".".join(part for part in name.split(".") if part not in ("_orig_mod", "module"))
