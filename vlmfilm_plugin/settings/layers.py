"""The one order of precedence: layers of values, weakest first, merged into `Settings`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple, Protocol

from vlmfilm_plugin.errors import SettingsError
from vlmfilm_plugin.settings.junctions import JunctionGating, parse_junctions
from vlmfilm_plugin.settings.mode import CONFIG_VARIABLE, NOT_SETTINGS, PREFIX
from vlmfilm_plugin.settings.parsing import PARSERS, BadEntries, EnvText, check, describe
from vlmfilm_plugin.settings.port_names import ACCEPTED, refuse_drawn_predictions
from vlmfilm_plugin.settings.record import ALIASES, FIELDS, PRESETS, Settings
from vlmfilm_plugin.settings.yaml_file import read_mapping

# A layer: where the values come from, and the values.
Layer = tuple[str, Mapping[str, object]]

PARSERS["junctions"] = parse_junctions


class Level(NamedTuple):
    """One rank of precedence: its name, and the words for it in the documentation."""

    name: str
    words: str


# Weakest first. Everything that puts settings together asks `layers_of`, which goes by this list; `resolve` fills in the first two.
ORDER = (
    Level("default", "default"),
    Level("preset", "`preset`"),
    Level("checkpoint's encoder", "the encoder recorded in the checkpoint being loaded"),
    Level("host config", "the host's YAML"),
    Level("file", "the YAML file named by `VLM_FILM_CONFIG`"),
    Level("environment", "the environment (`VLM_FILM_<NAME>`)"),
    Level("argument", "arguments of `attach`"),
    Level(
        "checkpoint's architecture", "for what was built on top of the features (stages, widths, scales, apply point), the checkpoint being loaded"
    ),
)


class Recorded(Protocol):
    """What a checkpoint says, as settings: `encoder` and `gate` are defaults, `architecture` is law."""

    @property
    def origin(self) -> str: ...

    @property
    def encoder(self) -> Mapping[str, object]: ...

    @property
    def gate(self) -> Mapping[str, object]: ...

    @property
    def architecture(self) -> Mapping[str, object]: ...


def layers_of(
    environ: Mapping[str, str],
    base_dir: str | Path | None = None,
    *,
    recorded: Recorded | None = None,
    host: Mapping[str, object] | None = None,
    arguments: Mapping[str, object] | None = None,
) -> list[Layer]:
    """Return the layers of a run, weakest first.

    Args:
        environ: names the file of `VLM_FILM_CONFIG`, and holds the `VLM_FILM_<NAME>` variables.
        base_dir: what that file's path is relative to; default: the working directory.
        recorded: what the checkpoint being loaded says.
        host: settings in the host's own configuration.
        arguments: settings that a caller gives by name.

    Raises:
        SettingsError: the file cannot be read, or is not a mapping.
    """
    found: dict[str, list[Layer]] = {"file": _of_file(environ, base_dir), "environment": _of_environment(environ)}
    if recorded is not None:
        origin = recorded.origin
        found["checkpoint's encoder"] = [(origin, recorded.encoder), (origin, recorded.gate)]
        found["checkpoint's architecture"] = [(origin, recorded.architecture)]
    found |= {name: [(name, values)] for name, values in (("host config", host), ("argument", arguments)) if values is not None}
    return [layer for level in ORDER for layer in found.get(level.name, ())]


def _of_file(environ: Mapping[str, str], base_dir: str | Path | None) -> list[Layer]:
    if CONFIG_VARIABLE not in environ:
        return []
    path = environ[CONFIG_VARIABLE]
    file = Path(base_dir or Path.cwd()) / _expand(path, CONFIG_VARIABLE, "environment")
    return [(path, read_mapping(file, f"the file of {CONFIG_VARIABLE}", "write one `name: value` a line"))]


def _of_environment(environ: Mapping[str, str]) -> list[Layer]:
    names = sorted(name for name in environ if name.startswith(PREFIX) and name not in NOT_SETTINGS)
    return [("environment", {name: EnvText(environ[name])}) for name in names]


def resolve(layers: Iterable[Layer], base_dir: str | Path | None = None) -> Settings:
    """Merge layers, weakest first, into `Settings`.

    Args:
        layers: (origin, values) pairs; names may be aliases of the soft-seg port.
        base_dir: what relative paths are relative to; default: the working directory.

    Raises:
        SettingsError: unknown names (each with the closest legal one) or bad values, all of them at once; the message names the origins.
    """
    values: dict[str, object] = {}
    origins: dict[str, str] = {}
    accepted: dict[str, str] = {}
    wrong: list[_Wrong] = []
    for origin, mapping in layers:
        for raw_name, raw in mapping.items():
            try:
                name = _known_name(raw_name, origin)
                if name in ACCEPTED:
                    accepted[name] = f"{origin}: {raw_name}"
                else:
                    values[name], origins[name] = _coerce(name, raw, origin), f"{origin}: {raw_name}"
            except _Wrong as error:
                wrong.append(error)
    if wrong:
        raise _refusal(wrong)
    preset = values.get("preset")
    for name, raw in PRESETS.get(str(preset), {}).items():
        if name not in values:
            values[name], origins[name] = raw, f"preset {preset}"
    root = Path(base_dir or Path.cwd())
    for name in (*(name for name, item in FIELDS.items() if item.metadata["kind"] == "path"), "questionnaire"):
        value = values.get(name, FIELDS[name].default)
        # A questionnaire is a path only where it says so; otherwise it names a shipped one.
        if value is not None and (name != "questionnaire" or str(value).endswith((".yaml", ".yml"))):
            values[name] = str(root / _expand(str(value), name, origins.get(name, "default")))
    model = values.get("model_name")
    # A hub name stays one: only a folder that is there is a path, and the host may change its working directory.
    if model is not None and (folder := root / _expand(str(model), "model_name", origins["model_name"])).is_dir():
        values["model_name"] = str(folder)
    _map_transform_of_port(values, origins)
    settings = Settings(**values, origins=origins, accepted=accepted)  # type: ignore[arg-type]
    refuse_drawn_predictions(settings)
    _check_gate(settings)
    return settings


def _map_transform_of_port(values: dict[str, object], origins: dict[str, str]) -> None:
    """Say the port's `logits_center` and `logits_l2norm` as steps of `feature_transform`, where its answers are asked.

    The port centres, then normalises: where it does both, both are done here after the feature, and the stored one is as the model gave it.
    """
    if not Settings(**values).are_answers_asked:  # type: ignore[arg-type]
        return
    if "logits_center" in values and "feature_transform" not in values:
        steps = ["center", "l2norm"] if values.get("logits_l2norm") else ["center"]
        values["feature_transform"] = tuple(steps) if values["logits_center"] else ()
        origins["feature_transform"] = origins["logits_center"]
    if values.get("logits_center") and "l2norm" in values.get("feature_transform", ()):  # type: ignore[operator]
        values["logits_l2norm"] = False


class _Wrong(Exception):
    """One name or value that cannot be used: the error of it alone, and its line among others."""

    def __init__(self, error: SettingsError, label: str, text: str) -> None:
        super().__init__(str(error))
        self.error, self.label, self.text = error, label, text


def _refusal(wrong: list[_Wrong]) -> SettingsError:
    if len(wrong) == 1:
        return wrong[0].error
    # Two layers may hold the same wrong name.
    facts = {
        f"{item.label} ({number})" if item.label in {other.label for other in wrong[: number - 1]} else item.label: item.text
        for number, item in enumerate(wrong, 1)
    }
    return SettingsError(f"cannot use {len(wrong)} settings", facts, "correct each of them, or take it out")


def _known_name(raw: object, origin: str) -> str:
    name = str(raw)
    if origin == "environment":
        name = name[len(PREFIX) :].lower()
    name = ALIASES.get(name, name)
    if name in FIELDS or name in ACCEPTED:
        return name
    closest = get_close_matches(name, [*FIELDS, *ALIASES], n=1)
    spelt = f"{PREFIX}{closest[0].upper()}" if closest and origin == "environment" else (closest[0] if closest else None)
    error = SettingsError(
        "cannot use a setting: unknown name",
        {"found": f"{raw!r}   (from {origin})", **({"closest": repr(spelt)} if spelt else {})},
        f"write {spelt!r}, or take it out" if spelt else f"take it out; legal names: {', '.join(FIELDS)}",
    )
    raise _Wrong(error, str(raw), f"unknown name   (from {origin})" + (f", closest {spelt!r}" if spelt else ""))


def _coerce(name: str, raw: object, origin: str) -> object:
    rules = FIELDS[name].metadata
    spelt = f"{PREFIX}{name.upper()}" if origin == "environment" else name
    try:
        return check(rules, raw, isinstance(raw, EnvText))
    except BadEntries as bad:
        facts = {f"{name}.{entry}": text for entry, text in bad.entries.items()}
        error = SettingsError(f"cannot use setting `{name}`: bad entries", {**facts, "from": origin}, f"correct them in {spelt}, or take it out")
        raise _Wrong(error, spelt, f"{bad}   (from {origin})") from bad
    except (TypeError, ValueError, OverflowError) as bad:
        found, expected = f"{raw!r}   (from {origin})", describe(rules)
        error = SettingsError(f"cannot use setting `{name}`: bad value", {"found": found, "expected": expected}, f"correct {spelt}, or take it out")
        raise _Wrong(error, spelt, f"{found}, expected {expected}") from bad


def _check_gate(settings: Settings) -> None:
    """Refuse a junction block beside a gate of another name, and gated stages that carry no FiLM."""
    block = settings.junction_gating_config
    if not isinstance(block, JunctionGating) or not block.enabled:
        return
    origin = settings.origin("junction_gating_config")
    if settings.gate_name != "vessel_junctions":
        facts = {
            "found": f"spatial_gate {settings.spatial_gate!r}   (from {settings.origin('spatial_gate')})",
            "and": f"an enabled block   (from {origin})",
        }
        raise SettingsError("cannot use `junction_gating_config` with another spatial gate", facts, "take one of them out")
    extra = sorted(set(block.apply_stages or ()) - set(settings.decoder_stages or block.apply_stages or ()))
    if extra:
        found, film = f"apply_stages {list(block.apply_stages or ())}   (from {origin})", list(settings.decoder_stages or ())
        facts = {"found": found, "without FiLM": str(extra), "expected": f"stages of decoder_stages {film}"}
        raise SettingsError("cannot use `junction_gating_config`: it gates stages that carry no FiLM", facts, "correct `apply_stages`")


def _expand(path: str, name: str, origin: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise SettingsError(
            f"cannot use the path of `{name}`", {"found": f"{path!r}   (from {origin})", "error": error}, "write the folder out in full"
        ) from error
