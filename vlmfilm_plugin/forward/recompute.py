"""Activation checkpointing: a function that autograd runs again re-enters the contexts of its forward (notes of `context`)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from vlmfilm_plugin.errors import ConditionError
from vlmfilm_plugin.forward.context import stacks

P = ParamSpec("P")

R = TypeVar("R")


def bind(function: Callable[P, R]) -> Callable[P, R]:
    """Return `function` bound to the contexts open now: it re-enters them whenever and on whichever thread it runs."""
    if not stacks.contexts:
        return function
    bound = [context.recomputing() for context in stacks.contexts]

    @functools.wraps(function)
    def rerun(*args: P.args, **kwargs: P.kwargs) -> R:
        if any(context.film.is_removed for context in bound):
            raise ConditionError(
                "a block is run again in backward(), but FiLM was removed from its UNet in between",
                {"expected": "backward() before `handle.remove()`"},
                "call backward() first",
            )
        outer, stacks.contexts = stacks.contexts, list(bound)
        try:
            return function(*args, **kwargs)
        finally:
            stacks.contexts = outer

    return rerun
