"""Who called the UNet: the host's own functions on the stack, outermost first, and what they were given."""

from __future__ import annotations

import inspect
import os
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from types import CodeType
from typing import Any

# Libraries whose functions drive a host's own; what they are given is given to the host's own as well.
_DRIVERS = ("torch", "lightning", "pytorch_lightning", "lightning_fabric", "accelerate", "vlmfilm_plugin", "ignite", "transformers", "runpy", "wrapt")
_LIGHTNING_STEPS = {"training_step": "train", "validation_step": "val", "test_step": "test", "predict_step": "predict"}
_TRAINS = ("train", "fit", "loss", "backward", "run_step", "optimize", "optimise", "update")
_EVALUATES = {"val": ("valid", "val_", "eval"), "test": ("test", "sampl", "predict", "infer")}


@dataclass(frozen=True)
class Caller:
    """A function of the host's that was running.

    Attributes:
        module: its module, `__main__` for the script.
        name: `function`, or `Class.method` of the class that defines it; `<module>` for the script's own lines.
        cls: that class, for a method.
        where: file and line.
        arguments: by name, as they were at that moment.
        is_reachable: whether it can be found by its name: no closure, no lambda.
    """

    module: str
    name: str
    cls: type | None
    where: str
    arguments: Mapping[str, Any]
    is_reachable: bool

    @property
    def text(self) -> str:
        return f"{self.module}:{self.name}"


def host_callers() -> list[Caller]:
    """Return the functions of the host's that are running in this thread, outermost first."""
    found = []
    level: Any = sys._getframe(1)
    while level is not None:
        if not _is_foreign(level):
            found.append(_caller(level))
        level = level.f_back
    return found[::-1]


def site_of_caller() -> str:
    """Return the file and line of the innermost function of the host's that is running."""
    level: Any = sys._getframe(1)
    while level is not None and _is_foreign(level):
        level = level.f_back
    return "" if level is None else _where(level)


def lightning_steps(cls: type) -> dict[str, str]:
    """Return the step methods of a Lightning module's class that it defines itself, with their phases; none for other classes."""
    is_lightning = any(base.__name__ == "LightningModule" for base in cls.__mro__)
    own = [each for each in cls.__mro__ if each.__module__.split(".")[0] not in _DRIVERS]
    return {name: phase for name, phase in _LIGHTNING_STEPS.items() if is_lightning and any(name in vars(each) for each in own)}


def phase_of(name: str, *, is_training: bool) -> str:
    """Return the phase that a function's name says, else what the net's own state says."""
    lower = name.lower().rpartition(".")[2]
    for phase, words in _EVALUATES.items():
        if any(word in lower for word in words):
            return phase
    return "train" if is_training or any(word in lower for word in _TRAINS) else "test"


def _is_foreign(level: Any) -> bool:
    name = str(level.f_globals.get("__name__", ""))
    file = level.f_code.co_filename
    if name.split(".")[0] in _DRIVERS or file.startswith("<"):
        return True
    standard = sysconfig.get_paths()["stdlib"]
    return file.startswith(standard + os.sep) and "site-packages" not in file


def _caller(level: Any) -> Caller:
    code: CodeType = level.f_code
    names: dict[str, Any] = level.f_locals
    count = code.co_argcount + code.co_kwonlyargcount
    more = sum(bool(code.co_flags & flag) for flag in (inspect.CO_VARARGS, inspect.CO_VARKEYWORDS))
    given = {name: names[name] for name in code.co_varnames[: count + more] if name in names}
    module = str(level.f_globals.get("__name__", "?"))
    first = code.co_varnames[0] if code.co_argcount else None
    holder = given.get(first) if first in ("self", "cls") else None
    if holder is not None:
        given.pop(str(first))
        for cls in (holder if isinstance(holder, type) else type(holder)).__mro__:
            if _code_of(vars(cls).get(code.co_name)) is code:
                return Caller(cls.__module__, f"{cls.__qualname__}.{code.co_name}", cls, _where(level), given, "<locals>" not in cls.__qualname__)
    is_function = _code_of(level.f_globals.get(code.co_name)) is code
    return Caller(module, code.co_name, None, _where(level), given, is_function)


def _code_of(value: Any) -> CodeType | None:
    value = getattr(value, "__func__", value)
    seen = 0
    while hasattr(value, "__wrapped__") and seen < 8:
        value, seen = value.__wrapped__, seen + 1
    code = getattr(value, "__code__", None)
    return code if isinstance(code, CodeType) else None


def _where(level: Any) -> str:
    file = level.f_code.co_filename
    here = os.path.relpath(file)
    return f"{file if here.startswith('..') else here}:{level.f_lineno}"
