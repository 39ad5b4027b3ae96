"""Patch what host adapters describe, with wrapt: in place, once, signatures kept. With `wrapping`, all that touches a host's functions."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

import wrapt

from vlmfilm_plugin.host_spec import Config, HostSpec, ImageFiles, Model, Steps, UNet
from vlmfilm_plugin.hosts import own_film
from vlmfilm_plugin.hosts.wrapping import Undo, replace, undo_all, when_built, wrap

if TYPE_CHECKING:
    from vlmfilm_plugin.run.runtime import Runtime

_MARK = "__vlmfilm_patched__"


def patch_host(module: ModuleType, spec: HostSpec, runtime: Runtime) -> Undo:
    """Patch what a host module contributes; a second call for the same classes changes nothing. Return the undo."""
    undos: list[Undo] = []
    runtime.watch_loaders(spec.choose_image)

    def once(owner: Any, what: str, patch: Callable[[], list[Undo]]) -> None:
        if what not in _patched(owner):
            undos.extend(patch())
            setattr(owner, _MARK, _patched(owner) | {what})
            undos.append(lambda: setattr(owner, _MARK, _patched(owner) - {what}))

    for unet in spec.unets:
        once(unet.cls, "unet", lambda unet=unet: [_patch_unet(unet, runtime)])  # type: ignore[misc]
    for steps in spec.steps:
        for method, phase in steps.phases.items():
            once(steps.cls, f"step {method}", lambda steps=steps, m=method, p=phase: [_patch_step(steps, m, p, runtime)])  # type: ignore[misc]
    for model in spec.models:
        described = model if isinstance(model, Model) else Model(cls=model)
        once(described.cls, "model", lambda model=described: _patch_model(model, spec.name, runtime))  # type: ignore[misc]
    for config in spec.configs:
        once(config.cls, f"config {config.method}", lambda config=config: [_patch_config(config, runtime)])  # type: ignore[misc]
    for sources in spec.image_files:
        once(sources.cls, "sources", lambda sources=sources: [_patch_image_files(sources, runtime)])  # type: ignore[misc]
    for name in spec.recompute:
        function = vars(module).get(name)
        # By the function itself: a reload puts a plain one in the place of ours and keeps every other name of the module.
        if inspect.isroutine(function) and not isinstance(function, wrapt.FunctionWrapper):
            undos.append(_patch_recompute(module, name))
    return undo_all(undos)


def _patched(owner: Any) -> frozenset[str]:
    done: frozenset[str] = vars(owner).get(_MARK, frozenset())
    return done


def _patch_unet(spec: UNet, runtime: Runtime) -> Undo:
    def built(unet: Any) -> None:
        described = next(cls for cls in type(unet).__mro__ if "unet" in _patched(cls))
        if described is not spec.cls:
            return  # A subclass with a description of its own.
        is_known, instead = own_film.said_by_models()
        if not is_known and spec.own_film is not None and (instead := spec.own_film(unet)) is not None:
            own_film.leave(unet, instead)
            own_film.announce(unet, runtime.mode)
        if instead is None:
            runtime.attach(unet, spec)
        else:
            own_film.leave(unet)
            runtime.left += 1

    return when_built(spec.cls, built)


def _patch_step(spec: Steps, method: str, phase: str | Callable[[Any], str], runtime: Runtime) -> Undo:
    signature = inspect.signature(getattr(spec.cls, method))

    def step(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        if own_film.is_left(instance):
            return wrapped(*args, **kwargs)
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
            loaded=spec.loaded(arguments) if spec.loaded else None,
            is_whole=spec.is_whole,
        ):
            return wrapped(*args, **kwargs)

    return wrap(spec.cls, method, step)


def _patch_model(model: Model, host: str, runtime: Runtime) -> list[Undo]:
    def around(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        return own_film.building(model.own_film, wrapped, instance, args, kwargs)

    def built(instance: Any) -> None:
        if own_film.is_left(instance):
            own_film.announce(instance, runtime.mode)
            runtime.left += 1
        elif own_film.has_left(instance):
            own_film.leave(instance)
        else:
            runtime.require_film(instance, host)

    undos = [when_built(model.cls, built, around)]
    return undos + (_patch_lightning(model.cls, runtime) if hasattr(model.cls, "on_load_checkpoint") else [])


def _patch_lightning(model: Any, runtime: Runtime) -> list[Undo]:
    def save(instance: Any, checkpoint: Any) -> None:
        runtime.save_checkpoint(instance, checkpoint)

    def load(instance: Any, checkpoint: Any) -> None:
        runtime.load_checkpoint(instance, checkpoint)

    def report(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        if not own_film.is_left(instance):
            runtime.diagnostics.report_validation()
        return wrapped(*args, **kwargs)

    def configure(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        configured = wrapped(*args, **kwargs)
        return configured if own_film.is_left(instance) else runtime.optimizers_configured(instance, configured)

    return [
        wrap(model, "configure_optimizers", configure),
        wrap(model, "on_save_checkpoint", _with_checkpoint(after=save)),
        wrap(model, "on_load_checkpoint", _with_checkpoint(before=load)),
        *(wrap(model, end, report) for end in ("on_validation_end", "on_fit_end")),
        _patch_load_from_checkpoint(model, runtime),
    ]


def _with_checkpoint(
    before: Callable[[Any, Any], None] | None = None, after: Callable[[Any, Any], None] | None = None
) -> Callable[[Any, Any, Any, Any], Any]:
    def hook(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        is_left = own_film.is_left(instance)
        checkpoint = args[0] if args else kwargs["checkpoint"]
        if before is not None and not is_left:
            before(instance, checkpoint)
        result = wrapped(*args, **kwargs)
        if after is not None and not is_left:
            after(instance, checkpoint)
        return result

    return hook


class _LoadFromCheckpoint:
    """Lightning's own descriptor, with the checkpoint's facts in force during the call; wrapt's function wrapper does not know that kind."""

    def __init__(self, original: Any, runtime: Runtime) -> None:
        self._original, self._runtime = original, runtime

    def __get__(self, instance: Any, cls: Any = None) -> Any:
        bound = self._original.__get__(instance, cls)
        if instance is not None:
            return bound  # Lightning refuses to be called on an instance, whose weights would stay as they are

        @functools.wraps(bound)
        def load_from_checkpoint(*args: Any, **kwargs: Any) -> Any:
            with self._runtime.loading(args[0] if args else kwargs.get("checkpoint_path")):
                return bound(*args, **kwargs)

        return load_from_checkpoint


def _patch_load_from_checkpoint(model: Any, runtime: Runtime) -> Undo:
    original = inspect.getattr_static(model, "load_from_checkpoint")
    return replace(model, "load_from_checkpoint", _LoadFromCheckpoint(original, runtime))


def _patch_config(spec: Config, runtime: Runtime) -> Undo:
    signature = inspect.signature(getattr(spec.cls, spec.method))

    def read(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        arguments = signature.bind(instance, *args, **kwargs).arguments
        arguments.pop(next(iter(signature.parameters)))
        runtime.host_config(spec.read(arguments), spec.resume(arguments) if spec.resume else None)
        return wrapped(*args, **kwargs)

    return wrap(spec.cls, spec.method, read)


def _patch_image_files(spec: ImageFiles, runtime: Runtime) -> Undo:
    return when_built(spec.cls, lambda dataset: runtime.learn_image_files(spec.read(dataset)))


def _patch_recompute(module: ModuleType, name: str) -> Undo:
    from vlmfilm_plugin.forward.recompute import bind

    def checkpoint(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        if args:
            return wrapped(bind(args[0]), *args[1:], **kwargs)
        return wrapped(**{**kwargs, "function": bind(kwargs["function"])})

    return wrap(module, name, checkpoint)
