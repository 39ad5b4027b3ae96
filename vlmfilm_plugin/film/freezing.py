"""`freeze_host`: only FiLM trains; the host's parameters keep their values to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from vlmfilm_plugin.errors import SettingsError, some_of
from vlmfilm_plugin.film.module import film_modules
from vlmfilm_plugin.settings.record import Settings


def freeze_host(model: nn.Module, mode: str, settings: Settings) -> Callable[[], None]:
    """Stop the gradients of every parameter of a model that is not FiLM's; return a function that undoes it.

    Raises:
        SettingsError: in mode `off` FiLM does not train either.
    """
    if mode == "off":
        raise SettingsError(
            "nothing would train",
            {"found": f"freeze_host true   (from {settings.origin('freeze_host')}), and mode off, in which FiLM does not train"},
            "use mode on, or take `freeze_host` out",
        )
    film = {id(parameter) for module in film_modules(model) for parameter in module.parameters()}
    frozen = [parameter for parameter in model.parameters() if id(parameter) not in film and parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)

    def undo() -> None:
        for parameter in frozen:
            parameter.requires_grad_(True)

    return undo


def refuse_unfrozen(model: nn.Module, origin: str) -> None:
    """Check that no parameter of a frozen host trains, such as one of a layer that was built after it was frozen.

    Raises:
        SettingsError: one does.
    """
    film = {id(parameter) for module in film_modules(model) for parameter in module.parameters()}
    training = [name for name, parameter in model.named_parameters() if parameter.requires_grad and id(parameter) not in film]
    if training:
        raise SettingsError(
            f"the host's parameters would train although this {type(model).__name__} is frozen",
            {"found": f"{some_of(training)} require grad", "expected": f"FiLM's alone   (freeze_host true, from {origin})"},
            "build every layer before FiLM is attached, or take `freeze_host` out",
        )


def keep_trainable(configured: Any) -> Any:
    """Take frozen parameters out of the optimizers that a `configure_optimizers` returned, in place; return what it returned."""
    for optimizer in optimizers_in(configured):
        for group in optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if parameter.requires_grad]
    return configured


def optimizers_in(held: Any) -> Iterator[Optimizer]:
    """Yield the optimizers in what a `configure_optimizers` returned."""
    if isinstance(held, Optimizer):
        yield held
    elif isinstance(held, Mapping):
        for value in held.values():
            yield from optimizers_in(value)
    elif isinstance(held, list | tuple):
        for value in held:
            yield from optimizers_in(value)
