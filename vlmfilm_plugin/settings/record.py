"""The record of settings: names, defaults, and where each value came from. Knows nothing of torch, hosts or encoders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

DEFAULT_PROMPT = "Describe the vessels in this angiography image: contrast, thickness, branching and background."

# Names under which the in-repo port of soft-seg kept the same thing.
ALIASES = {"vlm_film_decoder_stages": "decoder_stages"}

# The literal defaults of the soft-seg port where ours differ.
PRESETS: Mapping[str, Mapping[str, object]] = {
    "soft-seg": {"batch_strategy": "first", "reuse_policy": "step_interval", "update_interval_steps_train": 100, "update_interval_steps_eval": 1}
}


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
    head: str = _setting("film", "str")
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
        return {name: getattr(self, name) for name in FIELDS}

    @property
    def prompt(self) -> str:
        """Return the prompt of text mode, the first where there are several."""
        return self.prompts[0]

    @property
    def prompts(self) -> tuple[str, ...]:
        """Return the prompts of text mode, in the order of their embeddings; one or more."""
        return self.prompt_templates or (self.prompt_template or DEFAULT_PROMPT,)


FIELDS = {item.name: item for item in fields(Settings) if "kind" in item.metadata}
