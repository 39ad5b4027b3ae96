"""Host adapters by entry point: loaded one by one, asked what they say of a module or a configuration. Patches nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import EntryPoint
from types import ModuleType
from typing import Any

import pluggy

from vlmfilm_plugin import host_spec
from vlmfilm_plugin.errors import HostError
from vlmfilm_plugin.host_spec import HostSpec, Listing
from vlmfilm_plugin.hosts.adapter_files import TRIGGERS, FileAdapter


class AdapterRegistry:
    """Host adapters by entry point: loaded one by one, when their host module shows up.

    `failures` holds what could not be loaded: (entry point name, error).
    """

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager(host_spec.PROJECT)
        self._manager.add_hookspecs(host_spec)
        self.failures: list[tuple[str, BaseException]] = []

    def load(self, entry_point: EntryPoint | FileAdapter) -> None:
        """Load one host adapter; a broken one is noted and the others go on."""
        try:
            self.register(entry_point.load())
        except (Exception, SystemExit) as error:
            self.failures.append((f"{entry_point.name} = {entry_point.value}", error))

    def register(self, adapter: Any) -> None:
        """Register a host adapter: any object or module with a `vlmfilm_host` hook.

        Raises:
            HostError: it has no such hook, or a misspelt one.
        """
        if self._manager.is_registered(adapter):
            return
        try:
            self._manager.register(adapter)
            self._manager.check_pending()
            if not self._manager.get_hookcallers(adapter):
                raise pluggy.PluginValidationError(adapter, "it implements no hook")
        except pluggy.PluginValidationError as error:
            # pluggy keeps a plugin that it has just found invalid.
            if self._manager.is_registered(adapter):
                self._manager.unregister(adapter)
            raise HostError(
                f"cannot use host adapter {getattr(adapter, '__name__', adapter)!r}",
                {"found": error, "expected": "a function `vlmfilm_host(module)` marked with `vlmfilm_plugin.hookimpl`"},
                "correct the host adapter",
            ) from error

    def recognise(self, module: ModuleType) -> HostSpec | None:
        """Return what the one host adapter that recognises `module` says of it, or None.

        Raises:
            HostError: more than one host adapter recognises it, or one returned something else than a `HostSpec`.
        """
        # What the user names for this run goes before what is installed.
        installed = [each for each in self._manager.get_plugins() if not hasattr(each, TRIGGERS)]
        specs: Sequence[HostSpec] = self._manager.subset_hook_caller("vlmfilm_host", installed)(module=module)
        if not specs:
            specs = self._manager.hook.vlmfilm_host(module=module)
        for wrong in (spec for spec in specs if not isinstance(spec, HostSpec)):
            raise HostError(
                f"cannot use what a host adapter says of {module.__name__}",
                {"found": f"`vlmfilm_host` returned {wrong!r:.200}", "expected": "a `vlmfilm_plugin.HostSpec`, or None"},
                "correct the host adapter",
            )
        if len(specs) > 1:
            raise HostError(
                f"more than one host adapter recognises {module.__name__}",
                {"found": ", ".join(spec.name for spec in specs), "expected": "one"},
                "uninstall all but one of them",
            )
        return specs[0] if specs else None

    def listings(self, config: Mapping[str, Any], splits: Sequence[str]) -> list[Listing]:
        """Return what each host adapter that knows this host configuration lists of these splits."""
        found: list[Listing] = self._manager.hook.vlmfilm_listing(config=config, splits=tuple(splits))
        return found
