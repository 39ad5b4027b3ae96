"""The architecture of FiLM in one UNet: what decides the shape and the meaning of its weights, and how two of them are compared.

`Architecture` is the one table of its fields: which setting decides each, and what each may be in a description. No torch: a
checkpoint's description can be read and checked without a model.

What a description promises. Backward: a description of an older format is migrated, format by format, and means what it meant. Forward: a
later format is used where its writer says that this reader understands it (`readable_by`); fields it adds are then named in a warning and
left out, since they change nothing about the weights. Anything else is refused: a later format that says no such thing, and a field that no
format up to this one has.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from vlmfilm_plugin.errors import CheckpointError
from vlmfilm_plugin.log import film_logger
from vlmfilm_plugin.settings.parsing import CONTROLS, are_steps
from vlmfilm_plugin.settings.record import Settings

FORMAT = 4
"""Format of the descriptions that this version writes."""
READABLE_BY = 4
"""The oldest format whose readers understand them: raise it together with `FORMAT` where the weights would mean something else to those."""


@dataclass(frozen=True)
class Stage:
    """A block that carries FiLM: `index` its decoder stage, 0 next to the bottleneck, `path` its place in the UNet, `channels` its C.

    `block` is its place among the blocks of its stage, in order of execution; None where the stage has one.
    """

    index: int
    path: str
    channels: int
    block: int | None = None

    @property
    def label(self) -> str:
        """Return its stage, with its block where there are several: `1`, `0.2`."""
        return str(self.index) if self.block is None else f"{self.index}.{self.block}"

    @property
    def key(self) -> int | str:
        """Return what stands for it in a mapping: the number of its stage, or its label where that has several blocks."""
        return self.index if self.block is None else self.label

    def as_dict(self) -> dict[str, Any]:
        """Return plain values; a block that is alone in its stage as every format had it."""
        plain = {"index": self.index, "path": self.path, "channels": self.channels}
        return plain if self.block is None else plain | {"block": self.block}


def indices_of(stages: Sequence[Stage]) -> list[int]:
    """Return the decoder stages that carry FiLM, each once."""
    return list(dict.fromkeys(stage.index for stage in stages))


def head_names(stages: Sequence[Stage]) -> list[tuple[int, int | None]]:
    """Return where the head of each block stands among the heads: the place of its stage, and its own where the stage has several."""
    places = {index: place for place, index in enumerate(indices_of(stages))}
    return [(places[stage.index], stage.block) for stage in stages]


def is_count(value: object) -> bool:
    """Tell whether a value is a whole number >= 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_stage(value: object) -> bool:
    if not isinstance(value, Mapping) or set(value) - {"block"} != {"index", "path", "channels"}:
        return False
    return isinstance(value["path"], str) and is_count(value["channels"]) and _is_place(value["index"]) and _is_place(value.get("block", 0))


