"""The soft-seg port's own interface, for models that call it by hand: `VLMConditioner` and `apply_vlm_film`.

Same names, arguments and behaviour as the port, without its faults; its users swap the import. `reference.md` sections 1 to 4.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Sequence
from typing import Any

from torch import Tensor, nn

from vlmfilm_plugin.errors import ConditionError
from vlmfilm_plugin.features.cache_key import CacheKeys
from vlmfilm_plugin.features.encoding import check_features
from vlmfilm_plugin.features.provider import FeatureProvider
from vlmfilm_plugin.features.samples import Sample
from vlmfilm_plugin.features.shuffle import Shuffle, images_of
from vlmfilm_plugin.features.shuffle_donor import DataSets, ShuffleDonors
from vlmfilm_plugin.film.feature_statistics import Facts, check_facts, made_of, read_facts
from vlmfilm_plugin.film.feature_transform import FeatureTransform
from vlmfilm_plugin.film.layers import ImageToConditionVector, TextToConditionVector
from vlmfilm_plugin.film.statistics import condition_statistics
from vlmfilm_plugin.run.batch_strategy import BatchStrategy
from vlmfilm_plugin.run.feature_lookup import FeatureLookup
from vlmfilm_plugin.run.log_fields import COND_SOURCES, cache_fields, key_fields, line_of
from vlmfilm_plugin.run.log_lines import Diagnostics, write_cache_key
from vlmfilm_plugin.settings.layers import layers_of, resolve
from vlmfilm_plugin.settings.mode import read_mode
from vlmfilm_plugin.soft_seg.naming import named_samples, names_of_rows, source_of_keys


class VLMConditioner(nn.Module):
    """Turn a batch of images into condition vectors with a frozen vision-language model.

    Args:
        enabled: False makes `compute_condition` return None.
        value_range: (low, high) of the images that `compute_condition` will be given; it is never guessed from a tensor.
        encoder: name of the encoder; `descriptor` needs no model.
        feature_transform: what is done to features before the projection; the port uses them as they are. One with statistics is fitted
            first, by `fit`; they travel in this module's state dict.

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
        feature_transform: str | Sequence[str] = "none",
        value_range: tuple[float, float] = (-1.0, 1.0),
    ) -> None:
        super().__init__()
        # The environment sets what the seed's arguments have no word for: `dataset_root`, which calls are logged, `shuffle_seed`.
        given = {name: value for name, value in locals().items() if name not in {"self", "enabled", "value_range", "__class__"}}
        self.enabled, self.value_range = enabled, value_range
        self.settings = resolve(layers_of(os.environ, arguments=given))
        if not enabled:
            return
        self._provider = FeatureProvider.from_settings(self.settings)
        # By prompt: what is held for one prompt says nothing of another.
        self._lookups: dict[str | None, FeatureLookup] = {}
        self._donors: dict[FeatureProvider, ShuffleDonors] = {}
        self._diagnostics = Diagnostics(self.settings)
        self._calls = _Calls()
        self._has_announced = False
        feature_dim = self._provider.encoder.feature_dim
        if use_text_prompt_cond:
            self.text_to_cond = TextToConditionVector(feature_dim, cond_dim, text_mlp_hidden_dim)
        else:
            self.image_to_cond = ImageToConditionVector(feature_dim, cond_dim)
        steps = self.settings.feature_transform
        self.feature_transform = FeatureTransform(steps, feature_dim) if steps else None

    def fit(self, features: Tensor | None = None, *, images: Sequence[Any] | None = None) -> None:
        """Set the statistics of `feature_transform` from training images; they never change afterwards.

        Args:
            features: (N, F) of N training images, at least two different ones, as the encoder gave them.
            images: N training images instead: paths, PIL images or arrays.

        Raises:
            ConditionError: both or neither were given, or the transform takes no statistics, or has them already.
            FeatureError: wrong width, values that are not finite, fewer than two different images; or, under `standardize`, a dimension in
                which they are all alike.
        """
        transform = getattr(self, "feature_transform", None)
        if transform is None or (features is None) == (images is None):
            found = "no `feature_transform`" if transform is None else "both or neither of features and images"
            facts = {"found": found, "expected": "a transform with statistics, and features or images"}
            raise ConditionError("cannot fit this conditioner", facts, "set `feature_transform`, and pass one of both")
        if features is None:
            features = self._provider.of_images(list(images or ()))
        check_features(features, self._provider.encoder.feature_dim)
        facts_ = Facts(self._provider.encoder.identity.fingerprint, "given", "given to `fit`")
        transform.take(made_of(features, facts_, transform.steps))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        extra = state_dict.get(f"{prefix}feature_transform._extra_state")
        if self.enabled and extra is not None and (facts := read_facts(extra)) is not None:
            identity = self._provider.encoder.identity
            check_facts(facts, identity.fingerprint, self._provider.encoder.feature_dim, identity.fingerprints)
        super()._load_from_state_dict(state_dict, prefix, *args)

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
            image_id: names of the rows, instead of those found in `batch`; what is stored is stored under them.
            batch: the mapping to take cache keys from.
            global_step: the training step, for the strategies that hold a feature over steps, and for the log; where None, the log counts
                training calls.
            is_train: False conditions every image on itself.

        Returns:
            `cond_vec` (B, cond_dim), differentiable in the projection alone, and `_dbg`: every field of `log_lines.FIELDS`, None where only
            a block knows it, `should_log`, `keys` (the stored key of what each row is conditioned on) and `cache_key_source`. The device is
            read for it where `should_log` is true. Under `VLM_FILM_MODE=shuffle`, where all rows are of one image, also
            `donor_cond_vec` (B, cond_dim), made from another image of its split. None when not enabled.

        Raises:
            ConditionError: the images or their names do not fit, or there is no donor; or `feature_transform` has not been fitted.
        """
        if not self.enabled:
            return None
        if image.dim() != 4:
            facts = {"shape": tuple(image.shape), "expected": "(B, C, H, W)"}
            raise ConditionError("cannot condition on this tensor", facts, "add the batch dimension")
        s, lookup = self.settings, self._lookup_for(prompt)
        names = names_of_rows(image, image_id, batch, s.dataset_root)
        if image_id is not None:
            samples = named_samples(names, image, batch, self.value_range, s.dataset_root)
        else:
            # By file where one is found, else by content: a crop's feature is never kept under its file's name.
            samples = lookup.provider.samples_of(batch, image, self.value_range)
        found = lookup.of_samples(samples, step=global_step, is_train=is_train, names=names.keys, are_whole=True)
        features, samples, source = found.features, found.used, lookup.provider
        projection = self.text_to_cond if s.use_text_prompt_cond else self.image_to_cond
        device = next(projection.parameters()).device
        cond_vec = projection(self._transformed(features).to(device))
        step = self._calls.count(global_step, is_train)
        debug = self._debug(names, samples, cond_vec, step, is_train) | cache_fields(found.cache)
        result = {"cond_vec": cond_vec, "_dbg": debug}
        if read_mode(os.environ) == "shuffle":
            # Rows of equal bytes are of one image, whatever they are called.
            known: dict[Hashable, str] = {}
            debug["images"] = [known.setdefault(image, key) for image, key in zip(images_of(features), debug["keys"], strict=True)]
            if len(known) == 1:
                debug["shuffle_donor"], donor = self._donors_of(source).donor(samples[0], step)
                result["donor_cond_vec"] = projection(self._transformed(donor.expand(len(samples), -1)).to(device))
        self._diagnostics.cache_stats(step, source.stats)
        return result

    def _transformed(self, features: Tensor) -> Tensor:
        return features if self.feature_transform is None else self.feature_transform(features)

    def _debug(self, names: CacheKeys, samples: list[Sample], cond_vec: Tensor, step: int, is_train: bool) -> dict[str, Any]:
        phase, keys = "train" if is_train else "val", [sample.key for sample in samples]
        is_logged = self._diagnostics.is_logged(phase, step, self._calls.since_training)
        key_source = source_of_keys(names, samples)
        if self.settings.verbose_debug or (key_source == "image_id" and not self._has_announced):
            self._has_announced = True
            write_cache_key(keys[0], key_source)
        return line_of(
            {"stage": phase, "step": step, "B": len(samples), "cond_dim": cond_vec.shape[1]},
            {"cond_source": COND_SOURCES["text" if self.settings.use_text_prompt_cond else "image"]},
            key_fields(keys),
            condition_statistics(cond_vec) if is_logged else {},
            {"should_log": is_logged, "keys": keys, "cache_key_source": key_source},
        )

    def _donors_of(self, source: FeatureProvider) -> ShuffleDonors:
        if source not in self._donors:
            self._donors[source] = ShuffleDonors(source, Shuffle.from_settings(self.settings), DataSets())
        return self._donors[source]

    def _lookup_for(self, prompt: str | None) -> FeatureLookup:
        own = prompt if self.settings.use_text_prompt_cond else None
        if own not in self._lookups:
            s, provider = self.settings, self._provider
            if own is not None:
                provider = FeatureProvider.from_settings(resolve([("argument", {**s.as_dict(), "prompt_template": own})]))
            self._lookups[own] = FeatureLookup(provider, BatchStrategy(s.batch_strategy, s.reuse_policy, s.update_interval_steps_train))
        return self._lookups[own]


class _Calls:
    """Counts calls: the step where none is given, and how far a validation is."""

    def __init__(self) -> None:
        self._training = 0
        self.since_training = -1

    def count(self, step: int | None, is_train: bool) -> int:
        """Note a call and return its step: the one given, else the number of training calls before it."""
        self._training += is_train
        self.since_training = -1 if is_train else self.since_training + 1
        return step if step is not None else max(self._training - 1, 0)


VLMFiLMConditioner = VLMConditioner
