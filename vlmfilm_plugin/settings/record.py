"""Settings: one frozen record for a run, each value with the place it came from.

Order, weakest first: default, preset, checkpoint's encoder, the host's own config, the file of `VLM_FILM_CONFIG`, environment
`VLM_FILM_<NAME>`, arguments, checkpoint's architecture. Knows nothing of torch, hosts or encoders.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from vlmfilm_plugin.errors import SettingsError
from vlmfilm_plugin.settings.parsing import PARSERS, EnvText, describe

MODE_VARIABLE = "VLM_FILM_MODE"
MODES = ("on", "off", "shuffle")
CONFIG_VARIABLE = "VLM_FILM_CONFIG"
PREFIX = "VLM_FILM_"
_NOT_SETTINGS = frozenset({MODE_VARIABLE, CONFIG_VARIABLE})

DEFAULT_PROMPT = "Describe the vessels in this angiography image: contrast, thickness, branching and background."

# Names under which the in-repo port of soft-seg kept the same thing.
ALIASES = {"vlm_film_decoder_stages": "decoder_stages"}

# The literal defaults of the soft-seg port where ours differ.
PRESETS: Mapping[str, Mapping[str, object]] = {
    "soft-seg": {"batch_strategy": "first", "reuse_policy": "step_interval", "update_interval_steps_train": 100, "update_interval_steps_eval": 1}
}


def read_mode(environ: Mapping[str, str] | None = None) -> str | None:
    """Return `VLM_FILM_MODE` (`on`, `off` or `shuffle`), or None where it is unset.

    Raises:
        SettingsError: the variable is set to anything else, the empty string included.
    """
    value = (os.environ if environ is None else environ).get(MODE_VARIABLE)
    if value is None or value in MODES:
        return value
    closest = get_close_matches(value.strip().lower(), MODES, n=1, cutoff=0.4)
    raise SettingsError(
        f"cannot use {MODE_VARIABLE}: not a mode",
        {"found": repr(value), "expected": "on, off or shuffle"},
        f"set {MODE_VARIABLE}={closest[0]}" if closest else f"unset {MODE_VARIABLE}, or set it to one of these",
    )


def refuse_changed_mode(expected: str | None) -> None:
    """Check that `VLM_FILM_MODE` still says what it said at activation (None: it was unset); one that was taken out says nothing.

    Raises:
        SettingsError: it says something else, which would be ignored.
    """
    now = os.environ.get(MODE_VARIABLE, expected)
    if now != expected:
        raise SettingsError(
            f"{MODE_VARIABLE} was changed after VLM-FiLM was activated",
            {"found": repr(now), "expected": f"{expected!r}, as at activation"},
            "restart the process (the notebook's kernel) with the mode you want",
        )


def _setting(default: object, kind: str, *, choices: tuple[str, ...] = (), low: float | None = None, optional: bool = False) -> Any:
    return field(default=default, metadata={"kind": kind, "choices": choices, "low": low, "optional": optional})


@dataclass(frozen=True)
class Settings:
    """The settings of one run; names and defaults are those of the soft-seg port unless said otherwise.

    Build it with `resolve`; `origin(name)` tells where a value came from.
    """

    use_vlm_film: bool = _setting(True, "bool")
    preset: str | None = _setting(None, "str", choices=tuple(PRESETS), optional=True)
    # encoder
    encoder: str = _setting("qwen2_5_vl", "str")
    model_name: str = _setting("Qwen/Qwen2.5-VL-3B-Instruct", "str")
    revision: str | None = _setting(None, "str", optional=True)
    dtype: str = _setting("auto", "str", choices=("auto", "float32", "float16", "bfloat16"))
    device_map: str | None = _setting("auto", "str", optional=True)
    min_pixels: int | None = _setting(None, "int", low=1, optional=True)
    max_pixels: int | None = _setting(None, "int", low=1, optional=True)
    max_patches_per_batch: int = _setting(16384, "int", low=1)
    use_text_prompt_cond: bool = _setting(False, "bool")
    prompt_template: str | None = _setting(None, "str", optional=True)
    prompt_templates: tuple[str, ...] | None = _setting(None, "texts", optional=True)
    questionnaire: str = _setting("angiography", "str")
    max_new_tokens: int = _setting(48, "int", low=1)
    pool: str = _setting("mean", "str", choices=("mean", "last"))
    # features and their store
    cache_dir: str = _setting("cache/vlm_profiles", "path")
    dataset_root: str | None = _setting(None, "path", optional=True)
    embedding_dtype: str = _setting("float16", "str", choices=("float16", "float32"))
    on_missing_feature: str = _setting("encode", "str", choices=("encode", "error"))
    # which feature conditions which row
    batch_strategy: str = _setting("per_sample", "str", choices=("per_sample", "first", "random"))
    reuse_policy: str = _setting("step_interval", "str", choices=("step_interval", "image_id"))
    update_interval_steps_train: int = _setting(100, "int", low=1)
    update_interval_steps_eval: int = _setting(1, "int", low=1)
    # FiLM
    cond_dim: int = _setting(256, "int", low=1)
    text_mlp_hidden_dim: int = _setting(256, "int", low=1)
    gamma_scale: float | None = _setting(0.1, "float", low=0.0, optional=True)
    beta_scale: float | None = _setting(0.1, "float", low=0.0, optional=True)
    cond_layernorm: bool = _setting(True, "bool")
    decoder_stages: tuple[int, ...] | None = _setting(None, "stages", optional=True)
    apply_point: str = _setting("post_block2", "str", choices=("post_block2", "post_block1"))
    targets: str | None = _setting(None, "str", optional=True)
    spatial_gate: str | None = _setting(None, "str", optional=True)
    freeze_host: bool = _setting(False, "bool")
    # diagnostics
    verbose: bool = _setting(False, "bool")
    verbose_debug: bool = _setting(False, "bool")
    log_every_n_steps: int = _setting(200, "int", low=1)
    film_log_every_n_steps_train: int = _setting(100, "int", low=1)
    film_log_every_n_steps_val: int = _setting(20, "int", low=1)
    vlm_cache_stats_enabled: bool = _setting(False, "bool")
    vlm_cache_stats_every_n_steps: int = _setting(200, "int", low=1)

    origins: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    def origin(self, name: str) -> str:
        """Return where the value of `name` came from: `default`, a preset, a file, a variable or an argument."""
        return self.origins.get(name, "default")

    def is_explicit(self, name: str) -> bool:
        """Tell whether someone set `name`, be it to its default value."""
        return name in self.origins

    def as_dict(self) -> dict[str, Any]:
        """Return every setting by name, without origins."""
        return {name: getattr(self, name) for name in _FIELDS}

    @property
    def prompt(self) -> str:
        """Return the prompt of text mode, the first where there are several."""
        return self.prompts[0]

    @property
    def prompts(self) -> tuple[str, ...]:
        """Return the prompts of text mode, in the order of their embeddings; one or more."""
        return self.prompt_templates or (self.prompt_template or DEFAULT_PROMPT,)


_FIELDS = {item.name: item for item in fields(Settings) if "kind" in item.metadata}

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
    for name in ("cache_dir", "dataset_root", "questionnaire"):
        value = values.get(name, _FIELDS[name].default)
        # A questionnaire is a path only where it says so; otherwise it names a shipped one.
        if value is not None and (name != "questionnaire" or str(value).endswith((".yaml", ".yml"))):
            values[name] = str(root / _expand(str(value), name, origins.get(name, "default")))
    return Settings(**values, origins=origins)  # type: ignore[arg-type]


def environment_layers(environ: Mapping[str, str], base_dir: str | Path | None = None) -> list[Layer]:
    """Return the layers of the file named by `VLM_FILM_CONFIG` (YAML) and of the `VLM_FILM_<NAME>` variables, in this order.

    Raises:
        SettingsError: the file cannot be read, or is not a mapping.
    """
    layers: list[Layer] = []
    if CONFIG_VARIABLE in environ:
        path = environ[CONFIG_VARIABLE]
        layers.append((path, _read_yaml(Path(base_dir or Path.cwd()) / _expand(path, CONFIG_VARIABLE, "environment"))))
    for variable in sorted(environ):
        if variable.startswith(PREFIX) and variable not in _NOT_SETTINGS:
            layers.append(("environment", {variable: EnvText(environ[variable])}))
    return layers


def _read_yaml(path: Path) -> Mapping[str, object]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: not UTF-8, or an impossible date or number
        raise SettingsError(
            f"cannot read the file of {CONFIG_VARIABLE}", {"file": path, "error": " ".join(str(error).split())}, "give the path of a YAML file"
        ) from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SettingsError(
            f"cannot use the file of {CONFIG_VARIABLE}",
            {"file": path, "found": type(content).__name__, "expected": "a mapping of setting names to values"},
            "write one `name: value` a line",
        )
    return content


def _known_name(raw: str, origin: str) -> str:
    name = str(raw)
    if origin == "environment":
        name = name[len(PREFIX) :].lower()
    name = ALIASES.get(name, name)
    if name in _FIELDS:
        return name
    closest = get_close_matches(name, [*_FIELDS, *ALIASES], n=1)
    spelt = f"{PREFIX}{closest[0].upper()}" if closest and origin == "environment" else (closest[0] if closest else None)
    raise SettingsError(
        "cannot use a setting: unknown name",
        {"found": f"{raw!r}   (from {origin})", **({"closest": repr(spelt)} if spelt else {})},
        f"write {spelt!r}, or take it out" if spelt else f"take it out; legal names: {', '.join(_FIELDS)}",
    )


def _coerce(name: str, raw: object, origin: str) -> object:
    rules = _FIELDS[name].metadata
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
