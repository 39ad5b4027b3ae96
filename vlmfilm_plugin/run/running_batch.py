"""The condition in force while a host handles one batch: which feature each row of each UNet forward gets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlmfilm_plugin.errors import ConditionError
from vlmfilm_plugin.features.provider import CacheStats, FeatureProvider, Sample
from vlmfilm_plugin.features.shuffle import exchange
from vlmfilm_plugin.film.gate_view import GateView, MaskReader
from vlmfilm_plugin.film.gates import SpatialGate, gate_of
from vlmfilm_plugin.film.module import FilmModule
from vlmfilm_plugin.forward.context import ForwardContext
from vlmfilm_plugin.host_spec import RowMap, RowView
from vlmfilm_plugin.run.log_lines import StageRecorder, StepFacts
from vlmfilm_plugin.settings.mode import MODE_VARIABLE

if TYPE_CHECKING:
    from vlmfilm_plugin.run.runtime import Runtime


class RunningBatch:
    """The condition in force while a host handles one batch."""

    def __init__(
        self,
        runtime: Runtime,
        batch: Any,
        phase: str,
        value_range: tuple[float, float],
        rows: RowMap,
        step: int | None,
        epoch: int | None,
        batch_idx: int | None,
    ) -> None:
        self._runtime, self._batch, self._rows = runtime, batch, rows
        self.phase, self.step, self.epoch, self.batch_idx = phase, step, epoch, batch_idx
        self._value_range = value_range
        self.image = image_of(batch)
        self._features: dict[Any, Tensor] = {}
        self._kept: dict[Any, ForwardContext] = {}
        self._change_probes: dict[int, list[Tensor]] = {}
        self._index: dict[Any, Tensor | None] = {}
        self._mapped_condition: Tensor | None = None
        self._recorded: set[str] = set()
        self._is_logged = runtime.diagnostics.is_logged(phase, step, batch_idx)
        self._facts: StepFacts | None = None

    is_for_all = True

    def is_of(self, batch: Any) -> bool:
        """Tell whether another batch has the very images of this one; on an accelerator, where values cannot be read, the same shape."""
        image = image_of(batch)
        if image is self.image or image.shape != self.image.shape:
            return image is self.image
        both_here = image.device.type == self.image.device.type == "cpu"
        return not both_here or torch.equal(image.as_subclass(Tensor), self.image.as_subclass(Tensor))

    def serves(self, film: FilmModule) -> bool:
        return True

    def open_context(self, film: FilmModule, x: Tensor, image: Tensor | None, masks: MaskReader | None) -> ForwardContext:
        """Return the context of a forward; in evaluation what was computed for a batch is kept for all its forwards."""
        if film.mode == "off":
            return ForwardContext(film, None, recorder=self._recorder(film))
        index = self._index_of(x, image)
        features = self._features_for(film, x.device)
        gate = None if masks is None else self._gate(film, x, image, index, masks)
        recorder = None if masks is None else self._recorder(film)
        if film.training or torch.is_grad_enabled():
            return ForwardContext(film, features, index, recorder=recorder, gate=gate)
        self._forget_if_changed(film)
        key = (id(film), x.shape[0], x.device, id(index))
        if key not in self._kept:
            shared = next((context.shared for (owner, *_), context in self._kept.items() if owner == id(film)), {})
            self._kept[key] = ForwardContext(film, features, index, shared=shared)
        context = self._kept[key]
        context.recorder, context.gate = recorder, gate
        context.ran.clear()
        return context

    def _forget_if_changed(self, film: FilmModule) -> None:
        """Forget what was kept for a UNet whose FiLM weights changed inside the batch, such as by an EMA swapped in for one forward.

        A swap through `.data` leaves no trace but the values themselves. On an accelerator they cannot be compared without a
        synchronisation, so nothing is kept there: gamma and beta are a few small kernels a forward.
        """
        known, now = self._change_probes.get(id(film)), film.change_probes()
        if now[0].device.type == "cpu" and known is not None and all(map(torch.equal, known, now)):
            return
        for key in [key for key in self._kept if key[0] == id(film)]:
            del self._kept[key]
        self._change_probes[id(film)] = [probe.detach().clone() for probe in now]

    def _gate(self, film: FilmModule, x: Tensor, image: Tensor | None, index: Tensor | None, masks: MaskReader) -> SpatialGate | None:
        samples = self.image.shape[0]
        view = GateView(x, image, self._batch, self.phase, rows=index, samples=samples, epoch=self.epoch, masks=masks)
        return gate_of(self._runtime.settings_of(film), view, film.architecture.stages)

    def _recorder(self, film: FilmModule) -> StageRecorder | None:
        if not self._is_logged or film.film_id in self._recorded:
            return None
        self._recorded.add(film.film_id)
        facts = self._facts or StepFacts(
            self.phase, self.step, self.epoch, self.batch_idx, self.image.shape[0], film.mode, film.architecture.apply_point, "none"
        )
        return StageRecorder(self._runtime.diagnostics, facts)

    def _index_of(self, x: Tensor, condition: Tensor | None) -> Tensor | None:
        """Return the sample of each row (R,), or None where row i is sample i."""
        samples, rows = self.image.shape[0], x.shape[0]
        key = (rows, x.device)
        # The map of a batch of several may depend on the content of the condition image, which an ODE solver passes again and again.
        is_known = key in self._index and (samples == 1 or self.phase == "train" or condition is self._mapped_condition)
        if not is_known:
            mapping = self._rows(RowView(self.phase, samples, rows, self.image, condition))
            if mapping is None or len(mapping) != rows or not all(0 <= sample < samples for sample in mapping):
                raise self._unmapped(samples, rows)
            is_identity = list(mapping) == list(range(samples))
            self._index[key] = None if is_identity else torch.tensor(list(mapping), dtype=torch.long, device=x.device)
            self._mapped_condition = condition
        return self._index[key]

    def _unmapped(self, samples: int, rows: int) -> ConditionError:
        return ConditionError(
            "cannot tell which sample each row of this UNet forward belongs to",
            {
                "phase": self.phase,
                "rows": rows,
                "samples": samples,
                "expected": "rows that repeat the samples in order (training), or one sample a batch (sliding windows)",
            },
            "evaluate with batch size 1, or give the rows' own condition: `with handle.condition(features=...)`",
        )

    def _features_for(self, film: FilmModule, device: torch.device) -> Tensor:
        """Return the features (S, F) of the samples; memory, store and encoder are asked once a batch."""
        key = (film.architecture.fingerprint, film.film_id, device)
        if key not in self._features:
            self._features[key] = self._look_up(film).to(device, non_blocking=True)
        return self._features[key]

    def _look_up(self, film: FilmModule) -> Tensor:
        runtime, provider = self._runtime, self._runtime.provider_for(film)
        if self.phase == "train":
            provider.enter_epoch(self.epoch)
        before = _copy(provider.stats)
        samples = provider.samples_of(self._batch, self.image, self._value_range, runtime.files)
        keys = [sample.key for sample in samples]
        if not all(sample.path for sample in samples):
            runtime.warn_of_tensors(self.phase)
        strategy, is_train = runtime.strategy_for(film), self.phase == "train"
        choice = strategy.choose(keys, self.step, is_train)
        if choice.rows is None:
            features = runtime.held(film).expand(len(samples), -1)
            used = [strategy.held_key or ""] * len(samples)
        else:
            chosen = [samples[row] for row in choice.rows]
            features = provider.get(chosen)
            if is_train and strategy.batch_strategy != "per_sample":
                runtime.hold(film, features[:1].clone())
            used = [sample.key for sample in chosen]
        permutation: list[int] | None = None
        if film.mode == "shuffle":
            features, permutation = self._shuffle(provider, samples, used, features)
        runtime.diagnostics.cache_stats(self.step, provider.stats)
        self._facts = StepFacts(
            self.phase,
            self.step,
            self.epoch,
            self.batch_idx,
            len(samples),
            film.mode,
            film.architecture.apply_point,
            "text" if film.architecture.is_text else "image",
            keys,
            _difference(provider.stats, before),
            len({sample.path is None for sample in samples}) > 1,
            permutation,
        )
        self._facts.response = runtime.diagnostics.response(self._facts, provider.note_of(keys[0]))
        return features

    def _shuffle(self, provider: FeatureProvider, samples: list[Sample], keys: list[str], features: Tensor) -> tuple[Tensor, list[int]]:
        """Return features of other images: permuted by the step alone, or, where all rows have one image's, another's from the store."""
        step = self.step or 0
        permutation = exchange(keys, step)
        if permutation is not None:
            self._runtime.diagnostics.shuffled(self.phase, self.epoch, permutation)
            return features[permutation], permutation
        drawn = self._runtime.donors_for(provider).draw(samples[0], step * 1_000_003 + (self.batch_idx or 0), self._runtime.files)
        if drawn is None:
            raise ConditionError(
                "cannot shuffle a batch of one image: the store holds no other image's feature",
                {"image": keys[0], "store": provider.store.path, "expected": "at least one other feature of this encoder"},
                f"run {MODE_VARIABLE}=on over the data first, or use a batch size of 2 or more",
            )
        self._runtime.diagnostics.shuffled(self.phase, self.epoch, [0], f" batch of one image: {keys[0]} is conditioned on {drawn[0]}")
        return drawn[1].expand(len(keys), -1), [0] * len(keys)


def image_of(batch: Any) -> Tensor:
    """Return the batch's image tensor (B, C, H, W).

    Raises:
        ConditionError: the batch is no mapping with a tensor at `image`.
    """
    image = batch.get("image") if isinstance(batch, Mapping) else None
    if not isinstance(image, Tensor) or image.dim() != 4:
        found = f"{type(image).__name__} of shape {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise ConditionError(
            "cannot find the images of this batch",
            {"batch": type(batch).__name__, "found": f"{found} at 'image'", "expected": "a mapping with a tensor (B, C, H, W) at 'image'"},
            "let the host adapter's `Steps.batch` return such a mapping",
        )
    return image


def _copy(stats: CacheStats) -> CacheStats:
    return CacheStats(stats.total, stats.mem_hit, stats.disk_hit, stats.miss)


def _difference(now: CacheStats, before: CacheStats) -> CacheStats:
    return CacheStats(now.total - before.total, now.mem_hit - before.mem_hit, now.disk_hit - before.disk_hit, now.miss - before.miss)
