"""What a checkpoint says of its FiLM, as settings: the record, the keys it stands under, and how it meets the settings of a run."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vlmfilm_plugin.errors import CheckpointError
from vlmfilm_plugin.log import film_logger
from vlmfilm_plugin.settings.layers import Layer, layers_of, resolve
from vlmfilm_plugin.settings.mode import PREFIX
from vlmfilm_plugin.settings.record import ALIASES, FIELDS, Settings

METADATA = "vlm_film"
TRAINED_STAGES = "vlm_film_trained_stages"
GATE_SETTINGS = ("spatial_gate", "junction_gating_config")
"""Settings of where FiLM acts within an image; the record may not know all of them."""


@dataclass(frozen=True)
class CheckpointFacts:
    """What a checkpoint says of its FiLM.

    Attributes:
        encoder: settings of its encoder; explicit settings win.
        gate: settings of where FiLM acts within an image; explicit settings win.
        architecture: settings of what was built on top of the features; these win.
        readings: where nothing says where FiLM acts, what it may be; `apply_point` must then be set.
    """

    path: str
    encoder: Mapping[str, object] = field(default_factory=dict)
    architecture: Mapping[str, object] = field(default_factory=dict)
    gate: Mapping[str, object] = field(default_factory=dict)
    readings: Sequence[str] = ()

    @property
    def origin(self) -> str:
        """Return the name of its layers of settings."""
        return f"checkpoint {self.path}"


def known_settings(recorded: object, origin: str) -> dict[str, object]:
    """Return the recorded settings that this version knows, and say once which it does not: another version's are no error.

    What decides features is checked by the encoder's fingerprint when the weights load.
    """
    if not isinstance(recorded, Mapping):
        facts = {"checkpoint": origin, "found": type(recorded).__name__, "expected": "a mapping of settings"}
        raise CheckpointError("cannot use this checkpoint's FiLM: its settings cannot be read", facts, "load a checkpoint that this plugin wrote")
    unknown = sorted(str(name) for name in recorded if name not in FIELDS and name not in ALIASES)
    if unknown:
        film_logger().warning(
            "[VLM] WARNING: %s records settings that this version does not know: %s; they are not used, and its encoder is checked by fingerprint",
            origin,
            ", ".join(unknown),
        )
    return {str(name): value for name, value in recorded.items() if str(name) not in unknown}


def resolve_with(
    facts: CheckpointFacts | None,
    environ: Mapping[str, str],
    base_dir: str | Path | None = None,
    *,
    host: Mapping[str, object] | None = None,
    arguments: Mapping[str, object] | None = None,
) -> Settings:
    """Resolve the settings of a run (`settings.layers.layers_of`) with what a checkpoint says.

    A setting of the run that loses against the checkpoint is named in one line.

    Raises:
        CheckpointError: the checkpoint can be read in several ways, and nothing given says which.
    """
    layers = layers_of(environ, base_dir, recorded=facts, host=host, arguments=arguments)
    settings = resolve(layers, base_dir)
    if facts is None:
        return settings
    require_reading(facts.path, facts.readings, settings)
    asked = resolve([_only(layer, facts.architecture) for layer in layers if layer[1] is not facts.architecture], base_dir)
    lost = [name for name in facts.architecture if asked.is_explicit(name) and getattr(asked, name) != getattr(settings, name)]
    for name in lost:
        film_logger().warning(
            "[VLM] WARNING: %s=%s is not used (from %s): the FiLM of %s was trained with %s",
            name,
            _written(getattr(asked, name)),
            asked.origin(name),
            facts.path,
            _written(getattr(settings, name)),
        )
    return settings


def _only(layer: Layer, names: Container[str]) -> Layer:
    origin, values = layer
    plain = {raw: str(raw).removeprefix(PREFIX).lower() for raw in values}
    return origin, {raw: values[raw] for raw, name in plain.items() if ALIASES.get(name, name) in names}


def require_reading(path: str, readings: Sequence[str], settings: Settings) -> None:
    """Check that `apply_point` is set where a checkpoint leaves it open.

    Raises:
        CheckpointError: it is not; both readings are named.
    """
    if readings and not settings.is_explicit("apply_point"):
        raise CheckpointError(
            "cannot load this checkpoint of the soft-seg port: nothing in it says where its FiLM acts",
            {"checkpoint": path, **{f"reading {number}": reading for number, reading in enumerate(readings, 1)}, "expected": "its hyperparameters"},
            "set `apply_point` (and `decoder_stages`) to what it was trained with",
        )


def _written(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
