"""The masks of one UNet forward, for a spatial gate: in its input, in the batch, or in what the UNet itself predicts.

A prediction costs a forward of the UNet: with FiLM and without a gate, without gradients, and without a trace: the random stream, the
buffers and the training flags are afterwards what they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from vlmfilm_plugin.errors import ConditionError
from vlmfilm_plugin.film.kept import buffers_kept, random_streams_kept
from vlmfilm_plugin.film.module import FilmModule
from vlmfilm_plugin.forward.recompute import stacks
from vlmfilm_plugin.host_spec import Masks


class ForwardMasks:
    """Where the masks of one forward are, as the host adapter states it.

    Args:
        unet: the module that is about to run.
        film: its FiLM.
        args, kwargs: what it was called with.
        x: its input (R, C, H, W).
        places: what the host adapter says.
    """

    def __init__(self, unet: nn.Module, film: FilmModule, args: Sequence[Any], kwargs: Mapping[str, Any], x: Tensor, places: Masks) -> None:
        self._unet, self._film, self._args, self._kwargs, self._x, self._places = unet, film, args, kwargs, x, places

    def state(self) -> Tensor:
        """Return the mask in the UNet's input (R, 1, H, W)."""
        mask: Tensor = self._stated("state", "which part of the UNet's input is the mask", "pred")(self._x)
        return mask

    def truth(self, batch: Any) -> Tensor:
        """Return the ground truth of a batch (B, 1, H, W)."""
        mask: Tensor = self._stated("truth", "where the ground truth of a batch is", "pred")(batch)
        return mask

    def prediction(self) -> Tensor:
        """Return the mask that the UNet predicts (R, 1, H, W): the sigmoid of its logits."""
        read = self._stated("prediction", "which part of the UNet's output is the mask", "state")
        with torch.no_grad(), random_streams_kept([self._x.device]), self._buffers_kept(), self._alone():
            output = self._unet(*self._args, **self._kwargs)
            logits: Tensor = read(output)
        return torch.sigmoid(logits.detach().float())

    def _stated(self, name: str, what: str, other: str) -> Callable[[Any], Any]:
        function: Callable[[Any], Any] | None = getattr(self._places, name)
        if function is None:
            raise ConditionError(
                f"cannot find the mask for the spatial gate of {type(self._unet).__name__}: its host adapter does not say {what}",
                {"found": f"Masks.{name} is not stated", "expected": "a function in `UNet(masks=Masks(...))` of the host adapter"},
                f"take `source: {other}` in `junction_gating_config`, or give `junction_mask` in the batch",
            )
        return function

    def _buffers_kept(self) -> AbstractContextManager[None]:
        # In evaluation normalisation layers count nothing.
        is_counting = any(module.training for module in self._unet.modules())
        return buffers_kept(self._unet) if is_counting else nullcontext()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        stacks.first_passes.append(self._film)
        try:
            yield
        finally:
            stacks.first_passes.pop()


def only_channel(output: Any) -> Tensor:
    """Return an output (R, 1, H, W) as it is: where no host adapter says which part of more channels is the mask, none is taken."""
    if isinstance(output, Tensor) and output.dim() == 4 and output.shape[1] == 1:
        return output
    found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    facts = {"found": found, "expected": "a tensor (R, 1, H, W)"}
    raise ConditionError("cannot find the mask in the output of this UNet", facts, "give the gate itself: `handle.condition(gate=...)`")
