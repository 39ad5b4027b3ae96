"""Activation: from a started process to patched hosts. Imports neither torch nor a host; both come later, if at all.

Order: mode checked -> host adapters found by entry point -> each host module watched -> recognised by structure -> patched.
A host that is recognised while something is wrong stops the process: SystemExit, since an exception in a post-import hook fails
the import once and lets a retry run unpatched, and since hosts catch `Exception`.
"""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.metadata import EntryPoint
from types import ModuleType
from typing import TYPE_CHECKING, Any

from vlmfilm_plugin.entry_points import HOSTS, installed
from vlmfilm_plugin.errors import HostError, SettingsError, VlmFilmError
from vlmfilm_plugin.hosts.adapter_files import FileAdapter, absolute_paths, file_adapters
from vlmfilm_plugin.hosts.explain import nothing_attached
from vlmfilm_plugin.hosts.import_watch import is_initialising, refuse_import, when_ready, when_reloaded
from vlmfilm_plugin.hosts.training_watch import TrainingWatch
from vlmfilm_plugin.log import say
from vlmfilm_plugin.settings.mode import HOSTS_VARIABLE, MODE_VARIABLE, STRICT_VARIABLE, is_strict, read_mode, refuse_changed_mode

if TYPE_CHECKING:
    from vlmfilm_plugin.hosts.library_unets import LibraryUNets
    from vlmfilm_plugin.hosts.registry import AdapterRegistry
    from vlmfilm_plugin.run.runtime import Runtime
    from vlmfilm_plugin.run.training_check import TrainingCheck

# Imported by whatever attaches FiLM, never from here: it needs torch.
_FILM = "vlmfilm_plugin.film.module"


