"""The statistics of `feature_transform` in a run: found before the first step, or counted over the first training images; equal in every process.

From the training split alone: from the images that the host's data sets list, else from what a warm-up has stored of the split, else counted as
training batches come, until 256 different images are. Then they are frozen, and loaded ones are never replaced.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmfilm_plugin.errors import ConditionError
from vlmfilm_plugin.features.provider import FeatureProvider
from vlmfilm_plugin.features.shuffle_donor import DataSets
from vlmfilm_plugin.features.training_images import Listed, TrainingImages
from vlmfilm_plugin.film.feature_statistics import LEAST, MOST, Facts, Statistics, counted, made_of, marks_of
from vlmfilm_plugin.film.feature_transform import FeatureTransform
from vlmfilm_plugin.film.module import FilmModule
from vlmfilm_plugin.log import film_logger
from vlmfilm_plugin.run import ranks
from vlmfilm_plugin.run.feature_lookup import BatchFeatures

# Training steps without enough different images, after which that is said.
_LONG = 25


class TrainingStatistics:
    """Finds the statistics of the transform of one FiLM and its copies.

    Args:
        provider: of the features.
        data_sets: those of the host.
    """

    def __init__(self, provider: FeatureProvider, data_sets: DataSets) -> None:
        self._provider, self._images = provider, TrainingImages(provider, data_sets)
        self._has_begun = False
        self._is_unlisted = False
        self._waited = 0

    def before_step(self, film: FilmModule, batch: BatchFeatures) -> None:
        """Find the statistics before the first training batch is conditioned, or count this one in; nothing where they are there.

        Every process of a distributed run must come here for every training batch until they are there.

        Raises:
            FeatureError: the training split has fewer than two different images, or cannot be standardized.
            MissingFeatureError, ImageReadError, EncoderError: as their names say, of images of the training split.
        """
        transform, is_first, self._has_begun = film.feature_transform, not self._has_begun, True
        if transform is None or not transform.needs_statistics:
            return
        if transform.is_frozen:
            if is_first:
                self._say_whose(transform, batch)
            return
        # A count that was begun goes on, also after a resumption: what it stored itself since then is no warm-up. Where statistics are gone
        # again (a learning-rate finder puts back what it found), they are made anew.
        if transform.statistics is None and not self._is_unlisted:
            made = self._of_the_split(film, transform, batch)
            if made is not None:
                film.take_statistics(made)
                film_logger().info("[VLM] feature_transform %s: statistics of %s", ", ".join(transform.steps), made.facts)
                return
            self._is_unlisted = True
            film_logger().info(
                "[VLM] feature_transform %s: the host's training images cannot be listed, so its statistics are counted over the first %d "
                "different ones; FiLM is the identity until %d are",
                ", ".join(transform.steps),
                MOST,
                LEAST,
            )
        self._count(film, transform, batch)

    def require(self, film: FilmModule, phase: str, features: Tensor, *, is_in_fit: bool) -> None:
        """Check before an evaluation that the transform has statistics, or that a training is about to find them.

        Args:
            features: (B, F) of the batch.
            is_in_fit: the host says that this is part of a training, such as Lightning's validation before the first step.

        Raises:
            ConditionError: it has none, and this process does not train.
        """
        transform = film.feature_transform
        if transform is None or transform.is_ready or self._has_begun or is_in_fit:
            return
        held = transform.statistics
        if held is None and phase == "val" and _is_identity(film, features):
            return  # a loop of one's own that validates before its first step
        raise ConditionError(
            "cannot condition an evaluation: `feature_transform` has no statistics",
            {
                "feature_transform": ", ".join(transform.steps),
                "phase": phase,
                "found": f"{'none' if held is None else held.facts} in what was loaded, and nothing has been trained in this process",
                "expected": f"those of the training split, of {LEAST} images or more, which travel in the checkpoint of a FiLM training",
            },
            "evaluate a checkpoint that was trained with VLM_FILM_MODE=on, or set `feature_transform: none`",
        )

    def _of_the_split(self, film: FilmModule, transform: FeatureTransform, batch: BatchFeatures) -> Statistics | None:
        """Return statistics of the training split; None where its images are not known."""
        listed = ranks.of_first(lambda: self._images.listed(batch.samples))
        fingerprint = film.architecture.fingerprint
        if listed is not None:
            features = self._encoded(listed)
            return ranks.of_first(lambda: made_of(_different(features), Facts(fingerprint, "train", str(listed), listed.digest), transform.steps))
        stored = ranks.of_first(lambda: self._images.stored(batch.samples))
        if stored is None:
            return None
        return ranks.of_first(lambda: made_of(_different(stored[0]), Facts(fingerprint, "train", stored[1]), transform.steps))

    def _encoded(self, listed: Listed) -> Tensor:
        """Return the features (N, F) of listed images; each process encodes its share."""
        rank, count = ranks.place()
        before = self._provider.stats
        # The counts of the cache are of batches.
        self._provider.stats = type(before)()
        try:
            shares = ranks.gathered(lambda: self._images.features_of(listed.images[rank::count]))
        finally:
            done, self._provider.stats = self._provider.stats, before
        if done.miss:
            film_logger().info("[VLM] feature_transform: encoded %d of %d training images before the first step", done.miss, done.total)
        rows: list[Tensor] = [torch.empty(0)] * len(listed.images)
        for number, share in enumerate(shares):
            rows[number::count] = share
        return torch.stack(rows)

    def _count(self, film: FilmModule, transform: FeatureTransform, batch: BatchFeatures) -> None:
        known = set(() if transform.statistics is None else transform.statistics.facts.counted)
        # As numbers of their own: a process could otherwise send the whole memory that rows are a view of.
        new = [row.clone() for mark, row in zip(marks_of(batch.features), batch.features, strict=True) if mark not in known]
        rows = [row for share in ranks.gathered(lambda: new) for row in share]
        facts = Facts(film.architecture.fingerprint, "train", "the first different ones of training")
        made = counted(transform.statistics, torch.stack(rows), facts, transform.steps) if rows else None
        if made is not None:
            film.take_statistics(made)
            if made.facts.is_frozen:
                film_logger().info("[VLM] feature_transform %s: statistics of %s, frozen", ", ".join(transform.steps), made.facts)
        self._waited = self._waited + 1 if film.waits else 0
        if self._waited == _LONG:
            film_logger().warning(
                "[FILM-WARN] FiLM is still the identity after %d training steps: `feature_transform` %s needs %d different training images and has "
                "seen %d; set `feature_transform: none`, or train on more images",
                _LONG,
                ", ".join(transform.steps),
                LEAST,
                0 if transform.statistics is None else transform.statistics.facts.count,
            )

    def _say_whose(self, transform: FeatureTransform, batch: BatchFeatures) -> None:
        """Say whose statistics a training that did not find its own uses."""
        if transform.statistics is None:
            return
        facts, listed = transform.statistics.facts, self._images.listed(batch.samples)
        is_other = listed is not None and facts.images is not None and listed.digest != facts.images
        film_logger().info(
            "[VLM] feature_transform %s: statistics that were loaded are kept, of %s%s",
            ", ".join(transform.steps),
            facts,
            f"; this run trains on other images ({listed})" if is_other else "",
        )


def _different(features: Tensor) -> Tensor:
    """Return each different row of features (N, F) once, in their order."""
    rows = dict(zip(reversed(marks_of(features)), reversed(range(len(features))), strict=True))
    return features[sorted(rows.values())]


@torch.no_grad()
def _is_identity(film: FilmModule, features: Tensor) -> bool:
    """Tell whether FiLM leaves these images (B, F) alone, as a fresh one does."""
    device = next(film.parameters()).device
    cond_vec = film.project(features.to(device))
    return all(bool((gamma == 1).all()) and bool((beta == 0).all()) for gamma, beta in (head(cond_vec) for head in film.all_heads()))
