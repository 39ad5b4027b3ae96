"""The runtime: the events of a host's run (configured, built, step, save, load), and the one place that puts the parts together for them.

Holds mode, settings, the states of the FiLM modules and the log lines. Host adapters describe, `hosts` patches, the patches call this.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from vlmfilm_plugin.checkpoints.facts import CheckpointFacts, resolve_with
from vlmfilm_plugin.checkpoints.metadata import adapt, rows_in, write_metadata
from vlmfilm_plugin.checkpoints.optimizer_state import match_at_load, names_by_group
from vlmfilm_plugin.checkpoints.peek import peek
from vlmfilm_plugin.errors import ConditionError, HostError, SettingsError
from vlmfilm_plugin.features.reordered import watch_order
from vlmfilm_plugin.features.shuffle_donor import DataSets
from vlmfilm_plugin.film.freezing import freeze_host, keep_trainable, optimizers_in, refuse_unfrozen
from vlmfilm_plugin.film.gates import describe_gate
from vlmfilm_plugin.film.module import ATTRIBUTE, film_modules
from vlmfilm_plugin.forward import context as conditioning
from vlmfilm_plugin.forward.attach import install
from vlmfilm_plugin.forward.handle import FilmHandle
from vlmfilm_plugin.host_spec import PHASES, RowMap, UNet, same_rows
from vlmfilm_plugin.log import film_logger
from vlmfilm_plugin.rows.ledger import Ledger
from vlmfilm_plugin.rows.loaders import watch_loaders
from vlmfilm_plugin.run.film_state import FilmStates
from vlmfilm_plugin.run.log_lines import Diagnostics, write_how_to_load_at_exit
from vlmfilm_plugin.run.running_batch import HostBatch, RunningBatch
from vlmfilm_plugin.run.training_check import check_model
from vlmfilm_plugin.settings.mode import MODE_VARIABLE, PREFIX, is_strict, refuse_changed_mode
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
        # Read when a model is first built: a model with FiLM of its own never asks.
        self._facts: Callable[[], CheckpointFacts | None] = lambda: None
        self._counted: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        self._said: set[str] = set()
        self._settings: Settings | None = None
        self._diagnostics: Diagnostics | None = None
        self._data_sets = DataSets()
        self.states = FilmStates(lambda: self.settings, self._data_sets)
        self.files: dict[str, Path | None] = {}
        watch_order()
        self.ledger = Ledger()
        self._is_watching_loaders = False
        self.attached = 0
        # Models and UNets with FiLM of their own, left to their owners.
        self.left = 0

    # Settings

    @property
    def settings(self) -> Settings:
        """Return the settings of this run; they are resolved at the first use after a change of their layers."""
        if self._settings is None:
            self._settings = self._resolve()
        return self._settings

    def _resolve(self) -> Settings:
        settings = resolve_with(self._facts(), self._environ, self._base_dir, host=self._host_config)
        if not settings.use_vlm_film:
            raise SettingsError(
                "this run was asked to be FiLM and not to be FiLM",
                {"found": f"{MODE_VARIABLE}={self.mode}, and use_vlm_film false   (from {settings.origin('use_vlm_film')})"},
                f"unset {MODE_VARIABLE} for a plain run, or set {PREFIX}USE_VLM_FILM=true, which wins over the host's own configuration",
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
        facts = peek(resume)
        self._facts = lambda: facts
        self._settings = self._diagnostics = None

    @contextmanager
    def loading(self, path: object) -> Iterator[None]:
        """Build models inside the block as the checkpoint at `path` says: its stages win, its encoder is the default."""
        outer, self._facts = self._facts, functools.cache(lambda: peek(path))
        self._settings = None
        try:
            yield
        finally:
            # A model keeps the settings it was built with; what is built after the block is built without this checkpoint.
            self._facts, self._settings = outer, None

    # Models

    def attach(self, unet: nn.Module, spec: UNet) -> FilmHandle | None:
        """Attach FiLM to a UNet whose `__init__` has just returned; None where it has it already (a subclass of a patched class)."""
        if hasattr(unet, ATTRIBUTE):
            return None
        settings = self.settings
        if MODE_VARIABLE in self._environ:
            refuse_changed_mode(self._environ[MODE_VARIABLE])
        handle = install(unet, settings, self.mode, spec)
        self.attached += 1
        self._say_once("settings without effect here", without_effect(settings))
        self._say_once("spatial gate", describe_gate(settings))
        self.states.built(handle.film, settings)
        stages = ", ".join(f"{stage.label} ({stage.path}, {stage.channels})" for stage in handle.stages)
        film_logger().info(
            "[VLM] FiLM attached: mode=%s%s encoder=%s unet=%s apply_point=%s stages=%s",
            self.mode,
            ""
            if (control := handle.film.architecture.feature_control) == "none"
            else f" feature_control={control} (a control, trained without the condition: no run of FiLM)",
            settings.encoder,
            type(unet).__name__,
            settings.apply_point,
            stages,
        )
        return handle

    def _say_once(self, what: str, line: str | None) -> None:
        if line is not None and line not in self._said:
            self._said.add(line)
            film_logger().info("[VLM] %s: %s", what, line)

    def require_film(self, model: nn.Module, host: str) -> None:
        """Check that a host's model contains FiLM once it is built.

        Raises:
            HostError: it has none, so the run would go on as a baseline.
        """
        if films := film_modules(model):
            settings = self.states.settings_of(films[0])
            if settings.freeze_host:
                freeze_host(model, self.mode, settings)
            return
        hparams = getattr(model, "hparams", {})
        raise HostError(
            f"{MODE_VARIABLE}={self.mode} asks for FiLM, but this {type(model).__name__} has no UNet that can carry it",
            {"host": host, "found": f"arch_name {hparams.get('arch_name')!r}" if "arch_name" in hparams else "no FiLM target in the model"},
            f"choose an architecture with a MedSegDiff-style UNet, or unset {MODE_VARIABLE} for a plain run",
        )

    def watch_loaders(self, choice: Callable[[Sequence[str]], str | None] | None = None) -> None:
        """Note the rows that data loaders give from now on; in mode `off`, which looks up no feature, nothing is watched.

        Args:
            choice: a host adapter's `HostSpec.choose_image`.
        """
        if choice is not None and choice not in self.ledger.choices:
            self.ledger.choices.append(choice)
        if self.mode != "off" and not self._is_watching_loaders:
            self._is_watching_loaders = True
            watch_loaders(self.ledger)

    def learn_image_files(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Note the untouched file behind each name; a name that stands for two files stands for neither from then on."""
        listed = list(pairs)
        self._data_sets.learn(listed)
        for name, path in listed:
            known = self.files.setdefault(name, Path(path))
            if known != Path(path):
                self.files[name] = None

    def optimizers_configured(self, model: nn.Module, configured: Any) -> Any:
        """Leave frozen parameters out of the optimizers that a host has configured; return them.

        Raises:
            HostError: FiLM is in none of them.
            SettingsError: the host is frozen, and parameters of it would train.
        """
        if not film_modules(model):
            return configured
        optimizers = list(optimizers_in(configured))
        names = [names_by_group(model, optimizer) for optimizer in optimizers]
        if self._is_frozen(model):
            refuse_unfrozen(model, self.states.settings_of(film_modules(model)[0]).origin("freeze_host"))
            configured = keep_trainable(configured)
        try:
            check_model(model, optimizers)
        except HostError as error:
            if is_strict(self._environ):
                raise
            film_logger().warning("[VLM] WARNING: %s", error)
        for optimizer, configured_names in zip(optimizers, names, strict=True):
            match_at_load(model, optimizer, configured_names)
        return configured

    def save_checkpoint(self, model: nn.Module, checkpoint: MutableMapping[str, Any]) -> None:
        """Add FiLM's metadata to a checkpoint that the host is about to save."""
        if films := film_modules(model):
            write_metadata(model, self.states.settings_of(films[0]), checkpoint, self.states.kinds.trained_on(films[0].film_id))
            write_how_to_load_at_exit()

    def load_checkpoint(self, model: nn.Module, checkpoint: MutableMapping[str, Any]) -> None:
        """Make a checkpoint fit before the host loads it strictly."""
        if films := film_modules(model):
            adapt(model, checkpoint, self.states.settings_of(films[0]))
            for film in films:
                self.states.kinds.recorded(film.film_id, rows_in(checkpoint))

    def _is_frozen(self, model: nn.Module) -> bool:
        films = film_modules(model)
        return bool(films) and self.states.settings_of(films[0]).freeze_host

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
        loaded: Any = None,
        is_whole: bool = False,
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
        doing = _doing(owner)
        given = HostBatch(
            batch,
            phase,
            value_range,
            rows,
            step,
            getattr(owner, "current_epoch", None),
            batch_idx,
            is_fit=doing in (None, "fit"),
            is_in_fit=doing == "fit",
            loaded=loaded,
            is_whole=is_whole,
            # The attribute behind Lightning's property, which raises where no trainer is attached.
            trainer=getattr(owner, "_trainer", None),
        )
        if phase == "train" and self.attached:
            # A host's loop may save by `torch.save` alone, which nothing here sees.
            write_how_to_load_at_exit()
        running = RunningBatch(given, self.states, self.diagnostics, self.files, self.ledger)
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


def _doing(owner: Any) -> str | None:
    """Return what the trainer of a step says that it does: `fit`, its validation included, `validate`, `test`, ...; None where none says so."""
    # The attribute behind Lightning's property, which raises where no trainer is attached.
    trainer = getattr(owner, "_trainer", None)
    doing = getattr(getattr(trainer, "state", None), "fn", None)
    return None if doing is None else str(getattr(doing, "value", doing))
