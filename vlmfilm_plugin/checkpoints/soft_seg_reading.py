"""How a checkpoint of the soft-seg port is to be read: which of its two models trained it, and so where its FiLM acts.

Both write the same tensor names and shapes. `FlowModelVLMFiLM` modulates after block1, at the stages it was given; `FlowModel(use_vlm_film=
True)` after block2, at every stage. Only the hyperparameters tell them apart: the first has two arguments that the second has not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vlmfilm_plugin.checkpoints.facts import TRAINED_STAGES, CheckpointFacts
from vlmfilm_plugin.errors import CheckpointError
from vlmfilm_plugin.film.architecture import as_settings
from vlmfilm_plugin.settings.record import FIELDS

PORT_HEADS, PORT_CONDITIONER = "vlm_film_heads.", "vlm_film_conditioner."

# Settings that say which features a checkpoint was trained on, under the port's names.
PORT_ENCODER_SETTINGS = ("model_name", "use_text_prompt_cond", "prompt_template", "max_new_tokens", "pool")
# Those that only some of its versions have, and that count here where the record of settings knows them.
LATER_ENCODER_SETTINGS = (
    "prompt_templates",
    "use_logits_feature_cond",
    "logits_feature_mode",
    "logits_logit_temp",
    "logits_center",
    "logits_l2norm",
    "logits_include_unknown",
    "input_mode",
)
GATING = "junction_gating_config"
_FILM_ARGUMENTS = ("vlm_film_decoder_stages", GATING)
_DEFAULT_STAGES = (0, 1)


@dataclass(frozen=True)
class Reading:
    """What trained a checkpoint of the port, where its FiLM acts, and at which stages."""

    trained_by: str
    apply_point: str
    stages: tuple[int, ...]

    def __str__(self) -> str:
        """Return it in the words of a log line."""
        return f"{self.trained_by}: apply_point={self.apply_point} decoder_stages={list(self.stages)}"


def readings_of(checkpoint: Mapping[str, Any], state: Mapping[str, Any], path: str) -> list[Reading]:
    """Return the readings that a checkpoint's hyperparameters allow: one, or both where it has none.

    Raises:
        CheckpointError: its heads fit no reading.
    """
    widths = _widths(state, path)
    hyperparameters = checkpoint.get("hyper_parameters") or {}
    if not isinstance(hyperparameters, Mapping):
        raise _unfit(path, f"hyper_parameters of type {type(hyperparameters).__name__}", "a mapping")
    has_film_arguments = any(name in hyperparameters for name in _FILM_ARGUMENTS)
    is_direct = not has_film_arguments and bool(hyperparameters.get("use_vlm_film"))
    every = tuple(range(len(widths)))
    readings = []
    if not is_direct:
        # The port itself trusts what it trained over what it was asked for.
        asked = checkpoint.get(TRAINED_STAGES) or hyperparameters.get("vlm_film_decoder_stages")
        # With no hyperparameters null cannot be told from a list that is lost: as many stages as heads, from the bottleneck on.
        stages = _stages(asked, path) if asked is not None else _DEFAULT_STAGES if has_film_arguments else every
        readings.append(Reading("FlowModelVLMFiLM (FiLM after block1)", "post_block1", stages))
    if not has_film_arguments:
        readings.append(Reading("FlowModel(use_vlm_film=True) (FiLM after block2)", "post_block2", every))
    return [_fitted(reading, widths, _decoder_channels(hyperparameters), path) for reading in readings]


def _fitted(reading: Reading, widths: list[int], channels: list[int] | None, path: str) -> Reading:
    """Leave out stages beyond the decoder's depth, which got no head in the port, and check that each other stage has its own."""
    stages = reading.stages[: len(widths)] if channels is None else tuple(index for index in reading.stages if index < len(channels))
    expected = widths if channels is None else [channels[index] for index in stages]
    if len(stages) != len(widths) or expected != widths:
        facts = f"{len(stages)} heads, of {expected} channels, for {reading}"
        raise _unfit(path, f"{len(widths)} heads, of {widths} channels", facts)
    return replace(reading, stages=stages)


