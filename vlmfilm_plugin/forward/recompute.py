"""What is open on a thread, and how a function that autograd runs again in `backward()` re-enters it (notes of `context`).

Knows of contexts only that they can be re-entered. While anything is open, both ways in which `torch.utils.checkpoint` keeps a
function for later are watched where torch itself keeps it, so that it does not matter under which name a host called it.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
from torch.utils import checkpoint as torch_checkpoint

from vlmfilm_plugin.errors import ConditionError

P = ParamSpec("P")
R = TypeVar("R")

NO_TASK = -1
"""What `graph_task` returns outside of `backward()`."""


class Reenterable(Protocol):
    """A context, as far as re-entering it goes."""

    film: Any
    task: int

    def reentered(self, *, keep: bool) -> Any:
        """Return the context for a function that is run again now; `keep` what was computed for it already."""

    def fill_compiled(self) -> Callable[[], None]:
        """Put gamma and beta where compiled blocks find them; return what takes them out again."""


class _Stacks(threading.local):
    def __init__(self) -> None:
        self.conditions: list[Any] = []
        self.contexts: list[Any] = []
        # The graph task (one `backward()`) in which these conditions hold.
        self.task = NO_TASK
        # FiLM of the contexts opened since a bound function began; None outside of one.
        self.opened: list[Any] | None = None
        # FiLM modules whose UNet runs to serve a gate of its own.
        self.first_passes: list[Any] = []
        # (FiLM, what sees its blocks) of UNets that run to be looked at alone.
        self.looks: list[Any] = []


stacks = _Stacks()


def graph_task() -> int:
    """Return the number of the `backward()` that runs on this thread, or `NO_TASK`."""
    return torch._C._current_graph_task_id()


def bind(function: Callable[P, R], *, keep: bool = False) -> Callable[P, R]:
    """Return `function` bound to what is open now: it re-enters it whenever and on whichever thread it runs.

    Args:
        keep: what was computed for a context serves again. Only where autograd never runs backward through the second run's graph:
            through a shared graph it would run twice.
    """
    conditions, contexts = list(stacks.conditions), list(stacks.contexts)
    if not (conditions or contexts):
        return function
    films: list[Any] = [context.film for context in contexts]

    @functools.wraps(function)
    def rerun(*args: P.args, **kwargs: P.kwargs) -> R:
        if any(film.is_removed for film in films):
            raise ConditionError(
                "a block is run again in backward(), but FiLM was removed from its UNet in between",
                {"expected": "backward() before `handle.remove()`"},
                "call backward() first",
            )
        outer = stacks.conditions, stacks.contexts, stacks.task, stacks.opened
        entered = [context.reentered(keep=keep) for context in contexts]
        stacks.conditions, stacks.contexts, stacks.task, stacks.opened = list(conditions), list(entered), graph_task(), []
        # Outside of backward() the forward that runs has left them.
        undo = [] if stacks.task == NO_TASK else [context.fill_compiled() for context in entered]
        watch.enter()
        try:
            return function(*args, **kwargs)
        finally:
            watch.leave()
            for take_out in reversed(undo):
                take_out()
            films.extend(film for film in stacks.opened or () if film not in films)
            stacks.conditions, stacks.contexts, stacks.task, stacks.opened = outer

    return rerun


class _Watch:
    """Bind every function that torch's activation checkpointing keeps, while anything is open anywhere in the process.

    Reentrant checkpointing keeps it in `CheckpointFunction.forward` and later runs backward through a graph of its own; the other kind
    keeps it in a `_CheckpointFrame` and takes nothing from the second run but the tensors to save, which must be those of the first.
    """

    def __init__(self) -> None:
        self._lock, self._count = threading.Lock(), 0
        self._undo: list[Callable[[], None]] = []

    def enter(self) -> None:
        """Watch; `leave` as often undoes it."""
        with self._lock:
            self._count += 1
            if self._count == 1:
                self._undo = [_wrap(torch_checkpoint.CheckpointFunction, "forward", 1, keep=False)]
                kept = getattr(torch_checkpoint, "_CheckpointFrame", None)
                # Private to torch. Without it a block that is run again finds nothing open, and raises.
                self._undo += [] if kept is None else [_wrap(kept, "__init__", 1, keep=True)]

    def leave(self) -> None:
        """Undo one `enter`."""
        with self._lock:
            self._count -= 1
            if self._count == 0:
                while self._undo:
                    self._undo.pop()()


def _wrap(owner: type, name: str, position: int, *, keep: bool) -> Callable[[], None]:
    """Bind the argument at `position` of every call of a method; return the undo."""
    original = owner.__dict__[name]
    function: Callable[..., Any] = original.__func__ if isinstance(original, staticmethod) else original

    @functools.wraps(function)
    def bound(*args: Any, **kwargs: Any) -> Any:
        if len(args) <= position:
            return function(*args, **kwargs)
        return function(*args[:position], bind(args[position], keep=keep), *args[position + 1 :], **kwargs)

    ours = staticmethod(bound) if isinstance(original, staticmethod) else bound
    setattr(owner, name, ours)

    def undo() -> None:
        # Someone may have wrapped it again in between; ours then stays below and binds nothing.
        if owner.__dict__.get(name) is ours:
            setattr(owner, name, original)

    return undo


watch = _Watch()
