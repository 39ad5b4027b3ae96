"""The soft-seg port's layout: its names at the root of a state dict, read and written."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

from vlmfilm_plugin.checkpoints.facts import TRAINED_STAGES, CheckpointFacts
from vlmfilm_plugin.errors import CheckpointError
from vlmfilm_plugin.film.architecture import read_extra_state
from vlmfilm_plugin.film.module import MARKER, FilmModule
from vlmfilm_plugin.log import film_logger

PORT_HEADS, PORT_CONDITIONER = "vlm_film_heads.", "vlm_film_conditioner."

# Settings that say which features a checkpoint was trained on, and those that say what was built on top of them.
PORT_ENCODER_SETTINGS = ("model_name", "use_text_prompt_cond", "prompt_template", "max_new_tokens", "pool")


def port_facts(checkpoint: Mapping[str, Any], state: Mapping[str, Any], path: str) -> CheckpointFacts:
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
        "head": "film",
    }
    encoder = {name: config[name] for name in PORT_ENCODER_SETTINGS if config.get(name) is not None}
    return CheckpointFacts(path, encoder, architecture)


def from_port(state: MutableMapping[str, Any], films: list[tuple[str, FilmModule]]) -> dict[str, str]:
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
    if described.get("head", "film") != "film":
        facts = {"found": f"head {described['head']!r}", "expected": "'film', the only one that the port knows"}
        raise CheckpointError("cannot write the port's layout: the port has no such head", facts, "export in the package's own layout")
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
