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
from vlmfilm_plugin.film.architecture import Stage
from vlmfilm_plugin.film.gates import Gate, find_gate
from vlmfilm_plugin.film.module import FilmModule
from vlmfilm_plugin.forward import context as conditioning
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

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Return the stages that carry FiLM, ascending."""
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

        Args:
            features: (B, F), any float dtype, finite; used detached.
            gate: where FiLM acts: (R, 1, H, W) in [0, 1], or a function of the forward that returns it; None takes the settings
                `spatial_gate` and `junction_gating_config`; here no epoch is known, so that the gate acts from the start.
            step: draws the exchange of features in mode `shuffle`, together with the setting `shuffle_seed`.
            images: B images instead: PIL images, paths, or arrays (H, W[, 3]), uint8, uint16 or float in [0, 1]; encoded and stored once.

        Raises:
            ConditionError: both or neither were given, or, in the forward, their number does not fit the rows.
            FeatureError: the features' width is not F, or they hold NaN or infinite values.
        """
        from vlmfilm_plugin.features.provider import check_features
        from vlmfilm_plugin.features.shuffle import Shuffle
        from vlmfilm_plugin.forward.given_features import GivenFeatures

        if (features is None) == (images is None):
            raise ConditionError(
                "cannot set a condition",
                {"found": "both or neither of features and images", "expected": "one of them"},
                "pass `features=` or `images=`",
            )
        if images is not None and not len(images):
            raise ConditionError(
                "cannot set a condition", {"found": "no images", "expected": "one for each row, or one for all"}, "pass at least one"
            )
        if features is None:
            assert images is not None
            provider = self._feature_provider()
            is_train = self.unet.training and torch.is_grad_enabled()
            if is_train:
                provider.check_range([Path(image) for image in images if isinstance(image, str | os.PathLike)])
            features = provider.of_images(images, is_train=is_train)
        check_features(features, self.feature_dim)
        if gate is None:
            find_gate(self.settings.gate_name, self.settings.origin("spatial_gate"))
        shuffle = Shuffle.from_settings(self.settings)
        names = None if images is None else [image if isinstance(image, str | os.PathLike) else f"row {row}" for row, image in enumerate(images)]
        given = GivenFeatures(self.film.film_id, features.detach(), self.settings, gate, step, shuffle, names)
        with conditioning.in_force(given):
            yield

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
