"""Load adapters and patch the hosts they describe, with wrapt: in place, once, signatures kept.

The only file that wraps a host's functions. An adapter says what; see `hookspecs`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import EntryPoint
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pluggy
import wrapt

from vlmfilm_plugin import host_spec as hookspecs
from vlmfilm_plugin.errors import HostError
from vlmfilm_plugin.host_spec import Config, HostSpec, Listing, ImageFiles, Steps, UNet

if TYPE_CHECKING:
    from vlmfilm_plugin.run.runtime import Runtime

_MARK = "__vlmfilm_patched__"


class AdapterRegistry:
    """Adapters by entry point: loaded one by one, when their host module shows up.

    `failures` holds what could not be loaded: (entry point name, error).
    """

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self.failures: list[tuple[str, BaseException]] = []

    def load(self, entry_point: EntryPoint) -> None:
        """Load one adapter; a broken one is noted and the others go on."""
        try:
            self.register(entry_point.load())
        except Exception as error:
            self.failures.append((f"{entry_point.name} = {entry_point.value}", error))

    def register(self, adapter: Any) -> None:
        """Register an adapter: any object or module with a `vlmfilm_host` hook.

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
                f"cannot use adapter {getattr(adapter, '__name__', adapter)!r}",
                {"found": error, "expected": "a function `vlmfilm_host(module)` marked with `vlmfilm_plugin.hookimpl`"},
                "correct the adapter",
            ) from error

    def recognise(self, module: ModuleType) -> HostSpec | None:
        """Return what the one adapter that recognises `module` says of it, or None.

        Raises:
            HostError: more than one adapter recognises it.
        """
        specs: Sequence[HostSpec] = self._manager.hook.vlmfilm_host(module=module)
        if len(specs) > 1:
            raise HostError(
                f"more than one adapter recognises {module.__name__}",
                {"found": ", ".join(spec.name for spec in specs), "expected": "one"},
                "uninstall all but one of them",
            )
        return specs[0] if specs else None

    def listings(self, config: Mapping[str, Any], splits: Sequence[str]) -> list[Listing]:
        """Return what each adapter that knows this host configuration lists of these splits."""
        found: list[Listing] = self._manager.hook.vlmfilm_listing(config=config, splits=tuple(splits))
        return found


def patch_host(module: ModuleType, spec: HostSpec, runtime: Runtime) -> None:
    """Patch what a host module contributes; a second call for the same classes changes nothing."""
    for unet in spec.unets:
        _once(unet.cls, "unet", lambda unet=unet: _patch_unet(unet, runtime))  # type: ignore[misc]
    for steps in spec.steps:
        for method, phase in steps.phases.items():
            _once(steps.cls, f"step {method}", lambda steps=steps, m=method, p=phase: _patch_step(steps, m, p, runtime))  # type: ignore[misc]
    for model in spec.models:
        _once(model, "model", lambda model=model: _patch_model(model, spec.name, runtime))  # type: ignore[misc]
    for config in spec.configs:
        _once(config.cls, f"config {config.method}", lambda config=config: _patch_config(config, runtime))  # type: ignore[misc]
    for sources in spec.image_files:
        _once(sources.cls, "sources", lambda sources=sources: _patch_image_files(sources, runtime))  # type: ignore[misc]
    for name in spec.recompute:
        # `from torch.utils import checkpoint` would be a module: its calls are not seen, and a recomputed block then raises.
        function = vars(module).get(name)
        # By the function itself: a reload puts a plain one in the place of ours and keeps every other name of the module.
        if inspect.isroutine(function) and not isinstance(function, wrapt.FunctionWrapper):
            _patch_recompute(module, name)


def _once(owner: Any, what: str, patch: Callable[[], None]) -> None:
    done = owner.__dict__.get(_MARK, frozenset())
    if what not in done:
        patch()
        setattr(owner, _MARK, done | {what})


