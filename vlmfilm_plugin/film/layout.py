"""Where the features are in what a block returns, and where their channels are: tuples, tokens, channels last, one to three dimensions."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, MutableMapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from vlmfilm_plugin.errors import HostError
from vlmfilm_plugin.film.heads import Head
from vlmfilm_plugin.film.layers import AdaptiveFiLMHead

RANKS = (1, 2, 3)
AXES = (1, -1)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The features of one block.

    Attributes:
        rank: number of spatial dimensions.
        axis: where the channels are: 1 or -1.
        output: which element of the block's output they are; None: the output itself.
        is_stated: someone said where the channels are; else the first forward must bear it out.
    """

    rank: int = 2
    axis: int = 1
    output: int | str | None = None
    is_stated: bool = True

    def take(self, output: Any, path: str) -> Tensor:
        """Return the features in a block's output.

        Raises:
            HostError: there is no tensor where they should be.
        """
        found = output
        if self.output is not None:
            found = _element(output, self.output)
        if isinstance(found, Tensor):
            return found
        what = kind_of(output) if self.output is None or found is None else f"{type(found).__name__} at {self.output!r}"
        raise HostError(
            f"cannot modulate block {path!r}: no tensor where its features should be",
            {"found": what, "expected": "a tensor" if self.output is None else f"a tensor at {self.output!r}"},
            "state `output`: which element of the block's output is modulated",
        )

    def put(self, output: Any, features: Tensor) -> Any:
        """Return a block's output with other features in their place; the output itself is left as it was."""
        name = self.output
        if name is None:
            return features
        if isinstance(output, tuple) and isinstance(name, int):
            items = [*output]
            items[name] = features
            return type(output)._make(items) if hasattr(output, "_make") else tuple(items) if type(output) is tuple else type(output)(items)
        copied: Any = copy.copy(output)
        if isinstance(copied, list | MutableMapping):
            copied[cast(Any, name)] = features
        else:
            # Of a frozen dataclass, too.
            object.__setattr__(copied, cast(str, name), features)
        return copied

    def sizes(self, features: Tensor) -> tuple[int, ...]:
        """Return the spatial size of features."""
        shape = tuple(features.shape)
        return shape[2:] if self.axis == 1 else shape[1:-1]

    def fits(self, features: Tensor, rows: int, channels: int) -> bool:
        """Tell whether features are of this rank, of so many rows and so many channels."""
        return features.dim() == self.rank + 2 and features.shape[0] == rows and features.shape[self.axis] == channels

    def modulate(self, head: Head, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        """Return features modulated by a head, which itself knows (B, C, H, W); gamma and beta (B, C, 1, 1)."""
        if self.rank == 2 and self.axis == 1:
            return head.modulate(x, gamma, beta)
        if type(head).modulate is AdaptiveFiLMHead.modulate:
            shape = [1] * x.dim()
            shape[0], shape[self.axis] = gamma.shape[0], gamma.shape[1]
            return head.modulate(x, gamma.reshape(shape), beta.reshape(shape))
        first = x.movedim(self.axis, 1)
        y = head.modulate(first.reshape(*first.shape[:2], -1, 1), gamma, beta)
        return y.reshape(first.shape).movedim(1, self.axis)

    def resize(self, gate: Tensor, x: Tensor, interp: str) -> Tensor:
        """Return a gate (R, 1, H, W) in the size of two-dimensional features, to be multiplied with them."""
        size = self.sizes(x)
        if interp == "nearest":
            resized = nn.functional.interpolate(gate, size=size, mode="nearest")
        else:
            resized = nn.functional.interpolate(gate, size=size, mode="bilinear", align_corners=False, antialias=True)
        return resized.movedim(1, self.axis)


def kind_of(output: Any) -> str:
    """Return what a block returned, in words."""
    if isinstance(output, Tensor):
        return f"a tensor {tuple(output.shape)}"
    if isinstance(output, tuple | list):
        return f"{type(output).__name__} of {len(output)}: " + ", ".join(_brief(item) for item in output[:4])
    if isinstance(output, Mapping):
        return f"{type(output).__name__} with {', '.join(map(repr, list(output)[:6]))}"
    return type(output).__name__


def _brief(item: Any) -> str:
    return str(tuple(item.shape)) if isinstance(item, Tensor) else type(item).__name__


def _element(output: Any, name: int | str) -> Any:
    if isinstance(name, int):
        return output[name] if isinstance(output, tuple | list) and -len(output) <= name < len(output) else None
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None) if not isinstance(output, Tensor) else None


def convolutions_in(block: nn.Module) -> list[nn.Module]:
    """Return the convolutions of a block, transposed ones among them."""
    return [module for module in block.modules() if isinstance(module, torch.nn.modules.conv._ConvNd)]


def rank_of(convolution: nn.Module) -> int:
    """Return the number of spatial dimensions of a convolution."""
    return len(cast("tuple[int, ...]", convolution.kernel_size))
