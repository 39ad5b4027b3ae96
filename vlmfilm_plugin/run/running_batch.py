"""The condition in force while a host handles one batch: which feature each row of each UNet forward gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmfilm_plugin.errors import CheckpointError, ConditionError
from vlmfilm_plugin.features.samples import Sample
from vlmfilm_plugin.film.alarm import Advice
from vlmfilm_plugin.film.gate_view import GateView, MaskReader
from vlmfilm_plugin.film.gates import SpatialGate, gate_of
from vlmfilm_plugin.film.module import FilmModule
from vlmfilm_plugin.film.verdict import StageVerdict
from vlmfilm_plugin.forward.context import ForwardContext
from vlmfilm_plugin.host_spec import RowMap, same_rows
from vlmfilm_plugin.log import film_logger
from vlmfilm_plugin.rows.ledger import Ledger
from vlmfilm_plugin.run.feature_lookup import BatchFeatures
from vlmfilm_plugin.run.film_state import FilmState, FilmStates
from vlmfilm_plugin.run.loaded_rows import CONTENT, LoadedRows
from vlmfilm_plugin.run.log_fields import StepFacts
from vlmfilm_plugin.run.log_lines import Diagnostics, StageRecorder
from vlmfilm_plugin.run.row_map import RowIndex
from vlmfilm_plugin.run.training_check import living_optimizers
from vlmfilm_plugin.settings.mode import MODE_VARIABLE, STRICT_VARIABLE, is_strict


@dataclass(frozen=True)
class HostBatch:
    """A batch as a host's step received it, and where in the run that step is.

    Attributes:
        content: the mapping with the image tensor (B, C, H, W) at `image`, and names where there are any.
        phase: `train`, `val`, `test` or `predict`.
        value_range: (low, high) of the images.
        rows: which sample each row of a UNet forward belongs to.
        is_fit: False where a trainer validates a checkpoint: its epoch counts from 0 and says nothing of the training.
        is_in_fit: True where a trainer says that it trains, its validation included.
        loaded: the images as the data loader gave them (B, ...), where `content` holds others.
        trainer: Lightning's, whose loggers get FiLM's numbers; None where there is none.
        is_whole: whether the images are whole and not augmented: then their pixels may stand for a file that cannot be read.
    """

    content: Any
    phase: str
    value_range: tuple[float, float]
    rows: RowMap = same_rows
    step: int | None = None
    epoch: int | None = None
    batch_idx: int | None = None
    is_fit: bool = True
    is_in_fit: bool = False
    loaded: Tensor | None = None
    is_whole: bool = False
    trainer: Any = None


class RunningBatch:
    """The condition in force while a host handles one batch.

    Args:
        given: the batch.
        states: what the run keeps for each FiLM module.
        diagnostics: the writer of the log lines.
        files: the untouched file behind a name, as the host's data sets know it.
        ledger: what is known of the rows that data loaders gave.

    Raises:
        ConditionError: the batch has no images.
    """

    is_for_all = True

    def __init__(
        self,
        given: HostBatch,
        states: FilmStates,
        diagnostics: Diagnostics,
        files: Mapping[str, Path | None],
        ledger: Ledger | None = None,
    ) -> None:
        self.given, self._states, self._diagnostics, self._files = given, states, diagnostics, files
        self.image = image_of(given.content)
        self._loaded = LoadedRows(ledger or Ledger(), self.image if given.loaded is None else given.loaded)
        self._row_index = RowIndex(given.rows, given.phase, self.image)
        self._features: dict[Any, tuple[Tensor, list[str]]] = {}
        self._transformed: dict[Any, Tensor] = {}
        self._recorded: set[str] = set()
        # The keys of what conditions the samples, by `film_id`, until the alarm has seen it.
        self._unwatched: dict[str, list[str]] = {}
        self._verdicts: dict[str, Mapping[int | str, StageVerdict]] = {}
        self._is_logged = diagnostics.is_logged(given.phase, given.step, given.batch_idx)
        self._facts: StepFacts | None = None

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
        """Return the context of a forward. Features are looked up once a batch; gamma and beta are computed in every forward.

        An EMA may swap FiLM's weights in for one of them, through `.data` without a trace, and to compare the values costs more than
        gamma and beta do.
        """
        if film.mode == "off":
            return ForwardContext(film, None, recorder=self._recorder(film))
        if film.baseline_load is not None:
            self._refuse_baseline(film, film.baseline_load)
        index = self._row_index.of(x, image)
        features = self._features_for(film, x.device)
        if masks is not None:
            self._watch(film, features)
        gate = None if masks is None else self._gate(film, x, image, index, masks)
        recorder = None if masks is None else self._recorder(film)
        return ForwardContext(film, features, index, recorder=recorder, gate=gate, waits=film.waits)

    def _refuse_baseline(self, film: FilmModule, load: str) -> None:
        """Let a plain baseline train, which is fine-tuning.

        Raises:
            CheckpointError: it is evaluated, which would give the baseline's numbers the name of FiLM.
        """
        given, trained = self.given, self._states.trained_loads
        if given.phase == "train":
            trained.add(load)
        # A host without a trainer that is about to train has its optimizer by now.
        if load in trained or given.is_in_fit:
            return
        if given.is_fit and living_optimizers():
            # Asked once: it looks at every object of the process, and a sampler calls its UNet a thousand times.
            trained.add(load)
            return
        error = CheckpointError(
            f"this evaluation would give a plain baseline's numbers the name of FiLM: the checkpoint has no FiLM weights, and mode is {film.mode}",
            {"found": "FiLM as the identity, never trained", "expected": f"a checkpoint that was trained with {MODE_VARIABLE}={film.mode}"},
            f"evaluate it with {MODE_VARIABLE}=off, which is the plain host's output, or load a FiLM checkpoint; {STRICT_VARIABLE}=0 goes on",
        )
        if is_strict():
            raise error
        trained.add(load)
        film_logger().warning("[VLM] WARNING: %s", error)

    def _gate(self, film: FilmModule, x: Tensor, image: Tensor | None, index: Tensor | None, masks: MaskReader) -> SpatialGate | None:
        given = self.given
        epoch, samples = given.epoch if given.is_fit else None, self.image.shape[0]
        view = GateView(x, image, given.content, given.phase, rows=index, samples=samples, epoch=epoch, masks=masks)
        return gate_of(self._states.settings_of(film), view, film.architecture.stages)

    def _watch(self, film: FilmModule, features: Tensor) -> None:
        """Let the alarm see what conditions a training batch; once a batch, whatever forwards it takes. A control has nothing to alarm about."""
        keys = self._unwatched.pop(film.film_id, None)
        if keys is None or film.waits or film.architecture.feature_control != "none":
            return
        alarm = self._diagnostics.alarm(film.film_id, self._states.settings_of(film))
        alarm.collect(keys, features)
        if alarm.is_due(self.given.step):
            self._verdicts[film.film_id] = alarm.read(film, Advice.of(film, "`feature_transform: center`"))

    def _recorder(self, film: FilmModule) -> StageRecorder | None:
        if not self._is_logged or film.film_id in self._recorded:
            return None
        self._recorded.add(film.film_id)
        verdicts = self._verdicts.get(film.film_id, {})
        return StageRecorder(self._diagnostics, self._facts or self._step_facts(film, None, None), verdicts)

    def _features_for(self, film: FilmModule, device: torch.device) -> Tensor:
        """Return the features (S, F) of the samples, transformed; memory, store and encoder are asked once a batch."""
        key = (film.architecture.fingerprint, film.film_id)
        if key not in self._features:
            self._features[key] = self._look_up(film)
        # By module: a copy may have been given statistics of its own.
        if (film, device) not in self._transformed:
            features, keys = self._features[key]
            self._transformed[film, device] = (features if film.waits else film.transform(features, keys)).to(device, non_blocking=True)
        return self._transformed[film, device]

    def _look_up(self, film: FilmModule) -> tuple[Tensor, list[str]]:
        """Return the features of the samples, and the keys of the images that they are of."""
        given, state = self.given, self._states.of(film)
        if given.phase == "train":
            state.provider.enter_epoch(given.epoch)
        is_train = given.phase == "train"
        loaded = self._loaded.paths if self._loaded.is_expected else None
        found = state.lookup.of_batch(
            given.content,
            self.image,
            given.value_range,
            step=given.step,
            is_train=is_train,
            files=self._files,
            loaded=loaded,
            check=partial(self._check_kind, film, state),
            is_whole=given.is_whole,
        )
        if found.is_without_file:
            self._diagnostics.warn_of_tensors(given.phase)
        if is_train:
            state.statistics.before_step(film, found)
        else:
            state.statistics.require(film, given.phase, found.features, is_in_fit=given.is_in_fit)
        if is_train and film.mode == "on":
            self._unwatched[film.film_id] = [sample.key for sample in found.used]
        keys, features, permutation = [sample.key for sample in found.used], found.features, None
        if film.mode == "shuffle":
            features, permutation, keys = self._shuffle(state, found)
        self._diagnostics.cache_stats(given.step, state.provider.stats)
        self._facts = self._step_facts(film, found, permutation)
        self._facts.response = self._diagnostics.response(self._facts, state.provider.note_of(found.samples[0]))
        return features, keys

    def _check_kind(self, film: FilmModule, state: FilmState, samples: Sequence[Sample]) -> None:
        is_content_fine = self.given.is_whole or state.settings.unnamed_rows == CONTENT
        self._states.kinds.check(film.film_id, self.given.phase, samples, self._loaded, is_content_fine=is_content_fine)

    def _step_facts(self, film: FilmModule, found: BatchFeatures | None, permutation: list[int] | None) -> StepFacts:
        given, architecture = self.given, film.architecture
        facts = StepFacts(given.phase, given.step, given.epoch, given.batch_idx, self.image.shape[0], film.mode, architecture.apply_point, "none")
        facts.film_id, facts.control, facts.film, facts.trainer = film.film_id, architecture.feature_control, film, given.trainer
        if found is not None:
            facts.cond_source = "text" if architecture.is_text else "image"
            facts.keys, facts.cache, facts.has_mixed_keys, facts.permutation = found.keys, found.cache, found.has_mixed_keys, permutation
        return facts

    def _shuffle(self, state: FilmState, found: BatchFeatures) -> tuple[Tensor, list[int], list[str]]:
        """Return features of other images, and their keys: exchanged inside the batch, or, where all rows have one image's, a donor's."""
        given, step = self.given, self.given.step or 0
        if not state.donors.is_within_batch:
            return self._donated(state, found, step)
        permutation = state.donors.exchange([sample.key for sample in found.used], found.features, step)
        if permutation is not None:
            self._diagnostics.shuffled(given.phase, given.epoch, permutation)
            return found.features[permutation], permutation, [found.used[row].key for row in permutation]
        alone = found.used[0]
        donor, feature = state.donors.donor(alone, step)
        self._diagnostics.shuffled(given.phase, given.epoch, [0], f" batch of one image: {alone.key} is conditioned on {donor}")
        return feature.expand(len(found.used), -1), [0] * len(found.used), [donor] * len(found.used)

    def _donated(self, state: FilmState, found: BatchFeatures, step: int) -> tuple[Tensor, list[int], list[str]]:
        """Return the feature of a donor of its own for each sample."""
        given = self.given
        donors = [state.donors.donor(sample, step) for sample in found.used]
        first = f" each by a donor of its own: {found.used[0].key} is conditioned on {donors[0][0]}"
        self._diagnostics.shuffled(given.phase, given.epoch, [0], first)
        return torch.stack([feature for _, feature in donors]), [0] * len(donors), [name for name, _ in donors]


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
