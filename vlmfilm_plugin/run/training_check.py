"""Does FiLM train? Judged by what is in the optimizers when they are known, and where that proves nothing, by what an update changed."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vlmfilm_plugin.errors import HostError, some_of
from vlmfilm_plugin.film.module import ATTRIBUTE, FilmModule
from vlmfilm_plugin.settings.mode import STRICT_VARIABLE

# Updates after which an optimizer that has not changed a UNet is another network's; a loss scaler leaves the first few out.
_ENOUGH = 50
_FIX = f"build the optimizer after FiLM is attached, and let its parameter groups take names with {ATTRIBUTE!r} in"
_GO_ON = f"{STRICT_VARIABLE}=0 makes this a warning"


@dataclass
class _Before:
    """What a UNet held before an update of an optimizer that cannot be shown to be its own: one tensor of the host, and FiLM's change probes."""

    unet: ref[nn.Module]
    host: Tensor
    film: list[Tensor]


@dataclass
class _Suspicion:
    unets: list[_Before]
    updates: int = 0


class TrainingCheck:
    """Judge the optimizers of a process one by one, each before its updates until it is known."""

    def __init__(self) -> None:
        self._suspicions: WeakKeyDictionary[Optimizer, _Suspicion] = WeakKeyDictionary()

    def __call__(self, optimizer: Optimizer) -> bool:
        """Judge an optimizer that is about to update; return whether it need not be asked again.

        Raises:
            HostError: it trains a UNet whose FiLM does not train.
        """
        if (suspicion := self._suspicions.get(optimizer)) is not None:
            suspicion.updates += 1
            suspicion.unets = [before for before in suspicion.unets if _is_unchanged(before)]
            return not suspicion.unets or suspicion.updates >= _ENOUGH
        unets = [unet for unet in unets_with_film() if _is_meant_to_train(unet)]
        others = living_optimizers()
        if not unets or any([check_membership(unet, [optimizer], others) for unet in unets]):
            return True
        # Flattened or sharded parameters, full-precision masters, or another network's optimizer: what it changes will tell.
        remembered = [before for unet in unets if (before := _remember(unet)) is not None]
        self._suspicions[optimizer] = _Suspicion(remembered)
        return not remembered


def check_model(model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Check that FiLM trains in every UNet of a model that these optimizers train.

    Raises:
        HostError: it does not.
    """
    for unet in model.modules():
        if ATTRIBUTE in unet._modules and _is_meant_to_train(unet):
            check_membership(unet, optimizers)


def check_membership(unet: nn.Module, optimizers: Iterable[Optimizer], others: Iterable[Optimizer] = ()) -> bool:
    """Check that FiLM trains where one of `optimizers` trains its UNet; return whether one does.

    Args:
        others: further optimizers that may hold FiLM.

    Raises:
        HostError: FiLM's parameters are frozen, or those that are not are in no optimizer.
    """
    held = set(_held(optimizers))
    # A frozen copy, an EMA's say, may stand in the optimizer beside the UNet that trains.
    if not any(parameter.requires_grad and id(parameter) in held for parameter in unet.parameters()):
        return False
    film, headline = _film_of(unet), f"FiLM would not train while this {type(unet).__name__} does"
    parameters = dict(film.named_parameters())
    frozen = [name for name, parameter in parameters.items() if not parameter.requires_grad]
    if frozen:
        raise HostError(
            headline,
            {
                "found": f"{some_of(frozen)} of {ATTRIBUTE} do not require grad",
                "expected": f"all {len(parameters)} of its parameters to require grad in mode {film.mode}",
            },
            f"leave names with {ATTRIBUTE!r} out of what freezes them (a freeze by name, a wrapper that trains its own weights alone); {_GO_ON}",
        )
    held.update(_held(others))
    missing = [name for name, parameter in parameters.items() if id(parameter) not in held]
    if missing:
        facts = {"found": f"{some_of(missing)} of {ATTRIBUTE} in no optimizer", "expected": f"all {len(parameters)} of its parameters in one"}
        raise HostError(headline, facts, f"{_FIX}; {_GO_ON}")
    return True


def unets_with_film() -> list[nn.Module]:
    """Return the living modules of this process that hold FiLM, copies included."""
    # By type: `isinstance` would ask every proxy in the process for its class.
    return [item for item in gc.get_objects() if issubclass(type(item), nn.Module) and ATTRIBUTE in vars(item).get("_modules", ())]


def living_optimizers() -> list[Optimizer]:
    """Return the living optimizers of this process."""
    return [item for item in gc.get_objects() if issubclass(type(item), Optimizer)]


def _film_of(unet: nn.Module) -> FilmModule:
    film = unet._modules[ATTRIBUTE]
    assert isinstance(film, FilmModule)
    return film


def _is_meant_to_train(unet: nn.Module) -> bool:
    film = unet._modules[ATTRIBUTE]
    return isinstance(film, FilmModule) and film.mode != "off"


def _held(optimizers: Iterable[Optimizer]) -> Iterator[int]:
    for optimizer in optimizers:
        for group in getattr(optimizer, "param_groups", ()):
            yield from map(id, group["params"])


def _remember(unet: nn.Module) -> _Before | None:
    host = _first_of_host(unet)
    return None if host is None else _Before(ref(unet), host.clone(), [_local(probe).clone() for probe in _film_of(unet).change_probes()])


def _is_unchanged(before: _Before) -> bool:
    """Tell whether a UNet has not been updated yet.

    Raises:
        HostError: it has, and its FiLM has not.
    """
    unet = before.unet()
    host = None if unet is None else _first_of_host(unet)
    if unet is None or host is None or host.shape != before.host.shape:
        # Gone, or flattened since by a wrapper: no update of this optimizer.
        return False
    if _is_same(host, before.host):
        return True
    film = [_local(probe) for probe in _film_of(unet).change_probes()]
    if not all(map(_is_same, film, before.film)):
        return False
    facts = {"found": f"no parameter of {ATTRIBUTE} changed in an update that changed the UNet's", "expected": "both to change"}
    raise HostError(f"FiLM does not train while this {type(unet).__name__} does", facts, f"{_FIX}; {_GO_ON}")


def _first_of_host(unet: nn.Module) -> Tensor | None:
    named = ((name, _local(parameter)) for name, parameter in unet.named_parameters() if parameter.requires_grad)
    return next((parameter for name, parameter in named if parameter.numel() and not name.startswith(f"{ATTRIBUTE}.")), None)


def _local(parameter: Tensor) -> Tensor:
    """Return what this rank holds of a parameter."""
    held: Any = parameter.detach()
    return held.to_local() if hasattr(held, "to_local") else held  # type: ignore[no-any-return]


def _is_same(now: Tensor, then: Tensor) -> bool:
    return now.shape == then.shape and torch.equal(now.to(then.device), then)