class Activation:
    """The state of an activated process.

    Attributes:
        error: what is wrong with the mode, or None.
        seen: host modules that were imported, by name -> what became of them.
        libraries: modules of libraries that were imported likewise; that alone asks for nothing.
        late: host modules that were imported before activation.
    """

    def __init__(self) -> None:
        self.environ = dict(os.environ)
        self.base_dir = os.getcwd()
        self.error: VlmFilmError | None = None
        self.mode: str | None = None
        self.seen: dict[str, str] = {}
        self.libraries: dict[str, str] = {}
        self.late: set[str] = set()
        self._is_watching = False
        self._registry: AdapterRegistry | None = None
        self._runtime: Runtime | None = None
        self._adapters: dict[str, list[EntryPoint | FileAdapter]] = {}
        self._library_unets: LibraryUNets | None = None
        self.is_strict = True
        try:
            self.is_strict = is_strict(self.environ)
            self.mode = read_mode(self.environ)
        except VlmFilmError as error:
            self.error = error
        self.training = TrainingWatch(self.is_attached, _has_film_existed, self._nothing_attached, _check, is_strict=self.is_strict)

    def watch(self) -> None:
        """Watch every host module that a host adapter names; what is imported already is patched now. Done once, unless it was refused."""
        if self._is_watching:
            return
        from_files = self._files()
        adapters = self._adapters = {}
        found: list[EntryPoint | FileAdapter] = [*installed(HOSTS), *from_files]
        for entry in found:
            adapters.setdefault(entry.name, []).append(entry)
        for name in adapters:
            if name in sys.modules and not is_initialising(sys.modules[name]):
                self.late.add(name)
        for name, entries in adapters.items():
            when_ready(name, partial(self.host_imported, entries))
        when_reloaded({name: partial(self.host_imported, entries) for name, entries in adapters.items()})
        self._is_watching = True
        self.training.start()

    def _files(self) -> list[FileAdapter]:
        """Load the host adapters that are files; children find them by the same paths, wherever they start.

        Raises:
            SystemExit: one cannot be used; an exception would be taken for a broken installation by the start-up gate.
        """
        paths = absolute_paths(self.environ, self.base_dir)
        if paths:
            os.environ[HOSTS_VARIABLE] = os.pathsep.join(map(str, paths))
        try:
            return file_adapters(paths)
        except HostError as error:
            raise SystemExit(f"vlmfilm: {type(error).__name__}: {error}") from error

    @property
    def runtime(self) -> Runtime:
        """Return the runtime; it is built when a host shows up, since it needs torch."""
        if self._runtime is None:
            from vlmfilm_plugin.run.runtime import Runtime

            self._runtime = Runtime(self.mode or "on", self.environ, self.base_dir)
        return self._runtime

    @property
    def registry(self) -> AdapterRegistry:
        """Return the host adapters."""
        if self._registry is None:
            from vlmfilm_plugin.hosts.registry import AdapterRegistry

            self._registry = AdapterRegistry()
        return self._registry

    @property
    def library_unets(self) -> LibraryUNets:
        """Return the UNets of libraries."""
        if self._library_unets is None:
            from vlmfilm_plugin.hosts.library_unets import LibraryUNets

            self._library_unets = LibraryUNets(lambda: self.runtime, self._has_host)
        return self._library_unets

    def host_imported(self, adapters: Sequence[EntryPoint | FileAdapter], module: ModuleType) -> None:
        """Recognise and patch a host module whose import has finished."""
        from vlmfilm_plugin.hosts.patches import patch_host

        name = module.__name__
        try:
            known = len(self.registry.failures)
            for adapter in adapters:
                self.registry.load(adapter)
            for broken, error in self.registry.failures[known:]:
                say(f"host adapter {broken} cannot be loaded: {type(error).__name__}: {error}")
            spec = self.registry.recognise(module)
            if spec is None:
                self.seen[name] = "its structure is not that of a known host"
                if len(self.registry.failures) > known:
                    self._refuse_failed(name, *self.registry.failures[-1])
                return
            if spec.is_library and self.error is not None:
                self.libraries[name] = "not watched: the mode is wrong"
                return
            if self.error is not None:
                raise self.error
            self._refuse_late(module, spec)
            if spec.is_library:
                self.library_unets.patch(module, spec)
                self.libraries[name] = f"watched as {spec.name}"
                return
            patch_host(module, spec, self.runtime)
            self.seen[name] = f"patched as {spec.name}"
            self.training.stop_watching_networks()
        except Exception as error:
            self.seen[name] = f"stopped: {type(error).__name__}"
            if name in self.late:
                # Called by hand in a running process, a notebook say: its owner sees the error itself.
                raise
            sys.stdout.flush()
            # An interactive session survives; the same import again must not find the module as it is, unpatched.
            message = f"vlmfilm: {type(error).__name__}: {error}"
            refuse_import(name, message)
            raise SystemExit(message) from error

    def is_attached(self) -> bool:
        """Tell whether a module of this process has FiLM now, the host's own included."""
        if self._runtime is not None and self._runtime.left:
            return True
        film = sys.modules.get(_FILM)
        counts = () if self._library_unets is None else (self._library_unets.is_attached,)
        return film is not None and bool(film.is_any_attached(*counts))

    def _has_host(self) -> bool:
        return any(fate.startswith("patched") for fate in self.seen.values())

    def _nothing_attached(self, optimizer: str) -> VlmFilmError:
        if self.error is not None:
            return self.error
        failures = {} if self._registry is None else dict(self._registry.failures)
        return nothing_attached(optimizer, self.environ.get(MODE_VARIABLE), self._adapters, self.seen | self.libraries, failures)

    def _refuse_failed(self, name: str, adapter: str, failure: BaseException) -> None:
        """Stop a host whose own host adapter cannot be loaded."""
        from vlmfilm_plugin.errors import HostError

        if self.is_strict:
            raise HostError(
                f"{MODE_VARIABLE}={self.environ.get(MODE_VARIABLE)} asks for FiLM, but the host adapter of {name} cannot be loaded",
                {"host adapter": adapter, "found": f"{type(failure).__name__}: {failure}", "expected": "a host adapter that can be imported"},
                f"correct or uninstall it; {STRICT_VARIABLE}=0 makes this a warning",
            )

    def _refuse_late(self, module: ModuleType, spec: Any) -> None:
        """Refuse a host from which a UNet was built before activation: that UNet would run as a baseline."""
        import gc

        if module.__name__ not in self.late:
            return
        # By type: `isinstance` would ask every proxy in the process for its class.
        built = [
            type(item).__name__
            for item in gc.get_objects()
            for unet in spec.unets
            if issubclass(type(item), unet.cls) and not (unet.own_film and unet.own_film(item))
        ]
        if built:
            from vlmfilm_plugin.errors import HostError

            raise HostError(
                f"{module.__name__} was imported, and {built[0]} built, before VLM-FiLM was activated",
                {"found": f"{len(built)} UNet without FiLM", "expected": f"{MODE_VARIABLE} set before the first `import torch`"},
                "restart the process with the variable set, or call vlmfilm_plugin.attach(unet) on it",
            )

    def report_at_exit(self) -> None:
        """Say loudly that FiLM was not active, where a host module was imported and nothing was attached."""
        if multiprocessing.parent_process() is not None:
            # A DataLoader's worker imports the host for its data sets alone.
            return
        if isinstance(getattr(sys, "last_value", None), VlmFilmError):
            # The run ended with an error of ours, which says what is wrong; this would bury it.
            return
        is_attached = _has_film_existed() or (self._runtime is not None and bool(self._runtime.attached or self._runtime.left))
        is_stopped = self.training.has_refused or any(fate.startswith("stopped") for fate in self.seen.values())
        if is_attached or is_stopped or not (self.seen or self.training.network):
            return
        say(f"WARNING: {MODE_VARIABLE}={self.environ.get(MODE_VARIABLE)} was set, but VLM-FiLM was NOT active in this process: nothing was attached")
        for name, fate in self.seen.items():
            say(f"  {name}: {fate}")
        if not self.seen:
            say(f"  {self.training.network} ran, and no module that a host adapter names was imported (`vlmfilm doctor` lists them)")


