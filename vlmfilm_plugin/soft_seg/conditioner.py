"""The soft-seg port's own interface, for models that call it by hand: `VLMConditioner` and `apply_vlm_film`.

Same names, arguments and behaviour as the port, without its faults; its users swap the import. `reference.md` sections 1 to 4.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from vlmfilm_plugin.features.cache_key import cache_keys
from vlmfilm_plugin.run.log_lines import statistics
from vlmfilm_plugin.errors import ConditionError, FeatureError
from vlmfilm_plugin.features.provider import FeatureProvider
from vlmfilm_plugin.film.layers import ImageToConditionVector, TextToConditionVector, identity_for, modulate
from vlmfilm_plugin.log import film_logger
from vlmfilm_plugin.features.shuffle import exchange, groups_of, permutation_hash
from vlmfilm_plugin.run.batch_strategy import BatchStrategy
from vlmfilm_plugin.settings.record import read_mode, resolve


class VLMConditioner(nn.Module):
    """Turn a batch of images into condition vectors with a frozen vision-language model.

    Args:
        enabled: False makes `compute_condition` return None.
        value_range: (low, high) of the images that `compute_condition` will be given; it is never guessed from a tensor.
        encoder: name of the encoder; `descriptor` needs no model.

    The other arguments are the settings of the same names; their defaults are the settings' defaults. The model is loaded at the
    first image whose feature is not stored; it is in no state dict, optimizer or copy of this module.
    """

    def __init__(
        self,
        enabled: bool = True,
        model_name: str = "Qwen/Qwen2.5-VL-3B-Instruct",
        cond_dim: int = 256,
        cache_dir: str = "cache/vlm_profiles",
        prompt_template: str | None = None,
        dtype: str = "auto",
        device_map: str | None = "auto",
        max_new_tokens: int = 48,
        pool: str = "mean",
        text_mlp_hidden_dim: int = 256,
        embedding_dtype: str = "float16",
        use_text_prompt_cond: bool = False,
        verbose: bool = False,
        verbose_debug: bool = False,
        update_interval_steps_train: int = 100,
        update_interval_steps_eval: int = 1,
        batch_strategy: str = "per_sample",
        reuse_policy: str = "step_interval",
        log_every_n_steps: int = 200,
        vlm_cache_stats_enabled: bool = False,
        vlm_cache_stats_every_n_steps: int = 200,
        *,
        encoder: str = "qwen2_5_vl",
        value_range: tuple[float, float] = (-1.0, 1.0),
    ) -> None:
        super().__init__()
        given = {name: value for name, value in locals().items() if name not in {"self", "enabled", "value_range", "__class__"}}
        self.enabled, self.value_range = enabled, value_range
        self.settings = resolve([("argument", given)])
        if not enabled:
            return
        self._source = FeatureProvider.from_settings(self.settings)
        self._prompted: dict[str, FeatureProvider] = {}
        # By prompt: what is held for one prompt says nothing of another.
        self._strategies: dict[str | None, BatchStrategy] = {}
        self._held: dict[str | None, Tensor] = {}
        feature_dim = self._source.encoder.feature_dim
        if use_text_prompt_cond:
            self.text_to_cond = TextToConditionVector(feature_dim, cond_dim, text_mlp_hidden_dim)
        else:
            self.image_to_cond = ImageToConditionVector(feature_dim, cond_dim)

    def compute_condition(
        self,
        image: Tensor,
        prompt: str | None = None,
        image_id: str | Sequence[str] | None = None,
        batch: Any = None,
        global_step: int | None = None,
        is_train: bool = False,
    ) -> dict[str, Any] | None:
        """Compute the condition vectors of a batch.

        Args:
            image: (B, C, H, W), C 1 or 3, values in `value_range`.
            prompt: the prompt of text mode, instead of `prompt_template`.
            image_id: names of the rows, instead of those found in `batch`.
            batch: the mapping to take cache keys from.
            global_step: the training step, for the strategies that hold a feature over steps.
            is_train: False conditions every image on itself.

        Returns:
            `cond_vec` (B, cond_dim), differentiable in the projection alone, and `_dbg` (keys, their source, cache counts); None when
            not enabled.

        Raises:
            ConditionError: the images or their names do not fit.
        """
        if not self.enabled:
            return None
        if image.dim() != 4:
            facts = {"shape": tuple(image.shape), "expected": "(B, C, H, W)"}
            raise ConditionError("cannot condition on this tensor", facts, "add the batch dimension")
        keys, key_source = self._keys(image, image_id, batch)
        s, source = self.settings, self._provider_for(prompt)
        strategy = self._strategies.setdefault(prompt, BatchStrategy(s.batch_strategy, s.reuse_policy, s.update_interval_steps_train))
        choice = strategy.choose(keys, global_step, is_train)
        if choice.rows is None:
            features = self._held[prompt].expand(len(keys), -1)
        else:
            # By file where one is found, else by content: a crop's feature is never kept under its file's name.
            samples = source.samples_of(batch, image, self.value_range)
            features = source.get([samples[row] for row in choice.rows])
            if is_train:
                self._held[prompt] = features[:1].clone()
        projection = self.text_to_cond if self.settings.use_text_prompt_cond else self.image_to_cond
        cond_vec = projection(features.to(next(projection.parameters()).device))
        if self.settings.verbose_debug:
            film_logger().info("[VLM] cache_key_example: %s", keys[0])
            film_logger().info("[VLM] cache_key_source: %s", key_source)
        debug = {"keys": keys, "cache_key_example": keys[0], "cache_key_source": key_source, "cache": str(source.stats), "step": global_step}
        return {"cond_vec": cond_vec, "_dbg": debug}

    def _keys(self, image: Tensor, image_id: str | Sequence[str] | None, batch: Any) -> tuple[list[str], str]:
        if image_id is not None:
            batch = {**(batch if isinstance(batch, Mapping) else {}), "name": image_id}
        found = cache_keys(batch, image.shape[0], dataset_root=self.settings.dataset_root, image=image)
        if image_id is not None and not found.source.endswith("['name']"):
            raise ConditionError(
                "cannot use image_id", {"found": image_id, "expected": f"a name, or one for each of {image.shape[0]} rows"}, "give one name a row"
            )
        return list(found.keys), found.source

    def _provider_for(self, prompt: str | None) -> FeatureProvider:
        if prompt is None or not self.settings.use_text_prompt_cond:
            return self._source
        if prompt not in self._prompted:
            given = {**self.settings.as_dict(), "prompt_template": prompt}
            self._prompted[prompt] = FeatureProvider.from_settings(resolve([("argument", given)]))
        return self._prompted[prompt]


VLMFiLMConditioner = VLMConditioner


def apply_vlm_film(
    x: Tensor,
    vlm_cond: Mapping[str, Any] | Tensor | None,
    vlm_film_heads: nn.ModuleList | None,
    stage_idx: int,
    module: Any = None,
    *,
    mode: str | None = None,
    step: int | None = None,
) -> tuple[Tensor, dict[str, Any] | None]:
    """Modulate the features of one decoder stage.

    Args:
        x: (B, C, H, W), after block2 and before attention.
        vlm_cond: what `compute_condition` returned, or cond_vec (B, cond_dim) itself; None leaves x alone.
        vlm_film_heads: one head a selected stage, ascending; None leaves x alone.
        stage_idx: decoder stage, 0 next to the bottleneck.
        module: the model; its `vlm_film_decoder_stages` selects stages, its `global_step` seeds `shuffle`.
        mode: `on`, `off` or `shuffle`; None takes `VLM_FILM_MODE`, and `on` where that is unset.
        step: the seed of `shuffle`, instead of `module.global_step`.

    Returns:
        (x modulated, payload): payload holds gamma and beta (B, C, 1, 1) detached, the mode and the stage, and `statistics`, which
        reads the device when called; (x, None) where no FiLM applies.

    Raises:
        ConditionError: cond_vec's rows are not x's rows. FeatureError: wrong widths. SettingsError: a wrong mode.
    """
    head = _head_of(vlm_film_heads, stage_idx, module)
    cond_vec = vlm_cond.get("cond_vec") if isinstance(vlm_cond, Mapping) else vlm_cond
    if head is None or cond_vec is None:
        return x, None
    mode = read_mode({"VLM_FILM_MODE": mode}) if mode is not None else read_mode(os.environ) or "on"
    if cond_vec.shape[0] != x.shape[0]:
        raise ConditionError(
            "cannot apply FiLM: cond_vec does not fit x",
            {"cond_vec": tuple(cond_vec.shape), "x": tuple(x.shape), "expected": "equal numbers of rows"},
            "give one condition a row of x",
        )
    permutation: list[int] | None = None
    if mode == "shuffle":
        cond_vec, permutation = _exchanged(cond_vec, module, step)
    if mode == "off":
        gamma, beta = identity_for(x)
        y = x
    else:
        gamma, beta = _gamma_and_beta(head, cond_vec, x, stage_idx)
        y = modulate(x, gamma, beta)
    payload = {
        "gamma": gamma.detach(),
        "beta": beta.detach(),
        "film_mode": mode,
        "film_bypass": mode == "off",
        "film_stage_idx": stage_idx,
        "shuffle_perm_hash": None if permutation is None else permutation_hash(permutation),
        "statistics": lambda: statistics(x, y, gamma, beta, cond_vec),
    }
    return y, payload


def _head_of(heads: nn.ModuleList | None, stage_idx: int, module: Any) -> nn.Module | None:
    if heads is None:
        return None
    stages = getattr(module, "vlm_film_decoder_stages", None)
    order = sorted(set(stages)) if stages is not None else list(range(len(heads)))
    if stage_idx not in order:
        return None
    if len(order) != len(heads):
        raise FeatureError(
            "cannot apply FiLM: heads and selected decoder stages do not fit",
            {"heads": len(heads), "stages": order, "expected": "one head a selected stage"},
            "correct `vlm_film_decoder_stages`",
        )
    return heads[order.index(stage_idx)]


def _gamma_and_beta(head: nn.Module, cond_vec: Tensor, x: Tensor, stage_idx: int) -> tuple[Tensor, Tensor]:
    gamma, beta = head(cond_vec)
    if gamma.shape[1] != x.shape[1]:
        raise FeatureError(
            f"cannot apply FiLM at decoder stage {stage_idx}: the head is for another number of channels",
            {"head": gamma.shape[1], "x": tuple(x.shape), "expected": f"a head for {x.shape[1]} channels"},
            "pass the heads in stage order",
        )
    return gamma, beta


def _exchanged(cond_vec: Tensor, module: Any, step: int | None) -> tuple[Tensor, list[int]]:
    """Return the rows of cond_vec (B, cond_dim) permuted by the step, and the permutation."""
    seed = step if step is not None else getattr(module, "global_step", None)
    # Told apart by value: rows of one image must not exchange features with each other.
    rows = exchange(groups_of(cond_vec), int(seed or 0))
    permutation = rows if rows is not None else list(range(len(cond_vec)))
    _report_shuffle(permutation, module, rows is None)
    return cond_vec[permutation], permutation


# The epoch whose permutation was reported last; by the model's class, since a model need not be hashable.
_reported_epochs: dict[type, object] = {}


def _report_shuffle(permutation: list[int], module: Any, is_alone: bool) -> None:
    """Write `[FILM-SHUFFLE]` once an epoch, and say so where there was nothing to shuffle."""
    epoch = getattr(module, "current_epoch", None)
    if _reported_epochs.get(type(module), _reported_epochs) != epoch:
        _reported_epochs[type(module)] = epoch
        note = " WARNING: all rows are of one image: nothing was shuffled, this equals mode on" if is_alone else ""
        film_logger().info("[FILM-SHUFFLE] perm_first10=%s%s", permutation[:10], note)
