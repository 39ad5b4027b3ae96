"""The settings as arguments of a function, so that an editor completes them and a type checker finds a misspelt one.

A test holds this list against the record.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any, TypedDict

from vlmfilm_plugin.settings.junctions import JunctionGating
from vlmfilm_plugin.settings.record import FIELDS


class SettingsArguments(TypedDict, total=False):
    """Every setting by name, each optional; what a setting means stands in the README's table."""

    use_vlm_film: bool
    preset: str | None
    # encoder
    encoder: str
    model_name: str
    revision: str | None
    dtype: str
    device_map: str | None
    min_pixels: int | None
    max_pixels: int | None
    max_patches_per_batch: int
    use_text_prompt_cond: bool
    prompt_template: str | None
    prompt_templates: Sequence[str] | None
    questionnaire: str
    use_logits_feature_cond: bool
    logits_feature_mode: str
    logits_logit_temp: float
    logits_center: bool
    logits_l2norm: bool
    logits_include_unknown: bool
    input_mode: str
    max_new_tokens: int
    pool: str
    # features and their store
    store: str
    cache_dir: str | PathLike[str]
    dataset_root: str | PathLike[str] | None
    embedding_dtype: str
    mem_cache_size: int
    on_missing_feature: str
    accept_narrow_range: bool
    feature_control: str
    feature_control_seed: int
    feature_transform: str | Sequence[str]
    unnamed_rows: str
    # which feature conditions which row
    batch_strategy: str
    reuse_policy: str
    update_interval_steps_train: int
    update_interval_steps_eval: int
    # mode shuffle
    shuffle_seed: int
    shuffle_pairs_file: str | PathLike[str] | None
    shuffle_donor: str
    shuffle_classes_file: str | PathLike[str] | None
    # FiLM
    cond_dim: int
    text_mlp_hidden_dim: int
    gamma_scale: float | None
    beta_scale: float | None
    cond_layernorm: bool
    head: str
    decoder_stages: Sequence[int] | int | None
    apply_point: str
    targets: str | Sequence[str] | Callable[[Any], Any] | None
    blocks: str | None
    spatial_gate: str | None
    junction_gating_config: Mapping[str, object] | JunctionGating | None
    freeze_host: bool
    film_lr_scale: float
    # diagnostics
    verbose: bool
    verbose_debug: bool
    log_every_n_steps: int
    film_debug_enabled: bool
    film_debug_lines: str
    film_stats_dir: str | None
    film_log_every_n_steps_train: int
    film_log_every_n_steps_val: int
    vlm_response_debug_enabled: bool
    vlm_response_debug_every_n_steps: int
    vlm_cache_stats_enabled: bool
    vlm_cache_stats_every_n_steps: int
    # The soft-seg port's names of settings above.
    vlm_film_decoder_stages: Sequence[int] | int | None
    film_debug_every_n_steps_train: int
    film_debug_every_n_steps_val: int


def signature_with_settings(function: Callable[..., Any]) -> inspect.Signature:
    """Return a function's signature with every setting in the place of its `**settings`."""
    own = inspect.signature(function)
    kept = [parameter for parameter in own.parameters.values() if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=FIELDS[name].default if name in FIELDS else None, annotation=annotation)
        for name, annotation in SettingsArguments.__annotations__.items()
    ]
    return own.replace(parameters=[*kept, *added])