_activation: Activation | None = None


def current() -> Activation | None:
    """Return the activation of this process, or None while it is dormant."""
    return _activation


def activate() -> Activation:
    """Watch for hosts in this process; a second call changes nothing.

    Called by the `torch.backends` entry point when `VLM_FILM_MODE` is set; a notebook that sets it later calls
    `vlmfilm_plugin.activate()`. Relative paths of settings are relative to the working directory of this moment.
    """
    global _activation
    if _activation is None:
        _activation = Activation()
        if _activation.error is not None:
            say(" ".join(str(_activation.error).split()))
        atexit.register(_activation.report_at_exit)
    else:
        refuse_changed_mode(_activation.environ.get(MODE_VARIABLE))
    # After an activation that was refused this tries again, with the same state.
    _activation.watch()
    return _activation


def running_batch(
    batch: Any,
    *,
    phase: str,
    value_range: tuple[float, float] = (0.0, 1.0),
    step: int | None = None,
    loaded: Any = None,
    is_whole: bool = False,
) -> AbstractContextManager[None]:
    """Publish the batch that UNet forwards inside the block belong to: for training loops of your own around a supported host or library.

    Nothing happens where `VLM_FILM_MODE` is unset: the same script runs plain.

    Args:
        batch: a mapping with `image` (B, C, H, W) and, where there are any, names (see the README on cache keys).
        phase: `train`, `val`, `test` or `predict`.
        value_range: (low, high) of the images.
        step: the training step; it seeds `shuffle` and decides which steps are logged.
        loaded: the tensor (B, ...) by which the row ledger knows the rows, where `image` is not what the data loader gave.
        is_whole: `image` shows the whole image or volume of each row, neither cropped nor augmented: then its pixels may stand for a file that
            cannot be read as an image. For volumes: a slice or a projection of the whole, (B, C, H, W), made before any crop.

    Raises:
        SettingsError: `VLM_FILM_MODE` is set, and the process is not activated, or the mode is none.
    """
    if _activation is None and MODE_VARIABLE not in os.environ:
        return nullcontext()
    if _activation is None or _activation.mode is None:
        raise SettingsError(
            "cannot publish a batch: VLM-FiLM is not active in this process",
            {"found": f"{MODE_VARIABLE}={os.environ.get(MODE_VARIABLE)!r}", "expected": "on, off or shuffle, before `import torch`"},
            f"set {MODE_VARIABLE}, or use `vlmfilm_plugin.attach(unet)` and `handle.condition(...)`",
        )
    return _activation.runtime.batch(batch, phase=phase, value_range=value_range, step=step, loaded=loaded, is_whole=is_whole)


def _has_film_existed() -> bool:
    film = sys.modules.get(_FILM)
    return film is not None and bool(film.FilmModule.has_existed)


def _check(optimizer: Any) -> bool:
    return _training_check()(optimizer)


@functools.cache
def _training_check() -> TrainingCheck:
    from vlmfilm_plugin.run.training_check import TrainingCheck

    return TrainingCheck()
