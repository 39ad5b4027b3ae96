"""`film_lr_scale`: FiLM's parameters learn at a multiple of the learning rate that the host's optimizer gives them.

After every optimizer step, what the step did to FiLM's parameters is multiplied. Every torch optimizer moves a parameter by its learning
rate times something, weight decay included, so this is the learning rate's factor to rounding; an LBFGS with a line search is no such one.
Parameter groups, schedulers, and the state of optimizers stay the host's: a checkpoint resumes with another factor, or with none, and
there is nothing to do where a host has one group, many, or builds its optimizer by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from vlmfilm_plugin.film.module import FilmModule

_scaled: WeakSet[FilmModule] = WeakSet()
_before: WeakKeyDictionary[Optimizer, list[tuple[Tensor, Tensor, float]]] = WeakKeyDictionary()
_hooks: list[Any] = []


def scale_learning_rate(film: FilmModule, factor: float) -> Callable[[], None]:
    """Multiply what optimizer steps do to the parameters of a FiLM, and of its copies, from now on; return a function that undoes it.

    A factor of 1 does nothing at all.
    """
    film.lr_scale = factor
    if factor == 1:
        return lambda: None
    _scaled.add(film)
    if not _hooks:
        # For every optimizer of the process: whoever builds it, and when.
        _hooks.extend((register_optimizer_step_pre_hook(_keep), register_optimizer_step_post_hook(_scale)))

    def undo() -> None:
        film.lr_scale = 1.0
        _scaled.discard(film)
        if not _scaled:
            while _hooks:
                _hooks.pop().remove()

    return undo


def _keep(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Note FiLM's parameters before a step."""
    factors = {id(parameter): factor for parameter, factor in _parameters()}
    if kept := [(p, p.detach().clone(), factors[id(p)]) for p in _held(optimizer) if id(p) in factors and p.requires_grad]:
        _before[optimizer] = kept


@torch.no_grad()
def _scale(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Put FiLM's parameters at the said part of the way that the step went."""
    for parameter, before, factor in _before.pop(optimizer, ()):
        # A step that was skipped leaves `before` to the bit.
        parameter.copy_(before + factor * (parameter - before))


def _held(optimizer: Optimizer) -> Iterable[Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _parameters() -> Iterator[tuple[Tensor, float]]:
    films = {copied for film in list(_scaled) for copied in film.copies()}
    return ((parameter, film.lr_scale) for film in films if not film.is_removed for parameter in film.parameters())
