"""Wrap a function of a class or module in place, and an instance's construction as a whole; each returns its undo."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import wrapt

Undo = Callable[[], None]
Wrapper = Callable[[Any, Any, Any, Any], Any]
Around = Callable[[Any, Any, Any, Any], AbstractContextManager[None]]
_NOTHING = object()


def undo_all(undos: list[Undo]) -> Undo:
    """Return what runs a list of undos once, last first."""

    def undo() -> None:
        while undos:
            undos.pop()()

    return undo


class _BoundWrapper(wrapt.BoundFunctionWrapper):  # type: ignore[type-arg]
    @property
    def __func__(self) -> Callable[..., Any]:
        """Return a function of the instance that is wrapped as well: accelerate's `prepare` binds it anew, around its autocast."""
        wrapper, original = self._self_parent, self.__wrapped__

        @functools.wraps(original)
        def function(instance: Any, /, *args: Any, **kwargs: Any) -> Any:
            return wrapper.__get__(instance, type(instance))(*args, **kwargs)

        # Whoever unwraps would arrive at the host's own function.
        del function.__wrapped__
        function.__signature__ = inspect.signature(original.__func__)  # type: ignore[attr-defined]
        return function


class _Wrapper(wrapt.FunctionWrapper):  # type: ignore[type-arg]
    __bound_function_wrapper__ = _BoundWrapper


def wrap(owner: Any, name: str, wrapper: Wrapper) -> Undo:
    """Wrap an attribute by wrapt, its signature kept."""
    before = vars(owner).get(name, _NOTHING)
    wrapt.wrap_object(owner, name, _Wrapper, (wrapper,))
    return _restore(owner, name, before)


def replace(owner: Any, name: str, value: Any) -> Undo:
    """Set an attribute."""
    before = vars(owner).get(name, _NOTHING)
    setattr(owner, name, value)
    return _restore(owner, name, before)


def _restore(owner: Any, name: str, before: Any) -> Undo:
    ours = vars(owner)[name]

    def undo() -> None:
        # What someone has wrapped again since is theirs.
        if vars(owner).get(name) is not ours:
            return
        if before is _NOTHING:
            delattr(owner, name)
        else:
            setattr(owner, name, before)

    return undo


class _Running(threading.local):
    def __init__(self) -> None:
        self.depth: dict[int, int] = {}


def when_built(cls: Any, built: Callable[[Any], None], around: Around = lambda *_: nullcontext()) -> Undo:
    """Call `built(instance)` when the outermost `__init__` of an instance returns: a subclass's, where it goes on after `super()`'s.

    `__init__` of subclasses is wrapped as they are defined. One that is set on a subclass afterwards (`@dataclass`) is not seen: then
    `built` is called too early, and whoever relies on it checks at the first use.

    Args:
        around: entered around the `__init__` of `cls` itself, with (wrapped, instance, args, kwargs).
    """
    running = _Running()
    undos: list[Undo] = []

    def init(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> None:
        key = id(instance)
        running.depth[key] = running.depth.get(key, 0) + 1
        try:
            wrapped(*args, **kwargs)
        finally:
            running.depth[key] -= 1
            is_outermost = not running.depth[key]
            if is_outermost:
                del running.depth[key]
        if is_outermost:
            built(instance)

    def below(owner: Any) -> None:
        for subclass in owner.__subclasses__():
            if "__init__" in vars(subclass):
                undos.append(wrap(subclass, "__init__", init))
            below(subclass)

    original = vars(cls).get("__init_subclass__")

    def init_subclass(subclass: Any, /, **kwargs: Any) -> None:
        if original is not None:
            original.__get__(None, subclass)(**kwargs)
        else:
            super(cls, subclass).__init_subclass__(**kwargs)
        if "__init__" in vars(subclass):
            undos.append(wrap(subclass, "__init__", init))

    def own_init(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> None:
        def entered(*args: Any, **kwargs: Any) -> None:
            with around(wrapped, instance, args, kwargs):
                wrapped(*args, **kwargs)

        init(entered, instance, args, kwargs)

    undos.append(wrap(cls, "__init__", own_init))
    below(cls)
    undos.append(replace(cls, "__init_subclass__", classmethod(init_subclass)))
    return undo_all(undos)
