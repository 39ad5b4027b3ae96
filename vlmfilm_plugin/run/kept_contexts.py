"""What evaluation computes once for a batch and uses in all of its forwards: an ODE solver calls the UNet hundreds of times."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmfilm_plugin.film.module import FilmModule
from vlmfilm_plugin.forward.context import ForwardContext


class KeptContexts:
    """The contexts of one batch's forwards without gradients, kept while the FiLM weights stay as they are."""

    def __init__(self) -> None:
        self._kept: dict[Any, ForwardContext] = {}
        self._change_probes: dict[int, list[Tensor]] = {}

    def context(self, film: FilmModule, x: Tensor, features: Tensor, index: Tensor | None) -> ForwardContext:
        """Return the context of a forward with input x (R, ...): a kept one where there is one."""
        self._forget_if_changed(film)
        key = (id(film), x.shape[0], x.device, id(index))
        if key not in self._kept:
            shared = next((context.shared for (owner, *_), context in self._kept.items() if owner == id(film)), {})
            self._kept[key] = ForwardContext(film, features, index, shared=shared)
        context = self._kept[key]
        context.ran.clear()
        return context

    def _forget_if_changed(self, film: FilmModule) -> None:
        """Forget what was kept for a UNet whose FiLM weights changed inside the batch, such as by an EMA swapped in for one forward.

        A swap through `.data` leaves no trace but the values themselves. On an accelerator they cannot be compared without a
        synchronisation, so nothing is kept there: gamma and beta are a few small kernels a forward.
        """
        known, now = self._change_probes.get(id(film)), film.change_probes()
        if now[0].device.type == "cpu" and known is not None and all(map(torch.equal, known, now)):
            return
        for key in [key for key in self._kept if key[0] == id(film)]:
            del self._kept[key]
        self._change_probes[id(film)] = [probe.detach().clone() for probe in now]
