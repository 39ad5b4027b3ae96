"""The soft-seg port's own interface, for models that call it by hand: `VLMConditioner` and `apply_vlm_film`.

Same names, arguments and behaviour as the port, without its faults; its users swap the import. `reference.md` sections 1 to 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from vlmfilm_plugin.errors import ConditionError
from vlmfilm_plugin.features.cache_key import cache_keys
from vlmfilm_plugin.features.provider import FeatureProvider
from vlmfilm_plugin.film.layers import ImageToConditionVector, TextToConditionVector
from vlmfilm_plugin.log import film_logger
from vlmfilm_plugin.run.batch_strategy import BatchStrategy
from vlmfilm_plugin.run.feature_lookup import FeatureLookup
from vlmfilm_plugin.settings.layers import resolve


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
        *,
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
        encoder: str = "qwen2_5_vl",
        value_range: tuple[float, float] = (-1.0, 1.0),
    ) -> None:
        super().__init__()
        given = {name: value for name, value in locals().items() if name not in {"self", "enabled", "value_range", "__class__"}}
        self.enabled, self.value_range = enabled, value_range
        self.settings = resolve([("argument", given)])
        if not enabled:
            return
        self._provider = FeatureProvider.from_settings(self.settings)
        # By prompt: what is held for one prompt says nothing of another.
        self._lookups: dict[str | None, FeatureLookup] = {}
        feature_dim = self._provider.encoder.feature_dim
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
        lookup = self._lookup_for(prompt)
        # By file where one is found, else by content: a crop's feature is never kept under its file's name.
        features = lookup.of_batch(batch, image, self.value_range, step=global_step, is_train=is_train, names=keys).features
        projection = self.text_to_cond if self.settings.use_text_prompt_cond else self.image_to_cond
        cond_vec = projection(features.to(next(projection.parameters()).device))
        if self.settings.verbose_debug:
            film_logger().info("[VLM] cache_key_example: %s", keys[0])
            film_logger().info("[VLM] cache_key_source: %s", key_source)
        debug = {"keys": keys, "cache_key_example": keys[0], "cache_key_source": key_source, "cache": str(lookup.provider.stats), "step": global_step}
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

    def _lookup_for(self, prompt: str | None) -> FeatureLookup:
        if not self.settings.use_text_prompt_cond:
            prompt = None
        if prompt not in self._lookups:
            s, provider = self.settings, self._provider
            if prompt is not None:
                provider = FeatureProvider.from_settings(resolve([("argument", {**s.as_dict(), "prompt_template": prompt})]))
            self._lookups[prompt] = FeatureLookup(provider, BatchStrategy(s.batch_strategy, s.reuse_policy, s.update_interval_steps_train))
        return self._lookups[prompt]


VLMFiLMConditioner = VLMConditioner
