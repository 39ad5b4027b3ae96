"""Patch the hosts that adapters describe, with wrapt: in place, once, signatures kept. The only file that wraps a host's functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

import wrapt

from vlmfilm_plugin.host_spec import Config, HostSpec, ImageFiles, Steps, UNet

if TYPE_CHECKING:
    from vlmfilm_plugin.run.runtime import Runtime

_MARK = "__vlmfilm_patched__"


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
    for end in ("on_validation_end", "on_fit_end"):
        wrapt.wrap_function_wrapper(model, end, report)
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
    from vlmfilm_plugin.forward.recompute import bind

    def checkpoint(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        if args:
            return wrapped(bind(args[0]), *args[1:], **kwargs)
        return wrapped(**{**kwargs, "function": bind(kwargs["function"])})

    wrapt.wrap_function_wrapper(module, name, checkpoint)
