"""The soft-seg port's layout: its names at the root of a state dict, read and written."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from vlmfilm_plugin.checkpoints.facts import require_reading
from vlmfilm_plugin.checkpoints.soft_seg_reading import GATING, PORT_CONDITIONER, PORT_HEADS, Reading, readings_of
from vlmfilm_plugin.errors import CheckpointError
from vlmfilm_plugin.film.architecture import read_extra_state
from vlmfilm_plugin.film.module import MARKER, FilmModule
from vlmfilm_plugin.log import film_logger
from vlmfilm_plugin.settings.record import FIELDS, Settings

_TRANSFORM = "feature_transform."
_UNBOUNDED = "gamma_scale and beta_scale null, feature_transform none"


def from_port(checkpoint: Mapping[str, Any], films: list[tuple[str, FilmModule]], settings: Settings) -> dict[str, str]:
    """Rename the port's tensors in a checkpoint's state dict to ours, for every FiLM of the model.

    Returns:
        Our name of each tensor that was used, by the port's; the first where several modules use it.

    Raises:
        CheckpointError: its heads act elsewhere than this model's, or do not fit; or nothing says where they act.
    """
    state: MutableMapping[str, Any] = checkpoint["state_dict"]
    readings = readings_of(checkpoint, state, "being loaded")
    require_reading("being loaded", [str(item) for item in readings] if len(readings) > 1 else (), settings)
    port = {str(name): state.pop(name) for name in list(state) if str(name).startswith((PORT_HEADS, PORT_CONDITIONER))}
    renamed: dict[str, str] = {}
    for position, (prefix, film) in enumerate(films):
        film.adopt_transform(())
        _require_place(film, readings)
        expected = film.state_dict()
        translated = {_own_name(name): name for name in port}
        missing = [name for name in expected if name != "_extra_state" and name not in translated]
        wrong = [
            f"{translated[name]} {tuple(port[translated[name]].shape)}, expected {tuple(value.shape)}"
            for name, value in expected.items()
            if name in translated and port[translated[name]].shape != value.shape
        ]
        if missing or wrong:
            raise CheckpointError(
                "cannot load this checkpoint of the soft-seg port: its FiLM does not fit this UNet",
                {"missing": missing or "none", "shapes": wrong or "as expected"},
                "set `decoder_stages` and `model_name` to those it was trained with",
            )
        for own, name in translated.items():
            if own in expected:
                state[f"{prefix}.{own}"] = port[name] if position == 0 else port[name].clone()
                renamed.setdefault(name, f"{prefix}.{own}")
        # The port does not say it; what was checked is the width.
        state[f"{prefix}._extra_state"] = film.get_extra_state()
    unused = [name for name in port if name not in renamed]
    architecture = films[0][1].architecture
    film_logger().warning(
        "[VLM] loaded FiLM weights in the soft-seg port's layout, trained by %s: apply_point=%s decoder_stages=%s, unbounded heads; "
        "the port does not name its encoder, so only the width was checked%s",
        readings[0].trained_by if len(readings) == 1 else "what `apply_point` says, since it has no hyperparameters",
        architecture.apply_point,
        [stage.index for stage in architecture.stages],
        f"; not used here: {', '.join(unused)}" if unused else "",
    )
    _say_gating(checkpoint)
    return renamed


def _say_gating(checkpoint: Mapping[str, Any]) -> None:
    gating = (checkpoint.get("hyper_parameters") or {}).get(GATING)
    if not isinstance(gating, Mapping) or not gating.get("enabled"):
        return
    film_logger().warning(
        "[VLM] its hyperparameters gate FiLM at vessel junctions: %s",
        f"in force as the setting `{GATING}`, unless the run sets that (the port's first version wrote these and did not apply them: for a "
        "checkpoint of that version set it to null)"
        if GATING in FIELDS
        else "not in force, this version does not know them",
    )


def _require_place(film: FilmModule, readings: list[Reading]) -> None:
    """Check that a FiLM acts where the weights were trained to act: shapes alone cannot tell."""
    here = film.architecture.apply_point, tuple(stage.index for stage in film.architecture.stages)
    places = [item for item in readings if item.apply_point == here[0]]
    # Without hyperparameters the stages are the user's affair, the number of heads apart.
    fitting = [item for item in places if item.stages == here[1] or (len(readings) > 1 and len(item.stages) == len(here[1]))]
    bounds = {"gamma_scale": film.architecture.gamma_scale, "beta_scale": film.architecture.beta_scale}
    other = [f"{name}={bound}" for name, bound in bounds.items() if bound is not None]
    if film.architecture.feature_transform:
        other.append(f"feature_transform={','.join(film.architecture.feature_transform)}")
    if fitting and not other:
        return
    built = [f"apply_point={here[0]} decoder_stages={list(here[1])}", *other]
    raise CheckpointError(
        "cannot load this checkpoint of the soft-seg port: its FiLM acts elsewhere, or in another way, than this model's",
        {
            "this model": " ".join(built),
            "expected": " or ".join(f"{item}, {_UNBOUNDED}" for item in readings),
        },
        "build the model with these settings, or let the checkpoint decide them by loading it with `load_from_checkpoint`",
    )


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
    if described:
        stages = [stage["index"] for stage in described["stages"]]
        film_logger().info(
            "[VLM] the port's layout does not say where FiLM acts: these heads act %s at stages %s (there, post_block1 is FlowModelVLMFiLM with "
            "vlm_film_decoder_stages, post_block2 is FlowModel(use_vlm_film=True), which has a head at every stage)",
            described["apply_point"],
            stages,
        )
    if described.get("head", "film") != "film":
        facts = {"found": f"head {described['head']!r}", "expected": "'film', the only one that the port knows"}
        raise CheckpointError("cannot write the port's layout: the port has no such head", facts, "export in the package's own layout")
    if described.get("feature_control", "none") != "none":
        facts = {
            "found": f"feature_control {described['feature_control']}: trained without the condition",
            "expected": "FiLM of each image's own feature",
        }
        raise CheckpointError("cannot write the port's layout: the port has no such control", facts, "export in the package's own layout")
    several = sorted({stage["index"] for stage in described["stages"] if stage.get("block") is not None})
    if several:
        facts = {"found": f"several blocks at stages {several}", "expected": "one block a stage"}
        raise CheckpointError("cannot write the port's layout: the port has one head a stage", facts, "export in the package's own layout")
    scales = {name: described.get(name) for name in ("gamma_scale", "beta_scale")}
    if any(scale is not None for scale in scales.values()):
        film_logger().warning(
            "[VLM] WARNING: these heads are bounded (gamma_scale=%s, beta_scale=%s) and the port's layout does not say so: build the port's heads "
            "with the same scales; this package reads the port's layout as unbounded",
            *scales.values(),
        )
    result: dict[str, Any] = {name: value for name, value in state.items() if MARKER not in name}
    film = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix) and not name.endswith("_extra_state")}
    for own, value in _folded(film, described.get("feature_transform", ())).items():
        result[own.replace("heads.", PORT_HEADS, 1) if own.startswith("heads.") else PORT_CONDITIONER + own] = value
    return result


def _folded(film: Mapping[str, Any], steps: Sequence[str]) -> dict[str, Any]:
    """Return FiLM's tensors for features as they are: the transform is worked into the first layer, W (x - mean) / std + b.

    Raises:
        CheckpointError: the transform is not linear.
    """
    kept = {name: value for name, value in film.items() if not name.startswith(_TRANSFORM)}
    if not steps:
        return kept
    if "l2norm" in steps:
        facts = {"found": f"feature_transform {', '.join(steps)}", "expected": "none, center or standardize: the port takes features as they are"}
        raise CheckpointError("cannot write the port's layout: its first layer cannot hold this transform", facts, "export in the own layout")
    layer = "image_to_cond.proj" if "image_to_cond.proj.weight" in kept else "text_to_cond.mlp.0"
    weight, bias = (kept[f"{layer}.{name}"] for name in ("weight", "bias"))
    mean, std = film[f"{_TRANSFORM}mean"].double(), film.get(f"{_TRANSFORM}std")
    scaled = weight.double() if std is None else weight.double() / std.double()
    folded = {f"{layer}.weight": scaled.to(weight.dtype), f"{layer}.bias": (bias.double() - scaled @ mean).to(bias.dtype)}
    film_logger().info("[VLM] feature_transform %s is worked into %s: the port takes features as they are", ", ".join(steps), layer)
    return kept | folded