def _is_place(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _are_stages(value: object) -> bool:
    if not isinstance(value, list | tuple) or not value or not all(map(_is_stage, value)):
        return False
    blocks: dict[int, list[int | None]] = {}
    for stage in value:
        blocks.setdefault(stage["index"], []).append(stage.get("block"))
    is_alone = [found == [None] or (len(found) > 1 and found == list(range(len(found)))) for found in blocks.values()]
    return all(is_alone)


def _is_bound(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and value >= 0)


def _says(expected: str, is_valid: Callable[[Any], bool], setting: str | None = None, *, is_encoders: bool = False) -> dict[str, Any]:
    """Return the row of a field: what it may be, the setting that decides it, and whether that setting belongs to the encoder."""
    return {"expected": expected, "is_valid": is_valid, "setting": setting, "is_encoders": is_encoders}


_COUNT = "a whole number >= 1", is_count
_BOUND = "a number >= 0, or null", _is_bound
_FLAG = "true or false", lambda value: isinstance(value, bool)
_TEXT = "text", lambda value: isinstance(value, str)
_STEPS = "a list of steps: center or standardize, and l2norm", lambda value: isinstance(value, list | tuple) and are_steps(value)
_CONTROL = f"none, {', '.join(CONTROLS)}", lambda value: value in ("none", *CONTROLS)
_STAGES = "one or more stages with index, path and channels, and block where a stage has several", _are_stages
_BLOCKS = "all or last", lambda value: value in ("all", "last")


@dataclass(frozen=True)
class Architecture:
    """Everything that decides the shape and the meaning of FiLM's weights; it travels in every checkpoint."""

    stages: tuple[Stage, ...] = field(metadata=_says(*_STAGES, "decoder_stages"))
    apply_point: str = field(metadata=_says(*_TEXT, "apply_point"))
    feature_dim: int = field(metadata=_says(*_COUNT))
    cond_dim: int = field(metadata=_says(*_COUNT, "cond_dim"))
    hidden_dim: int = field(metadata=_says(*_COUNT, "text_mlp_hidden_dim"))
    gamma_scale: float | None = field(metadata=_says(*_BOUND, "gamma_scale"))
    beta_scale: float | None = field(metadata=_says(*_BOUND, "beta_scale"))
    use_layernorm: bool = field(metadata=_says(*_FLAG, "cond_layernorm"))
    is_text: bool = field(metadata=_says(*_FLAG, "use_text_prompt_cond", is_encoders=True))
    head: str = field(default="film", metadata=_says(*_TEXT, "head"))
    feature_transform: tuple[str, ...] = field(default=(), metadata=_says(*_STEPS, "feature_transform"))
    # A control: what takes the place of features.
    feature_control: str = field(default="none", metadata=_says(*_CONTROL, "feature_control"))
    blocks: str = field(default="all", metadata=_says(*_BLOCKS, "blocks"))
    # Of the encoder; a description may lack them.
    fingerprint: str | None = field(default=None, metadata=_says("text, or null", lambda value: value is None or isinstance(value, str)))
    encoder: Mapping[str, object] | None = field(
        default=None, metadata=_says("a mapping, or null", lambda value: value is None or isinstance(value, Mapping))
    )

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, with the format and the oldest format that reads them."""
        return {"format": FORMAT, "readable_by": self._readable_by(), **asdict(self), "stages": [stage.as_dict() for stage in self.stages]}

    def _readable_by(self) -> int:
        """Return the oldest format whose readers give these weights their meaning: one of transforms need not know of blocks, one before neither."""
        if self.blocks != "all" or any(stage.block is not None for stage in self.stages):
            return READABLE_BY
        return 3 if self.feature_transform or self.feature_control != "none" else 2


_FIELDS = {item.name: item for item in fields(Architecture)}
_OF_ENCODER = {"fingerprint", "encoder"}


def decided_by(settings: Settings) -> dict[str, Any]:
    """Return the fields of an `Architecture` that settings decide alone; stages and the feature's width also take a UNet and an encoder."""
    return {name: getattr(settings, item.metadata["setting"]) for name, item in _FIELDS.items() if item.metadata["setting"] and name != "stages"}


def as_settings(description: Mapping[str, Any]) -> dict[str, object]:
    """Return what (a part of) a description says as settings, those of the encoder left out: what builds FiLM of this shape and meaning."""
    named = {item.metadata["setting"]: name for name, item in _FIELDS.items() if item.metadata["setting"] and not item.metadata["is_encoders"]}
    return {setting: _setting_value(name, description[name]) for setting, name in named.items() if name in description}


def _setting_value(name: str, value: Any) -> object:
    return list(dict.fromkeys(stage["index"] for stage in value)) if name == "stages" else value


def read_extra_state(state: Any) -> Mapping[str, Any]:
    """Read the description that a checkpoint holds under `_extra_state`, in the terms of today's format."""
    try:
        content = json.loads(bytes(state.cpu().tolist()))
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            "cannot read the FiLM description in this checkpoint", {"error": error}, "load a checkpoint that this plugin wrote"
        ) from error
    return read_description(content)


