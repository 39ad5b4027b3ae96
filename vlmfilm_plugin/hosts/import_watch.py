"""Call back when a module has finished executing: the internals of CPython's import system, alone in this file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import wrapt


def when_ready(name: str, callback: Callable[[ModuleType], None]) -> None:
    """Call `callback(module)` when module `name` has finished executing: now, at the end of its import, or at its later import."""
    module = sys.modules.get(name)
    if module is not None and is_initialising(module):
        # The host's own `import torch` called us: it is half-executed, and a post-import hook would run at once on the half.
        _at_end_of_execution(module, callback)
    else:
        wrapt.register_post_import_hook(lambda module: when_done(module, callback), name)


def when_done(module: ModuleType, callback: Callable[[ModuleType], None]) -> None:
    """Call back now, or, where a module is still executing (an import cycle), at its end."""
    if is_initialising(module):
        _at_end_of_execution(module, callback)
    else:
        callback(module)


def when_reloaded(callbacks: Mapping[str, Callable[[ModuleType], None]]) -> Callable[[], None]:
    """Call back when one of these modules has been executed again by `importlib.reload`; return the undo."""
    finder = ReloadFinder(callbacks)
    sys.meta_path.insert(0, finder)

    def undo() -> None:
        if finder in sys.meta_path:
            sys.meta_path.remove(finder)

    return undo


class ReloadFinder(MetaPathFinder):
    """Call back when a watched module has been executed again by `importlib.reload`: its classes are new and not patched yet.

    wrapt's hooks run at the first import alone. Only a reload hands the module itself to `find_spec`; every other search is left alone.
    """

    def __init__(self, callbacks: Mapping[str, Callable[[ModuleType], None]]) -> None:
        self._callbacks = callbacks

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        callback = self._callbacks.get(fullname)
        if target is None or callback is None:
            return None
        specs = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in specs if spec is not None), None)
        loader: Any = spec.loader if spec is not None else None
        if loader is not None:
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                callback(module)

            loader.exec_module = exec_module
        return spec


def refuse_import(name: str, message: str) -> None:
    """Make every further import of a module stop with SystemExit(message), and forget the module as it is now."""
    sys.modules.pop(name, None)
    sys.meta_path.insert(0, _Refusal(name, message))


class _Refusal(MetaPathFinder):
    def __init__(self, name: str, message: str) -> None:
        self._name, self._message = name, message

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname == self._name:
            raise SystemExit(self._message)
        return None


def is_initialising(module: ModuleType) -> bool:
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


def _at_end_of_execution(module: ModuleType, callback: Callable[[ModuleType], None]) -> None:
    """Call back when importlib sets `spec._initializing` to False, through a property on a class of this one spec."""
    spec: Any = module.__spec__
    original = type(spec)

    def finish(self: Any, value: bool) -> None:
        self.__dict__["_initializing"] = value
        if not value:
            self.__class__ = original
            if sys.modules.get(self.name) is module:
                callback(module)
            else:
                # The import failed and took the module out again; a retry is another module.
                when_ready(self.name, callback)

    watched = type(original.__name__, (original,), {"_initializing": property(lambda self: self.__dict__.get("_initializing", False), finish)})
    spec.__class__ = watched
