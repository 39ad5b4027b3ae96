"""The one order of precedence: layers of values, weakest first, merged into `Settings`.

Order: default, preset, checkpoint's encoder, the host's own config, the file of `VLM_FILM_CONFIG`, environment `VLM_FILM_<NAME>`,
arguments, checkpoint's architecture.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path

from vlmfilm_plugin.errors import SettingsError
from vlmfilm_plugin.settings.mode import CONFIG_VARIABLE, NOT_SETTINGS, PREFIX
from vlmfilm_plugin.settings.parsing import PARSERS, EnvText, describe
from vlmfilm_plugin.settings.record import ALIASES, FIELDS, PRESETS, Settings
from vlmfilm_plugin.settings.yaml_file import read_yaml

# A layer: where the values come from, and the values.
Layer = tuple[str, Mapping[str, object]]


def resolve(layers: Iterable[Layer], base_dir: str | Path | None = None) -> Settings:
    """Merge layers, weakest first, into `Settings`.

    Args:
        layers: (origin, values) pairs; names may be aliases of the soft-seg port.
        base_dir: what relative paths are relative to; default: the working directory.

    Raises:
        SettingsError: an unknown name (with the closest legal one) or a bad value; the message names the origin.
    """
    values: dict[str, object] = {}
    origins: dict[str, str] = {}
    for origin, mapping in layers:
        for raw_name, raw in mapping.items():
            name = _known_name(raw_name, origin)
            values[name], origins[name] = _coerce(name, raw, origin), f"{origin}: {raw_name}"
    preset = values.get("preset")
    for name, raw in PRESETS.get(str(preset), {}).items():
        if name not in values:
            values[name], origins[name] = raw, f"preset {preset}"
    root = Path(base_dir or Path.cwd())
    for name in ("cache_dir", "dataset_root", "questionnaire", "shuffle_pairs_file"):
        value = values.get(name, FIELDS[name].default)
        # A questionnaire is a path only where it says so; otherwise it names a shipped one.
        if value is not None and (name != "questionnaire" or str(value).endswith((".yaml", ".yml"))):
            values[name] = str(root / _expand(str(value), name, origins.get(name, "default")))
    model = values.get("model_name")
    # A hub name stays one: only a folder that is there is a path, and the host may change its working directory.
    if model is not None and (folder := root / _expand(str(model), "model_name", origins["model_name"])).is_dir():
        values["model_name"] = str(folder)
    return Settings(**values, origins=origins)  # type: ignore[arg-type]


def environment_layers(environ: Mapping[str, str], base_dir: str | Path | None = None) -> list[Layer]:
    """Return the layers of the file named by `VLM_FILM_CONFIG` (YAML) and of the `VLM_FILM_<NAME>` variables, in this order.

    Raises:
        SettingsError: the file cannot be read, or is not a mapping.
    """
    layers: list[Layer] = []
    if CONFIG_VARIABLE in environ:
        path = environ[CONFIG_VARIABLE]
        layers.append((path, read_yaml(Path(base_dir or Path.cwd()) / _expand(path, CONFIG_VARIABLE, "environment"))))
    for variable in sorted(environ):
        if variable.startswith(PREFIX) and variable not in NOT_SETTINGS:
            layers.append(("environment", {variable: EnvText(environ[variable])}))
    return layers


def _known_name(raw: str, origin: str) -> str:
    name = str(raw)
    if origin == "environment":
        name = name[len(PREFIX) :].lower()
    name = ALIASES.get(name, name)
    if name in FIELDS:
        return name
    closest = get_close_matches(name, [*FIELDS, *ALIASES], n=1)
    spelt = f"{PREFIX}{closest[0].upper()}" if closest and origin == "environment" else (closest[0] if closest else None)
    raise SettingsError(
        "cannot use a setting: unknown name",
        {"found": f"{raw!r}   (from {origin})", **({"closest": repr(spelt)} if spelt else {})},
        f"write {spelt!r}, or take it out" if spelt else f"take it out; legal names: {', '.join(FIELDS)}",
    )


def _coerce(name: str, raw: object, origin: str) -> object:
    rules = FIELDS[name].metadata
    is_text = isinstance(raw, EnvText)
    if raw is None or (is_text and str(raw).strip().lower() in {"none", "null", "~"}):
        if rules["optional"]:
            return None
        raise _bad(name, raw, origin, describe(rules))
    try:
        value = PARSERS[rules["kind"]](raw, is_text)
    except (TypeError, ValueError, OverflowError) as error:
        raise _bad(name, raw, origin, describe(rules)) from error
    if (rules["choices"] and value not in rules["choices"]) or (rules["low"] is not None and value < rules["low"]):
        raise _bad(name, raw, origin, describe(rules))
    return value


def _expand(path: str, name: str, origin: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise SettingsError(
            f"cannot use the path of `{name}`", {"found": f"{path!r}   (from {origin})", "error": error}, "write the folder out in full"
        ) from error


def _bad(name: str, raw: object, origin: str, expected: str) -> SettingsError:
    spelt = f"{PREFIX}{name.upper()}" if origin == "environment" else name
    return SettingsError(
        f"cannot use setting `{name}`: bad value", {"found": f"{raw!r}   (from {origin})", "expected": expected}, f"correct {spelt}, or take it out"
    )