def read_description(content: object) -> Mapping[str, Any]:
    """Check a description and bring it to today's format.

    Raises:
        CheckpointError: a format that this version cannot read, an unknown field, a missing one, or a value that no version writes.
    """
    number: Any = content.get("format") if isinstance(content, Mapping) else None
    if not isinstance(content, Mapping) or not is_count(number):
        found = type(content).__name__ if not isinstance(content, Mapping) else f"format {number!r}"
        raise _unusable({"found": found, "expected": f"format 1 to {FORMAT}"}, "load a checkpoint that this plugin wrote")
    description = dict(content)
    oldest = description.get("readable_by", number)
    if number > FORMAT and not (is_count(oldest) and oldest <= FORMAT):
        found = f"format {number}, for readers of format {oldest} or later"
        raise _unusable({"found": found, "expected": f"format 1 to {FORMAT}"}, "update vlmfilm-plugin: a later version wrote it")
    for step in range(number, FORMAT):
        description = _MIGRATIONS[step](description)
    unknown = sorted(str(name) for name in description if name not in {*_FIELDS, "format", "readable_by"})
    if unknown and number <= FORMAT:
        facts = {"found": f"unknown fields {', '.join(unknown)}", "expected": f"fields of format {number}"}
        raise _unusable(facts, "load a checkpoint that this plugin wrote")
    if unknown:
        film_logger().warning(
            "[VLM] WARNING: this checkpoint's FiLM was described by a later version (format %s): not used here, and without effect on its "
            "weights: %s",
            number,
            ", ".join(unknown),
        )
    return {"format": FORMAT, "readable_by": READABLE_BY, **{name: _checked(name, description) for name in _FIELDS}}


def _checked(name: str, description: Mapping[str, Any]) -> Any:
    row = _FIELDS[name].metadata
    if name not in description and name not in _OF_ENCODER:
        raise _unusable({"found": f"no field {name!r}", "expected": row["expected"]}, "load a checkpoint that this plugin wrote")
    value = description.get(name)
    if not row["is_valid"](value):
        raise _unusable({"found": f"{name} {reprlib.repr(value)}", "expected": row["expected"]}, "load a checkpoint that this plugin wrote")
    return value


def _unusable(facts: Mapping[str, object], fix: str) -> CheckpointError:
    return CheckpointError("cannot use this checkpoint's FiLM: its description cannot be understood", facts, fix)


# From a format to the next: what a description of that format meant, in the terms of the next.
_MIGRATIONS: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    # Format 1 said nothing of its readers, and knew one kind of head.
    1: lambda description: {**description, "format": 2, "readable_by": 1, "head": "film"},
    # Up to format 2 features were used as they are.
    2: lambda description: {**description, "format": 3, "readable_by": 2, "feature_transform": [], "feature_control": "none"},
    # Up to format 3 a stage was one block.
    3: lambda description: {**description, "format": 4, "blocks": "all"},
}


def check_architecture(found: Mapping[str, Any], expected: Architecture, former: Sequence[str] = ()) -> None:
    """Compare a checkpoint's FiLM (`read_extra_state`) with the FiLM of this run.

    Args:
        former: fingerprints that the encoder of this run had in earlier versions.

    Raises:
        CheckpointError: another encoder (both fingerprints are shown) or another architecture (the differing values are shown).
    """
    wanted = json.loads(json.dumps(expected.as_dict()))
    if found.get("fingerprint") and wanted["fingerprint"] and found["fingerprint"] not in (wanted["fingerprint"], *former):
        raise CheckpointError(
            "cannot load this checkpoint: its FiLM was trained on the features of another encoder",
            {
                "checkpoint": f"{found['fingerprint']}   {_brief(found.get('encoder'))}",
                "this run": f"{wanted['fingerprint']}   {_brief(wanted.get('encoder'))}",
            },
            "set `encoder`, `model_name` and the prompt and pixel settings to those of the checkpoint",
        )
    differing = [name for name in _FIELDS if name not in _OF_ENCODER and found.get(name) != wanted[name]]
    if differing:
        facts = {name: f"{_brief(found.get(name))} in the checkpoint, {_brief(wanted[name])} in this run" for name in differing}
        raise CheckpointError(
            "cannot load this checkpoint: its FiLM has another architecture",
            facts,
            f"build the model with the checkpoint's settings: {_written_as_settings(found, differing)}",
        )


def _brief(value: object) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return ", ".join(f"{Stage(**item).label} ({item['path']}, {item['channels']} channels)" for item in value)
    if isinstance(value, dict):
        return " ".join(f"{key}={item}" for key, item in value.items() if key in {"mode", "model", "prompt"} and item)
    return str(value)


def _written_as_settings(found: Mapping[str, Any], differing: Sequence[str]) -> str:
    named = [(_FIELDS[name].metadata["setting"], name) for name in differing if _FIELDS[name].metadata["setting"]]
    parts = [f"{setting}={_setting_value(name, found[name])}" for setting, name in named]
    return ", ".join(parts) or "the encoder it was trained with"
