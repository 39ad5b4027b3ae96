"""The runtime: the one place that puts the parts together for a host's run.

Holds mode, settings, feature providers and diagnostics. Host adapters describe, `hosts` patches, the patches call this.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from vlmfilm_plugin.checkpoints.facts import CheckpointFacts
from vlmfilm_plugin.checkpoints.metadata import adapt, write_metadata
from vlmfilm_plugin.checkpoints.peek import peek
from vlmfilm_plugin.errors import ConditionError, EncoderError, HostError, SettingsError
from vlmfilm_plugin.features.provider import FeatureProvider
from vlmfilm_plugin.features.shuffle_donor import ShuffleDonors
from vlmfilm_plugin.film.freezing import freeze_host, keep_trainable
from vlmfilm_plugin.film.module import ATTRIBUTE, FilmModule, film_modules
from vlmfilm_plugin.forward import context as conditioning
from vlmfilm_plugin.forward.attach import install
from vlmfilm_plugin.forward.handle import FilmHandle
from vlmfilm_plugin.host_spec import PHASES, RowMap, UNet, same_rows
from vlmfilm_plugin.log import film_logger
from vlmfilm_plugin.run.batch_strategy import BatchStrategy
from vlmfilm_plugin.run.log_lines import Diagnostics
from vlmfilm_plugin.run.running_batch import RunningBatch
from vlmfilm_plugin.settings.layers import layers_of, resolve
from vlmfilm_plugin.settings.mode import MODE_VARIABLE, refuse_changed_mode
from vlmfilm_plugin.settings.port_names import without_effect
from vlmfilm_plugin.settings.record import Settings


class Runtime:
    """FiLM in one process.

    Args:
        mode: `on`, `off` or `shuffle`.
        environ: the environment at activation.
        base_dir: the working directory at activation; relative paths are relative to it, whatever the host changes to later.
    """

    def __init__(self, mode: str, environ: Mapping[str, str], base_dir: str) -> None:
        self.mode, self._environ, self._base_dir = mode, dict(environ), base_dir
        self._host_config: Mapping[str, object] | None = None
        self._facts: CheckpointFacts | None = None
        self._providers: dict[tuple[str | None, ...], FeatureProvider] = {}
        self._donors: dict[FeatureProvider, ShuffleDonors] = {}
        self._strategies: WeakKeyDictionary[FilmModule, BatchStrategy] = WeakKeyDictionary()
        self._held: WeakKeyDictionary[FilmModule, Tensor] = WeakKeyDictionary()
        self._counted: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        # By `film_id`: a UNet and its copies. A process may load several checkpoints, each with settings of its own.
        self._settings_by_film_id: dict[str, Settings] = {}
        self._warned_of_tensors: set[str] = set()
        self._said: set[str] = set()
        self._settings: Settings | None = None
        self._diagnostics: Diagnostics | None = None
        self.files: dict[str, Path | None] = {}
        self.attached = 0

    # Settings

    @property
    def settings(self) -> Settings:
        """Return the settings of this run; they are resolved at the first use after a change of their layers."""
        if self._settings is None:
            self._settings = self._resolve()
        return self._settings

    def _resolve(self) -> Settings:
        settings = resolve(layers_of(self._environ, self._base_dir, recorded=self._facts, host=self._host_config), self._base_dir)
        if not settings.use_vlm_film:
            raise SettingsError(
                "this run was asked to be FiLM and not to be FiLM",
                {"found": f"{MODE_VARIABLE}={self.mode}, and use_vlm_film false   (from {settings.origin('use_vlm_film')})"},
                f"unset {MODE_VARIABLE}, or take `use_vlm_film: false` out",
            )
        return settings

    @property
    def diagnostics(self) -> Diagnostics:
        """Return the writer of the log lines."""
        if self._diagnostics is None:
            self._diagnostics = Diagnostics(self.settings)
        return self._diagnostics

    def host_config(self, values: Mapping[str, object], resume: str | None) -> None:
        """Take settings from the host's own configuration, and from the checkpoint it will resume from."""
        self._host_config = values
        self._facts = peek(resume)
        self._settings = self._diagnostics = None

    @contextmanager
    def loading(self, path: object, *, weights_only: bool = False) -> Iterator[None]:
        """Build models inside the block as the checkpoint at `path` says: its stages win, its encoder is the default."""
        outer, self._facts = self._facts, peek(path, weights_only=weights_only)
        self._settings = None
        try:
            yield
        finally:
            # The settings stay those of the model that was loaded; only a later model is built without this checkpoint.
            resolved, self._facts = self._settings, outer
            self._settings = resolved

    # Models

    def attach(self, unet: nn.Module, spec: UNet) -> FilmHandle | None:
        """Attach FiLM to a UNet whose `__init__` has just returned; None where it has it already (a subclass of a patched class)."""
        if hasattr(unet, ATTRIBUTE):
            return None
        settings = self.settings
        if MODE_VARIABLE in self._environ:
            refuse_changed_mode(self._environ[MODE_VARIABLE])
        handle = install(unet, settings, self.mode, targets=spec.targets, channels=spec.channels, condition=spec.condition, masks=spec.masks)
        self.attached += 1
        self._say_without_effect(settings)
        self._settings_by_film_id[handle.film.film_id] = settings
        stages = ", ".join(f"{stage.index} ({stage.path}, {stage.channels})" for stage in handle.stages)
        film_logger().info(
            "[VLM] FiLM attached: mode=%s encoder=%s unet=%s apply_point=%s stages=%s",
            self.mode,
            settings.encoder,
            type(unet).__name__,
            settings.apply_point,
            stages,
        )
        return handle

    def _say_without_effect(self, settings: Settings) -> None:
        line = without_effect(settings)
        if line is not None and line not in self._said:
            self._said.add(line)
            film_logger().info("[VLM] settings without effect here: %s", line)

    def require_film(self, model: nn.Module, host: str) -> None:
        """Check that a host's model contains FiLM once it is built.

        Raises:
            HostError: it has none, so the run would go on as a baseline.
        """
        if films := film_modules(model):
            settings = self.settings_of(films[0])
            if settings.freeze_host:
                freeze_host(model, self.mode, settings)
            return
        hparams = getattr(model, "hparams", {})
        raise HostError(
            f"{MODE_VARIABLE}={self.mode} asks for FiLM, but this {type(model).__name__} has no UNet that can carry it",
            {"host": host, "found": f"arch_name {hparams.get('arch_name')!r}" if "arch_name" in hparams else "no FiLM target in the model"},
            f"choose an architecture with a MedSegDiff-style UNet, or unset {MODE_VARIABLE} for a plain run",
        )

    def learn_image_files(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Note the untouched file behind each name; a name that stands for two files stands for neither from then on."""
        for name, path in pairs:
            known = self.files.setdefault(name, Path(path))
            if known != Path(path):
                self.files[name] = None

    def optimizers_configured(self, model: nn.Module, configured: Any) -> Any:
        """Leave frozen parameters out of the optimizers that a host has configured; return them."""
        return keep_trainable(configured) if self._is_frozen(model) else configured

    def save_checkpoint(self, model: nn.Module, checkpoint: MutableMapping[str, Any]) -> None:
        """Add FiLM's metadata to a checkpoint that the host is about to save."""
        if films := film_modules(model):
            write_metadata(model, self.settings_of(films[0]), checkpoint)

    def load_checkpoint(self, model: nn.Module, checkpoint: MutableMapping[str, Any]) -> None:
        """Make a checkpoint fit before the host loads it strictly."""
        adapt(model, checkpoint, is_frozen=self._is_frozen(model))

    def _is_frozen(self, model: nn.Module) -> bool:
        films = film_modules(model)
        return bool(films) and self.settings_of(films[0]).freeze_host

    # Batches

    @contextmanager
    def batch(
        self,
        batch: Any,
        *,
        phase: str,
        value_range: tuple[float, float],
        rows: RowMap = same_rows,
        owner: Any = None,
        batch_idx: int | None = None,
        step: int | None = None,
    ) -> Iterator[None]:
        """Publish the running batch: UNet forwards inside the block are conditioned on its images.

        A host's step (`owner`) leaves a batch of the same images in force that is published already: a caller's, who has names.
        """
        outer = conditioning.batch_in_force()
        if owner is not None and isinstance(outer, RunningBatch) and outer.is_of(batch):
            yield
            return
        if phase not in PHASES:
            raise ConditionError(f"cannot publish a batch: unknown phase {phase!r}", {"expected": ", ".join(PHASES)}, "correct `phase`")
        if step is None:
            step = self._step_of(owner, phase)
        running = RunningBatch(self, batch, phase, value_range, rows, step, getattr(owner, "current_epoch", None), batch_idx)
        self.diagnostics.enter_phase(phase)
        with conditioning.in_force(running):
            yield

    def _step_of(self, owner: Any, phase: str) -> int | None:
        step = getattr(owner, "global_step", None)
        if isinstance(step, int) or owner is None:
            return step
        # A host without a step of its own: count its training batches.
        count = self._counted.get(owner, -1) + (phase == "train")
        self._counted[owner] = count
        return max(count, 0)

    def warn_of_tensors(self, phase: str) -> None:
        """Say once a phase that images are encoded as the host passes them, since no file was found for them."""
        if phase in self._warned_of_tensors:
            return
        self._warned_of_tensors.add(phase)
        cost = "each crop is encoded anew" if phase == "train" else "where training read files, these features are not of the same kind"
        film_logger().warning(
            "[VLM] WARNING: no source file was found for %s images: they are encoded as the host passes them, augmented, cropped or normalised, "
            "and %s (give `dataset_root`, or file paths in the batch)",
            phase,
            cost,
        )

    def provider_for(self, film: FilmModule) -> FeatureProvider:
        """Return the feature provider of this FiLM's encoder.

        Raises:
            EncoderError: the encoder that the settings name now is not the one FiLM was built for (its files changed).
        """
        settings = self.settings_of(film)
        key = (film.architecture.fingerprint, settings.cache_dir, settings.embedding_dtype, settings.on_missing_feature, settings.dataset_root)
        if key not in self._providers:
            provider = FeatureProvider.from_settings(settings)
            found = provider.encoder.identity.fingerprint
            if found != film.architecture.fingerprint:
                raise EncoderError(
                    "the encoder is not the one FiLM was built for",
                    {"found": found, "expected": film.architecture.fingerprint, "model_name": settings.model_name},
                    "restart the run: the model's files changed while it was running",
                )
            self._providers[key] = provider
        return self._providers[key]

    def donors_for(self, provider: FeatureProvider) -> ShuffleDonors:
        """Return what draws donors for images that are alone in their batch."""
        if provider not in self._donors:
            self._donors[provider] = ShuffleDonors(provider)
        return self._donors[provider]

    def settings_of(self, film: FilmModule) -> Settings:
        """Return the settings that a UNet's FiLM was built with; those of this run for one that came by another way (unpickled)."""
        return self._settings_by_film_id.get(film.film_id, self.settings)

    def strategy_for(self, film: FilmModule) -> BatchStrategy:
        """Return the strategy that chooses what this UNet's batches are conditioned on."""
        if film not in self._strategies:
            s = self.settings_of(film)
            self._strategies[film] = BatchStrategy(s.batch_strategy, s.reuse_policy, s.update_interval_steps_train)
        return self._strategies[film]

    def hold(self, film: FilmModule, features: Tensor) -> None:
        """Keep the feature (1, F) that a strategy holds over steps."""
        self._held[film] = features

    def held(self, film: FilmModule) -> Tensor:
        """Return the feature (1, F) that a strategy holds."""
        return self._held[film]
