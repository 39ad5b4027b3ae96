"""Hosts that apply FiLM themselves: what is theirs is marked, said once, and left alone."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from vlmfilm_plugin.log import film_logger
from vlmfilm_plugin.settings.mode import MODE_VARIABLE

# An attribute of the instance: a deepcopy (of an EMA, say) is its owner's, too.
_MARK = "_vlmfilm_left_to_its_owner"


class _Building(threading.local):
    def __init__(self) -> None:
        # One entry a model whose `__init__` runs: how to use the plugin's FiLM instead, None where the model applies none itself.
        self.models: list[str | None] = []


_building = _Building()


def is_left(instance: Any) -> bool:
    """Tell whether FiLM of this model or UNet is its own affair."""
    return _MARK in getattr(instance, "__dict__", {})


def has_left(model: Any) -> bool:
    """Tell whether a model, or a module in it, is left to its owner."""
    return is_left(model) or any(is_left(module) for module in getattr(model, "modules", tuple)())


def leave(instance: Any, instead: str = "") -> None:
    """Mark a model or UNet as left to its owner; `instead` is what is still to be said of it."""
    instance.__dict__[_MARK] = instead


def announce(instance: Any, mode: str) -> None:
    """Say which FiLM is active, and how to use the plugin's; once."""
    instead, instance.__dict__[_MARK] = instance.__dict__[_MARK], ""
    if not instead:
        return
    film_logger().info(
        "[VLM] the host's own FiLM is active, not the plugin's: %s applies FiLM itself and reads %s=%s itself; nothing was attached. "
        "To use the plugin's instead: %s",
        type(instance).__name__,
        MODE_VARIABLE,
        mode,
        instead,
    )


@contextmanager
def building(own_film: Callable[[Mapping[str, Any]], str | None] | None, init: Any, instance: Any, args: Any, kwargs: Any) -> Iterator[None]:
    """Note for the UNets built inside the block what their model says of its own FiLM; leave it to its owner if it has any."""
    if own_film is None:
        yield
        return
    bound = inspect.signature(init).bind(*args, **kwargs)
    bound.apply_defaults()
    instead = own_film(bound.arguments)
    _building.models.append(instead)
    try:
        yield
    finally:
        _building.models.pop()
    if instead is not None:
        leave(instance, instead)


def said_by_models() -> tuple[bool, str | None]:
    """Return whether a model that knows is being built, and how to use the plugin's FiLM instead of its own."""
    return bool(_building.models), next((instead for instead in reversed(_building.models) if instead), None)
