"""The record of settings: names, defaults, and where each value came from. Knows nothing of torch, hosts or encoders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from vlmfilm_plugin.settings.junctions import JunctionGating
from vlmfilm_plugin.settings.parsing import CONTROLS, setting

DEFAULT_PROMPT = "Describe the vessels in this angiography image: contrast, thickness, branching and background."

# Names under which the in-repo port of soft-seg kept the same thing.
ALIASES = {
    "vlm_film_decoder_stages": "decoder_stages",
    "film_debug_every_n_steps_train": "film_log_every_n_steps_train",
    "film_debug_every_n_steps_val": "film_log_every_n_steps_val",
}

# The literal defaults of the soft-seg port where ours differ.
PRESETS: Mapping[str, Mapping[str, object]] = {
    "soft-seg": {
        "batch_strategy": "first",
        "reuse_policy": "step_interval",
        "update_interval_steps_train": 100,
        "update_interval_steps_eval": 1,
        "film_debug_lines": "full",
    }
}


@dataclass(frozen=True)
class Settings:
    """The settings of one run; names and defaults are those of the soft-seg port unless said otherwise.

    Build it with `layers.resolve`, whose order of precedence is `layers.ORDER`; `origin(name)` tells where a value came from.
    """

    use_vlm_film: bool = setting(True, "bool")
    preset: str | None = setting(None, "str", choices=tuple(PRESETS), optional=True)
    # encoder
    encoder: str = setting("qwen2_5_vl", "str")
    model_name: str = setting("Qwen/Qwen2.5-VL-3B-Instruct", "str")
    revision: str | None = setting(None, "str", optional=True)
    dtype: str = setting("auto", "str", choices=("auto", "float32", "float16", "bfloat16"))
    device_map: str | None = setting("auto", "str", optional=True)
    min_pixels: int | None = setting(None, "int", low=1, optional=True)
    max_pixels: int | None = setting(None, "int", low=1, optional=True)
    max_patches_per_batch: int = setting(16384, "int", low=1)
    use_text_prompt_cond: bool = setting(False, "bool")
    prompt_template: str | None = setting(None, "str", optional=True)
    prompt_templates: tuple[str, ...] | None = setting(None, "texts", optional=True)
    questionnaire: str = setting("angiography", "str")
    use_logits_feature_cond: bool = setting(False, "bool")
    logits_feature_mode: str = setting("logprob", "str", choices=("logprob", "logit"))
    logits_logit_temp: float = setting(1.0, "float", low=1e-3)
    logits_center: bool = setting(False, "bool")
    logits_l2norm: bool = setting(False, "bool")
    logits_include_unknown: bool = setting(True, "bool")
    input_mode: str = setting("raw", "str", choices=("raw", "overlay", "mask_only"))
    max_new_tokens: int = setting(48, "int", low=1)
    pool: str = setting("mean", "str", choices=("mean", "last"))
    # features and their store
    store: str = setting("sqlite", "str")
    cache_dir: str = setting("cache/vlm_profiles", "path")
    dataset_root: str | None = setting(None, "path", optional=True)
    embedding_dtype: str = setting("float16", "str", choices=("float16", "float32"))
    mem_cache_size: int = setting(16384, "int", low=0)
    on_missing_feature: str = setting("encode", "str", choices=("encode", "error"))
    accept_narrow_range: bool = setting(False, "bool")
    feature_control: str = setting("none", "str", choices=("none", *CONTROLS))
    feature_control_seed: int = setting(0, "int", low=0)
    feature_transform: tuple[str, ...] = setting(("center",), "transform")
    unnamed_rows: str = setting("error", "str", choices=("error", "content"))
    # which feature conditions which row
    batch_strategy: str = setting("per_sample", "str", choices=("per_sample", "first", "random"))
    reuse_policy: str = setting("step_interval", "str", choices=("step_interval", "image_id"))
    update_interval_steps_train: int = setting(100, "int", low=1)
    update_interval_steps_eval: int = setting(1, "int", low=1)
    # mode shuffle
    shuffle_seed: int = setting(0, "int", low=0)
    shuffle_pairs_file: str | None = setting(None, "path", optional=True)
    shuffle_donor: str = setting("any", "str", choices=("any", "other_class", "most_distant"))
    shuffle_classes_file: str | None = setting(None, "path", optional=True)
    # FiLM
    cond_dim: int = setting(256, "int", low=1)
    text_mlp_hidden_dim: int = setting(256, "int", low=1)
    gamma_scale: float | None = setting(0.1, "float", low=0.0, optional=True)
    beta_scale: float | None = setting(0.1, "float", low=0.0, optional=True)
    cond_layernorm: bool = setting(True, "bool")
    head: str = setting("film", "str")
    decoder_stages: tuple[int, ...] | None = setting(None, "stages", optional=True)
    apply_point: str = setting("post_block2", "str", choices=("post_block2", "post_block1"))
    targets: str | tuple[str, ...] | Callable[[Any], Any] | None = setting(None, "targets", optional=True)  # noqa: RUF009
    blocks: str | None = setting(None, "str", choices=("all", "last"), optional=True)
    spatial_gate: str | None = setting(None, "str", optional=True)
    junction_gating_config: JunctionGating | None = setting(None, "junctions", optional=True)  # noqa: RUF009
    freeze_host: bool = setting(False, "bool")
    film_lr_scale: float = setting(1.0, "float", low=1e-6)
    # diagnostics
    verbose: bool = setting(False, "bool")
    verbose_debug: bool = setting(False, "bool")
    log_every_n_steps: int = setting(200, "int", low=1)
    film_debug_enabled: bool = setting(True, "bool")
    film_debug_lines: str = setting("short", "str", choices=("short", "full", "off"))
    film_stats_dir: str | None = setting(None, "path", optional=True)
    film_log_every_n_steps_train: int = setting(100, "int", low=1)
    film_log_every_n_steps_val: int = setting(20, "int", low=1)
    vlm_response_debug_enabled: bool = setting(False, "bool")
    vlm_response_debug_every_n_steps: int = setting(50, "int", low=1)
    vlm_cache_stats_enabled: bool = setting(False, "bool")
    vlm_cache_stats_every_n_steps: int = setting(200, "int", low=1)

    origins: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    # Names of the port that mean nothing here (`port_names`), with their origins.
    accepted: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    def origin(self, name: str) -> str:
        """Return where the value of `name` came from: `default`, a preset, a file, a variable or an argument."""
        return self.origins.get(name, "default")

    def is_explicit(self, name: str) -> bool:
        """Tell whether someone set `name`, be it to its default value."""
        return name in self.origins

    def as_dict(self) -> dict[str, Any]:
        """Return every setting by name, without origins, in plain values."""
        values = {name: getattr(self, name) for name in FIELDS}
        block, targets = self.junction_gating_config, self.targets
        if callable(targets):
            values["targets"] = f"the function {getattr(targets, '__qualname__', targets)}"
        return values | {"junction_gating_config": None if block is None else block.as_dict()}

    @property
    def are_answers_asked(self) -> bool:
        """Tell whether a feature is the port's: the scores of the answers to its three prompts, which only text mode asks."""
        return self.use_logits_feature_cond and self.use_text_prompt_cond and self.encoder == "qwen2_5_vl"

    @property
    def gate_name(self) -> str | None:
        """Return the name of the spatial gate; an enabled `junction_gating_config` names `vessel_junctions`."""
        if self.spatial_gate is None and self.junction_gating_config is not None and self.junction_gating_config.enabled:
            return "vessel_junctions"
        return self.spatial_gate

    @property
    def prompt(self) -> str:
        """Return the prompt of text mode, the first where there are several."""
        return self.prompts[0]

    @property
    def prompts(self) -> tuple[str, ...]:
        """Return the prompts of text mode, in the order of their embeddings; one or more."""
        return self.prompt_templates or (self.prompt_template or DEFAULT_PROMPT,)


FIELDS = {item.name: item for item in fields(Settings) if "kind" in item.metadata}
