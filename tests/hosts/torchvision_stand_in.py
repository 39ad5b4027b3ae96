"""A stand-in for torchvision where it is not installed: libraries import names of it that the nets under test never use."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Sequence
from typing import Any


class _Named(type):
    """The type of a stand-in class, which has any attribute."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return f"torchvision stand-in {name}"


class _Module(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Named(name, (), {"__init__": _refuse})


def _refuse(self: Any, *args: Any, **kwargs: Any) -> None:
    raise RuntimeError(f"{type(self).__name__} of torchvision is needed, which is not installed")


class _Finder:
    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        is_ours = name.partition(".")[0] == "torchvision"
        return importlib.machinery.ModuleSpec(name, _Finder, is_package=True) if is_ours else None  # type: ignore[arg-type]

    @staticmethod
    def create_module(spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = _Module(spec.name)
        module.__path__ = []
        return module

    @staticmethod
    def exec_module(module: types.ModuleType) -> None:
        module.__version__ = "0"  # type: ignore[attr-defined]


def provide_torchvision() -> None:
    """Put a stand-in behind all finders; libraries that look for torchvision themselves are imported before, and do not see it."""
    if importlib.util.find_spec("torchvision") is None:
        import torchmetrics  # noqa: F401
        import transformers.utils.import_utils as found

        found.is_torchvision_available()
        sys.meta_path.append(_Finder)  # type: ignore[arg-type]