def _patch_unet(spec: UNet, runtime: Runtime) -> None:
    def init(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> None:
        wrapped(*args, **kwargs)
        runtime.attach(instance, spec)

    wrapt.wrap_function_wrapper(spec.cls, "__init__", init)


def _patch_step(spec: Steps, method: str, phase: str | Callable[[Any], str], runtime: Runtime) -> None:
    signature = inspect.signature(getattr(spec.cls, method))

    def step(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        arguments = signature.bind(instance, *args, **kwargs).arguments
        arguments.pop(next(iter(signature.parameters)))
        batch_idx = arguments.get("batch_idx")
        with runtime.batch(
            spec.batch(arguments),
            phase=phase(instance) if callable(phase) else phase,
            value_range=spec.value_range,
            rows=spec.rows,
            owner=instance,
            batch_idx=batch_idx,
        ):
            return wrapped(*args, **kwargs)

    wrapt.wrap_function_wrapper(spec.cls, method, step)


def _patch_model(model: type, host: str, runtime: Runtime) -> None:
    def init(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> None:
        wrapped(*args, **kwargs)
        runtime.require_film(instance, host)

    wrapt.wrap_function_wrapper(model, "__init__", init)
    if not hasattr(model, "on_load_checkpoint"):
        return

    def save(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        result = wrapped(*args, **kwargs)
        runtime.save_checkpoint(instance, args[0] if args else kwargs["checkpoint"])
        return result

    def load(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        runtime.load_checkpoint(instance, args[0] if args else kwargs["checkpoint"])
        return wrapped(*args, **kwargs)

    def report(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        runtime.diagnostics.report_validation()
        return wrapped(*args, **kwargs)

    def configure(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        return runtime.optimizers_configured(instance, wrapped(*args, **kwargs))

    wrapt.wrap_function_wrapper(model, "configure_optimizers", configure)
    wrapt.wrap_function_wrapper(model, "on_save_checkpoint", save)
    wrapt.wrap_function_wrapper(model, "on_load_checkpoint", load)
    wrapt.wrap_function_wrapper(model, "on_fit_end", report)
    _patch_load_from_checkpoint(model, runtime)


def _patch_load_from_checkpoint(model: Any, runtime: Runtime) -> None:
    # Lightning's own descriptor, which only binds to a class: wrapt's function wrapper does not know it.
    original = inspect.getattr_static(model, "load_from_checkpoint")

    def load_from_checkpoint(cls: Any, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        with runtime.loading(checkpoint_path, weights_only=kwargs.get("weights_only") is True):
            return original.__get__(None, cls)(checkpoint_path, *args, **kwargs)

    load_from_checkpoint.__doc__ = model.load_from_checkpoint.__doc__
    model.load_from_checkpoint = classmethod(load_from_checkpoint)


def _patch_config(spec: Config, runtime: Runtime) -> None:
    signature = inspect.signature(getattr(spec.cls, spec.method))

    def read(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        arguments = signature.bind(instance, *args, **kwargs).arguments
        arguments.pop(next(iter(signature.parameters)))
        runtime.host_config(spec.read(arguments), spec.resume(arguments) if spec.resume else None)
        return wrapped(*args, **kwargs)

    wrapt.wrap_function_wrapper(spec.cls, spec.method, read)


def _patch_image_files(spec: ImageFiles, runtime: Runtime) -> None:
    def init(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> None:
        wrapped(*args, **kwargs)
        runtime.learn_image_files(spec.read(instance))

    wrapt.wrap_function_wrapper(spec.cls, "__init__", init)


def _patch_recompute(module: ModuleType, name: str) -> None:
    from vlmfilm_plugin.forward.context import bind

    def checkpoint(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        if args:
            return wrapped(bind(args[0]), *args[1:], **kwargs)
        return wrapped(**{**kwargs, "function": bind(kwargs["function"])})

    wrapt.wrap_function_wrapper(module, name, checkpoint)
