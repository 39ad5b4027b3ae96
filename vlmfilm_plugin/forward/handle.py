"""The handle of an attached FiLM: where it is, a condition for it, and its undo."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlmfilm_plugin.errors import ConditionError
from vlmfilm_plugin.film.alarm import ConditionAlarm
from vlmfilm_plugin.film.architecture import Stage
from vlmfilm_plugin.film.feature_statistics import Facts, made_of, marks_of
from vlmfilm_plugin.film.feature_transform import unfitted
from vlmfilm_plugin.film.gates import Gate, find_gate
from vlmfilm_plugin.film.module import FilmModule
from vlmfilm_plugin.film.statistics import share_at_bound, spread_between_images
from vlmfilm_plugin.forward import context as conditioning
from vlmfilm_plugin.settings.mode import MODE_VARIABLE, read_mode
from vlmfilm_plugin.settings.parsing import WITH_STATISTICS
from vlmfilm_plugin.settings.record import Settings

if TYPE_CHECKING:
    from vlmfilm_plugin.features.provider import FeatureProvider


class FilmHandle:
    """FiLM attached to a UNet: tells where, gives it a condition, and removes it.

    Attributes:
        unet: the module.
        film: its `FilmModule`.
        settings: the settings it was built with.
    """

    def __init__(self, unet: nn.Module, film: FilmModule, settings: Settings, undo: list[Callable[[], None]]) -> None:
        self.unet, self.film, self.settings = unet, film, settings
        self._undo = undo
        self._provider: FeatureProvider | None = None
        self._alarm = ConditionAlarm.of(settings, says_energy=False)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Return the blocks that carry FiLM, by stage, ascending, and within one in order of execution."""
        return self.film.architecture.stages

    @property
    def feature_dim(self) -> int:
        """Return F, the width of a feature."""
        return self.film.architecture.feature_dim

    @contextmanager
    def condition(
        self, features: Tensor | None = None, *, images: Sequence[Any] | None = None, gate: Tensor | Gate | None = None, step: int = 0
    ) -> Iterator[None]:
        """Condition the UNet's forwards inside the block, one feature a row, or one for all rows.

        Forwards in training mode with gradients are watched: `[FILM-WARN]` says when the condition no longer reaches the decoder.

        Args:
            features: (B, F), as the encoder gave them, any float dtype, finite; used detached, and transformed as `fit` has set it.
            gate: where FiLM acts: (R, 1, H, W) in [0, 1], or a function of the forward that returns it; None takes the settings
                `spatial_gate` and `junction_gating_config`; here no epoch is known, so that the gate acts from the start.
            step: draws the exchange of features in mode `shuffle`, together with the setting `shuffle_seed`.
            images: B images instead: paths, PIL images, or arrays (H, W[, 3]), uint8, uint16 or float in [0, 1]; encoded and stored once.
                What `vlmfilm warmup` stored for a path's file is found.

        Raises:
            ConditionError: both or neither were given, or, in the forward, their number does not fit the rows; or a `feature_transform` that
                was set has not been fitted.
            FeatureError: the features' width is not F, or they hold NaN or infinite values.
        """
        from vlmfilm_plugin.features.shuffle import Shuffle
        from vlmfilm_plugin.forward.given_features import GivenFeatures

        is_training = self.unet.training and torch.is_grad_enabled()
        features = self._features_of(features, images, "cannot set a condition", is_training=is_training)
        if self.film.lacks_statistics and self.film.mode != "off":
            raise unfitted(self.film.architecture.feature_transform)
        if gate is None:
            find_gate(self.settings.gate_name, self.settings.origin("spatial_gate"))
        shuffle = Shuffle.from_settings(self.settings)
        names = None if images is None else [image if isinstance(image, str | os.PathLike) else f"row {row}" for row, image in enumerate(images)]
        given = GivenFeatures(self.film.film_id, features.detach(), self.settings, gate, step, shuffle, names, self._alarm)
        with conditioning.in_force(given):
            yield

    def _features_of(self, features: Tensor | None, images: Sequence[Any] | None, what: str, *, is_training: bool = False) -> Tensor:
        """Return features (B, F) that were given, or those of images."""
        from vlmfilm_plugin.features.encoding import check_features

        if (features is None) == (images is None):
            facts = {"found": "both or neither of features and images", "expected": "one of them"}
            raise ConditionError(what, facts, "pass `features=` or `images=`")
        if images is not None and not len(images):
            raise ConditionError(what, {"found": "no images", "expected": "one for each row, or one for all"}, "pass at least one")
        if features is None:
            provider, images = self._feature_provider(), list(images or ())
            if is_training:
                provider.check_range([Path(image) for image in images if isinstance(image, str | os.PathLike)])
            features = provider.of_images(images, is_train=is_training)
        check_features(features, self.feature_dim)
        return features

    def features(self, images: Sequence[Any]) -> Tensor:
        """Return the features (N, F) of N images, float32 on the CPU: stored ones, else encoded and stored. They are as the encoder gave them.

        Args:
            images: paths, PIL images or arrays, as for `condition`.

        Raises:
            ConditionError: there are none. ImageReadError, EncoderError, StoreError: as their names say.
        """
        return self._features_of(None, images, "cannot return features").clone()

    def fit(self, features: Tensor | None = None, *, images: Sequence[Any] | None = None) -> None:
        """Set the statistics of `feature_transform` (default `center`) from training images; they travel in state dicts and never change.

        Copies of the UNet that were made before get them too.

        Args:
            features: (N, F) of N training images, at least two different ones, as the encoder gave them; 64 are enough.
            images: N training images instead, as for `condition`.

        Raises:
            ConditionError: both or neither were given, or the transform has its statistics already, or no step of it takes any.
            FeatureError: wrong width, values that are not finite, fewer than two different images; or, under `standardize`, a dimension in
                which they are all alike.
        """
        what = "cannot fit `feature_transform`"
        film, steps = self.film, self.film.architecture.feature_transform or self.settings.feature_transform
        if not any(step in WITH_STATISTICS for step in steps):
            found = f"{', '.join(steps) or 'none'}   (from {self.settings.origin('feature_transform')})"
            raise ConditionError(what, {"found": found, "expected": f"a step of {', '.join(WITH_STATISTICS)}"}, "take `fit` out, or set one")
        given = self._features_of(features, images, what)
        fingerprint = None if images is None else self._feature_provider().encoder.identity.fingerprint
        statistics = made_of(given, Facts(fingerprint or film.architecture.fingerprint, "given", "given to `fit`"), steps)
        for copied in film.copies():
            if copied.feature_transform is None:
                copied.use_transform(steps)
        film.take_statistics(statistics)

    @contextmanager
    def mode(self, mode: str) -> Iterator[None]:
        """Run the UNet, and its copies, in another mode inside the block: `on`, `off` or `shuffle`.

        A FiLM that was attached in mode `off` trains in the block of another one.

        Raises:
            SettingsError: not a mode.
        """
        asked = str(read_mode({MODE_VARIABLE: mode}))
        films = self.film.copies()
        before = [(film, film.mode, [(parameter, parameter.requires_grad) for parameter in film.parameters()]) for film in films]
        for film in films:
            if film.mode == "off" and asked != "off":
                film.requires_grad_(True)
            film.mode = asked
        try:
            yield
        finally:
            for film, old, flags in before:
                film.mode = old
                for parameter, requires_grad in flags:
                    parameter.requires_grad_(requires_grad)

    @torch.no_grad()
    def statistics(self) -> dict[int | str, dict[str, Any]]:
        """Return what FiLM does to the images of the last forward, by decoder stage; computed now, by the weights of now.

        Returns:
            For each stage `0`, or each block `"0.1"` of a stage that has several:
            `between_images`: the spread (standard deviation) of gamma and of beta between the images of the rows, mean over
            channels, in their own unit: 0 where all images get the same; None where the rows are of one image. And `at_bound`: the share of
            gamma's and of beta's entries at their bound; None where there is none.

        Raises:
            ConditionError: no forward has run with a condition.
        """
        features, index = self.film.last_forward.features, self.film.last_forward.index
        if features is None:
            facts = {"mode": self.film.mode, "expected": "a forward of the UNet in mode on or shuffle before"}
            raise ConditionError("cannot return statistics of FiLM: no forward has run with a condition", facts, "run the UNet first")
        marks = marks_of(features)
        images = torch.tensor([marks.index(mark) for mark in marks], device=features.device)
        cond_vec = self.film.project(features)
        if index is not None:
            cond_vec, images = cond_vec.index_select(0, index), images.index_select(0, index)
        # Numbered by row, as the spread wants them, however many features there are.
        images = torch.unique(images, return_inverse=True)[1]
        found: dict[int | str, dict[str, Any]] = {}
        for position, stage in enumerate(self.stages):
            pair = dict(zip(("gamma", "beta"), self.film.head(position)(cond_vec), strict=True))
            a = self.film.architecture
            limits = {"gamma": (1.0, a.gamma_scale), "beta": (0.0, a.beta_scale)}
            spread = {name: float(spread_between_images(values, images).mean()) for name, values in pair.items()}
            bound = {name: share_at_bound(values, *limits[name]) for name, values in pair.items()}
            found[stage.key] = {
                "between_images": spread if int(images.max()) else None,
                "at_bound": {name: None if share is None else float(share) for name, share in bound.items()},
            }
        return found

    def _feature_provider(self) -> FeatureProvider:
        from vlmfilm_plugin.features.provider import FeatureProvider

        if self._provider is None:
            self._provider = FeatureProvider.from_settings(self.settings)
        return self._provider

    def remove(self) -> None:
        """Restore the module exactly as it was; a second call does nothing."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> FilmHandle:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()
