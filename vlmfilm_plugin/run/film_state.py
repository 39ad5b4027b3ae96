"""All that a run keeps for one FiLM module: its settings, where its features come from, its strategy and what that holds.

Knows neither batches nor log lines.
"""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary, WeakValueDictionary

from vlmfilm_plugin.errors import EncoderError
from vlmfilm_plugin.features.provider import FeatureProvider
from vlmfilm_plugin.features.shuffle import Shuffle
from vlmfilm_plugin.features.shuffle_donor import DataSets, ShuffleDonors
from vlmfilm_plugin.film.module import FilmModule
from vlmfilm_plugin.run.batch_strategy import BatchStrategy
from vlmfilm_plugin.run.feature_lookup import FeatureLookup
from vlmfilm_plugin.run.loaded_rows import RowKinds
from vlmfilm_plugin.run.training_statistics import TrainingStatistics
from vlmfilm_plugin.settings.record import Settings


class FilmState:
    """What a run keeps for one FiLM module.

    Attributes:
        settings: those it was built with.
        provider: of its encoder's features; modules with equal settings share one.
        donors: the rule of mode `shuffle` for its features.
        lookup: its features, through its own strategy.
        statistics: finds those of its transform of features; a module and its copies share it.
    """

    def __init__(self, settings: Settings, provider: FeatureProvider, data_sets: DataSets, statistics: TrainingStatistics) -> None:
        self.settings, self.provider, self.statistics = settings, provider, statistics
        self.donors = ShuffleDonors(provider, Shuffle.from_settings(settings), data_sets)
        strategy = BatchStrategy(settings.batch_strategy, settings.reuse_policy, settings.update_interval_steps_train)
        self.lookup = FeatureLookup(provider, strategy)


class FilmStates:
    """The states of a run's FiLM modules, each made when it is first needed.

    Args:
        settings: the settings of the run now, for a module that came by another way than being built here (unpickled).
        data_sets: those of the host, among whose images shuffle donors are drawn.
    """

    def __init__(self, settings: Callable[[], Settings], data_sets: DataSets | None = None) -> None:
        self._current, self._data_sets = settings, data_sets or DataSets()
        self._states: WeakKeyDictionary[FilmModule, FilmState] = WeakKeyDictionary()
        # By `film_id`: a UNet and its copies. A process may load several checkpoints, each with settings of its own.
        self._built_with: dict[str, Settings] = {}
        self._statistics: WeakValueDictionary[str, TrainingStatistics] = WeakValueDictionary()
        self._providers: dict[tuple[str | None, ...], FeatureProvider] = {}
        # Loads of plain baselines whose FiLM has trained since, in this process.
        self.trained_loads: set[str] = set()
        self.kinds = RowKinds()

    def built(self, film: FilmModule, settings: Settings) -> None:
        """Note the settings that a module, and every copy of it, was built with."""
        self._built_with[film.film_id] = settings

    def settings_of(self, film: FilmModule) -> Settings:
        """Return the settings that a module was built with; those of this run for one that came by another way."""
        return self._built_with.get(film.film_id) or self._current()

    def of(self, film: FilmModule) -> FilmState:
        """Return the state of a module.

        Raises:
            EncoderError: the encoder that the settings name now is not the one FiLM was built for (its files changed).
        """
        if film not in self._states:
            settings = self.settings_of(film)
            provider = self._provider(settings, film.architecture.fingerprint)
            statistics = self._statistics.setdefault(film.film_id, TrainingStatistics(provider, self._data_sets))
            self._states[film] = FilmState(settings, provider, self._data_sets, statistics)
        return self._states[film]

    def _provider(self, settings: Settings, fingerprint: str | None) -> FeatureProvider:
        key = (fingerprint, settings.store, settings.cache_dir, settings.embedding_dtype, settings.on_missing_feature, settings.dataset_root)
        if key not in self._providers:
            provider = FeatureProvider.from_settings(settings)
            found = provider.encoder.identity.fingerprint
            if fingerprint not in provider.encoder.identity.fingerprints:
                raise EncoderError(
                    "the encoder is not the one FiLM was built for",
                    {"found": found, "expected": fingerprint, "model_name": settings.model_name},
                    "restart the run: the model's files changed while it was running",
                )
            self._providers[key] = provider
        return self._providers[key]