def _decoder_channels(hyperparameters: Mapping[str, Any]) -> list[int] | None:
    """Return the channels of the decoder's stages from the bottleneck on, where the hyperparameters say them."""
    base, factors = hyperparameters.get("model_channels"), hyperparameters.get("channel_mult")
    if not isinstance(base, int) or not isinstance(factors, Sequence) or not all(isinstance(factor, int) for factor in factors):
        return None
    return [base * factor for factor in factors][::-1]


def port_facts(checkpoint: Mapping[str, Any], state: Mapping[str, Any], path: str) -> CheckpointFacts:
    """Return what a checkpoint of the port says of its FiLM.

    Raises:
        CheckpointError: its heads fit no reading.
    """
    readings = readings_of(checkpoint, state, path)
    hyperparameters = checkpoint.get("hyper_parameters") or {}
    config = hyperparameters.get("vlm_film_config") or {}
    first = state[f"{PORT_HEADS}0.mlp.0.weight"]
    described: dict[str, Any] = {
        "cond_dim": first.shape[1],
        "hidden_dim": first.shape[0],
        # The port's checkpoints were trained with the unbounded form, whatever their config says.
        "gamma_scale": None,
        "beta_scale": None,
        "use_layernorm": f"{PORT_HEADS}0.ln.weight" in state,
        "head": "film",
        "feature_transform": [],
    }
    architecture = as_settings(described)
    if len(readings) == 1:
        architecture |= {"decoder_stages": list(readings[0].stages), "apply_point": readings[0].apply_point}
    names = [*PORT_ENCODER_SETTINGS, *(name for name in LATER_ENCODER_SETTINGS if name in FIELDS)]
    encoder = {name: config[name] for name in names if config.get(name) is not None}
    return CheckpointFacts(path, encoder, architecture, _gate(hyperparameters), [] if len(readings) == 1 else [str(item) for item in readings])


def _gate(hyperparameters: Mapping[str, Any]) -> Mapping[str, object]:
    gating = hyperparameters.get(GATING)
    return {GATING: dict(gating)} if isinstance(gating, Mapping) and GATING in FIELDS else {}


def _stages(asked: Any, path: str) -> tuple[int, ...]:
    is_list = isinstance(asked, Sequence) and not isinstance(asked, str)
    if not is_list or not asked or not all(isinstance(index, int) and not isinstance(index, bool) and index >= 0 for index in asked):
        raise _unfit(path, f"decoder stages {asked!r}", "a list of whole numbers >= 0, or null")
    return tuple(sorted(asked))


def _widths(state: Mapping[str, Any], path: str) -> list[int]:
    """Return the channels of each head that a state dict of the port holds; all have one width of condition and of hidden layer."""
    names = [str(name) for name in state if str(name).startswith(PORT_HEADS)]
    indices = {match.group(1) for name in names if (match := re.fullmatch(r"(\d+)\..+", name[len(PORT_HEADS) :]))}
    expected = [f"{PORT_HEADS}{index}.mlp.{layer}.weight" for index in range(len(indices)) for layer in (0, 2)]
    missing = [name for name in expected if len(getattr(state.get(name), "shape", ())) != 2]
    if not indices or missing:
        raise _unfit(path, f"heads {', '.join(sorted(indices)) or 'without a number'}", f"{missing[0] if missing else PORT_HEADS + '0'}, a matrix")
    inner = {tuple(state[name].shape) for name in expected[::2]}
    outer = [tuple(state[name].shape) for name in expected[1::2]]
    if len(inner) > 1 or any(rows % 2 or hidden != next(iter(inner))[0] for rows, hidden in outer):
        raise _unfit(path, f"layers of {sorted(inner)} and {outer}", "one width of condition and hidden layer, and two values a channel")
    return [rows // 2 for rows, _ in outer]


def _unfit(path: str, found: str, expected: str) -> CheckpointError:
    return CheckpointError(
        "cannot read this checkpoint of the soft-seg port: its FiLM fits neither of the port's models",
        {"checkpoint": path, "found": found, "expected": expected},
        "load a checkpoint that the port or this plugin wrote",
    )
