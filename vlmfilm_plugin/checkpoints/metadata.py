"""FiLM in checkpoints: the metadata beside the weights, what a file says before its model is built, and the soft-seg port's layout.

Weights themselves travel in the host's own state dict, under the UNet (`...vlm_film.*`); `FilmModule` checks them when they load.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlmfilm_plugin.film.architecture import read_extra_state
from vlmfilm_plugin.errors import CheckpointError
from vlmfilm_plugin.film.module import MARKER, FilmModule, film_modules
from vlmfilm_plugin.log import film_logger
from vlmfilm_plugin.settings.record import Settings

METADATA = "vlm_film"
TRAINED_STAGES = "vlm_film_trained_stages"
PORT_HEADS, PORT_CONDITIONER = "vlm_film_heads.", "vlm_film_conditioner."

# Settings that say which features a checkpoint was trained on, and those that say what was built on top of them.
_PORT_ENCODER_SETTINGS = ("model_name", "use_text_prompt_cond", "prompt_template", "max_new_tokens", "pool")
_ENCODER_SETTINGS = ("encoder", "revision", "min_pixels", "max_pixels", "prompt_templates", "questionnaire", *_PORT_ENCODER_SETTINGS)


@dataclass(frozen=True)
class CheckpointFacts:
    """What a checkpoint says of its FiLM: settings of its encoder (explicit settings win) and of its architecture (these win)."""

    path: str
    encoder: Mapping[str, object] = field(default_factory=dict)
    architecture: Mapping[str, object] = field(default_factory=dict)


def write_metadata(model: nn.Module, settings: Settings, checkpoint: MutableMapping[str, Any]) -> None:
    """Add FiLM's metadata to a checkpoint that is about to be saved: under `vlm_film`, and the port's `vlm_film_trained_stages`."""
    films = film_modules(model)
    if not films:
        return
    architecture = films[0].architecture
    checkpoint[METADATA] = {
        "architecture": architecture.as_dict(),
        "settings": {name: getattr(settings, name) for name in _ENCODER_SETTINGS},
        "mode": films[0].mode,
    }
    checkpoint[TRAINED_STAGES] = [stage.index for stage in architecture.stages]


def peek(path: object, *, weights_only: bool = False) -> CheckpointFacts | None:
    """Read what a checkpoint file says of its FiLM, without its tensors; None for a plain baseline, or what is no local file.

    Args:
        weights_only: the host is about to load the file with this flag: where it is set, no object is unpickled here either.
    """
    if not isinstance(path, str | Path) or not Path(path).is_file():
        return None
    content = None
    # Checkpoints of Lightning may hold objects; mmap leaves the tensors on disk, but cannot read torch's old format.
    for is_safe, mmap in ((True, True), (True, False), (False, True), (False, False)):
        if weights_only and not is_safe:
            return None
        try:
            content = torch.load(path, map_location="cpu", weights_only=is_safe, mmap=mmap)
            break
        except (RuntimeError, pickle.UnpicklingError):
            continue
    return facts_of(content, str(path)) if isinstance(content, Mapping) else None


def facts_of(checkpoint: Mapping[str, Any], path: str) -> CheckpointFacts | None:
    """Return what a loaded checkpoint says of its FiLM; None for a plain baseline."""
    state = checkpoint.get("state_dict", checkpoint)
    if METADATA in checkpoint:
        metadata = checkpoint[METADATA]
        return CheckpointFacts(path, metadata["settings"], _architecture_settings(metadata["architecture"]))
    if any(str(name).startswith(PORT_HEADS) for name in state):
        return _port_facts(checkpoint, state, path)
    extra = next((value for name, value in state.items() if str(name).endswith(f"{MARKER}_extra_state")), None)
    return None if extra is None else CheckpointFacts(path, {}, _architecture_settings(read_extra_state(extra)))


def _architecture_settings(architecture: Mapping[str, Any]) -> dict[str, object]:
    return {
        "decoder_stages": [stage["index"] for stage in architecture["stages"]],
        "apply_point": architecture["apply_point"],
        "cond_dim": architecture["cond_dim"],
        "text_mlp_hidden_dim": architecture["hidden_dim"],
        "gamma_scale": architecture["gamma_scale"],
        "beta_scale": architecture["beta_scale"],
        "cond_layernorm": architecture["use_layernorm"],
    }


def _port_facts(checkpoint: Mapping[str, Any], state: Mapping[str, Any], path: str) -> CheckpointFacts:
    hyperparameters = checkpoint.get("hyper_parameters", {})
    config = hyperparameters.get("vlm_film_config") or {}
    first = state.get(f"{PORT_HEADS}0.mlp.0.weight")
    if first is None:
        raise CheckpointError(
            "cannot read this checkpoint's FiLM",
            {"checkpoint": path, "found": f"keys under {PORT_HEADS!r}, but no {PORT_HEADS}0.mlp.0.weight", "expected": "the soft-seg port's layout"},
            "load a checkpoint that the port or this plugin wrote",
        )
    stages = checkpoint.get(TRAINED_STAGES) or hyperparameters.get("vlm_film_decoder_stages")
    architecture: dict[str, object] = {
        "decoder_stages": list(stages) if stages else None,
        "cond_dim": first.shape[1],
        "text_mlp_hidden_dim": first.shape[0],
        # The port's checkpoints were trained with the unbounded form, whatever their config says.
        "gamma_scale": None,
        "beta_scale": None,
        "cond_layernorm": f"{PORT_HEADS}0.ln.weight" in state,
    }
    encoder = {name: config[name] for name in _PORT_ENCODER_SETTINGS if config.get(name) is not None}
    return CheckpointFacts(path, encoder, architecture)


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
        renamed = _from_port(state, films)
    _match_optimizer_states(model, checkpoint, [renamed.get(name, name) for name in order], is_frozen)


def _from_port(state: MutableMapping[str, Any], films: list[tuple[str, FilmModule]]) -> dict[str, str]:
    port = {str(name): state.pop(name) for name in list(state) if str(name).startswith((PORT_HEADS, PORT_CONDITIONER))}
    renamed: dict[str, str] = {}
    for position, (prefix, film) in enumerate(films):
        expected = film.state_dict()
        translated = {_own_name(name): name for name in port}
        missing = [name for name in expected if name != "_extra_state" and name not in translated]
        wrong = [
            f"{translated[name]} {tuple(port[translated[name]].shape)}, expected {tuple(value.shape)}"
            for name, value in expected.items()
            if name in translated and port[translated[name]].shape != value.shape
        ]
        heads = sum(name.startswith(PORT_HEADS) and name.endswith("mlp.0.weight") for name in port)
        if missing or wrong or heads != len(film.heads):
            raise CheckpointError(
                "cannot load this checkpoint of the soft-seg port: its FiLM does not fit this UNet",
                {"heads": f"{heads}, expected {len(film.heads)}", "missing": missing or "none", "shapes": wrong or "as expected"},
                "set `decoder_stages` and `model_name` to those it was trained with",
            )
        for own, name in translated.items():
            if own in expected:
                state[f"{prefix}.{own}"] = port[name] if position == 0 else port[name].clone()
                renamed.setdefault(name, f"{prefix}.{own}")
    unused = [name for name in port if name not in renamed]
    film_logger().warning(
        "[VLM] loaded FiLM weights in the soft-seg port's layout (unbounded heads); "
        "the port does not name its encoder, so only the width was checked%s",
        f"; not used here: {', '.join(unused)}" if unused else "",
    )
    return renamed


def _own_name(port_name: str) -> str:
    if port_name.startswith(PORT_HEADS):
        return "heads." + port_name[len(PORT_HEADS) :]
    return port_name[len(PORT_CONDITIONER) :]


def to_port_layout(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict in the soft-seg port's layout: FiLM of the first UNet at the root, everything else as it is.

    Raises:
        CheckpointError: the state dict holds no FiLM.
    """
    prefix = next((name[: name.index(MARKER) + len(MARKER)] for name in state if MARKER in name), None)
    if prefix is None:
        facts = {"keys": len(state), "expected": f"keys with {MARKER!r} in them"}
        raise CheckpointError("cannot write the port's layout: this state dict holds no FiLM", facts, "give the state dict of a FiLM run")
    described = read_extra_state(state[f"{prefix}_extra_state"]) if f"{prefix}_extra_state" in state else {}
    scales = {name: described.get(name) for name in ("gamma_scale", "beta_scale")}
    if any(scale is not None for scale in scales.values()):
        film_logger().warning(
            "[VLM] WARNING: these heads are bounded (gamma_scale=%s, beta_scale=%s) and the port's layout does not say so: build the port's heads "
            "with the same scales; this package reads the port's layout as unbounded",
            *scales.values(),
        )
    result: dict[str, Any] = {name: value for name, value in state.items() if MARKER not in name}
    for name, value in state.items():
        if name.startswith(prefix) and not name.endswith("_extra_state"):
            own = name[len(prefix) :]
            result[own.replace("heads.", PORT_HEADS, 1) if own.startswith("heads.") else PORT_CONDITIONER + own] = value
    return result


def _match_optimizer_states(model: nn.Module, checkpoint: MutableMapping[str, Any], saved_order: list[str], is_frozen: bool) -> None:
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
