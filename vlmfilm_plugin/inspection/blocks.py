"""The blocks of a net: the smallest modules with at least two spatial convolutions at one resolution, else with one, else a transposed one."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from vlmfilm_plugin.inspection.calls import Call

TWO, ONE, TRANSPOSED = 2, 1, 0
_NOT_SIMPLE = ("attention", "attn", "transformer", "upsample", "pool")


@dataclass(frozen=True, eq=False)
class Block:
    """A block of a net, as one call of it showed it.

    Attributes:
        kind: `TWO` or more spatial convolutions, `ONE`, or a `TRANSPOSED` one.
    """

    call: Call
    kind: int

    @property
    def path(self) -> str:
        return self.call.path

    @property
    def channels(self) -> int:
        return (self.call.output or (0, 0))[1]

    @property
    def size(self) -> tuple[int, ...]:
        return (self.call.output or ())[2:]

    @property
    def area(self) -> int:
        return math.prod(self.size)

    @property
    def channels_in(self) -> int:
        """Return how many channels come in at the block's own resolution."""
        return sum(shape[1] for shape in self.call.inputs if len(shape) == len(self.size) + 2 and shape[2:] == self.size)


def blocks_in(root: Call) -> list[Block]:
    """Return the blocks below a call, in order of execution."""
    found, single = _below(root, root)
    found += [Block(_around(call, root), kind_of(call) or TRANSPOSED) for call in single]
    return sorted(found, key=lambda block: block.call.end)


def kind_of(call: Call) -> int | None:
    """Return `ONE` for a call of a convolution with a kernel above 1, `TRANSPOSED` for one of a transposed convolution, else None."""
    module = call.module
    if call.output is None or len(call.output) < 3:
        return None
    if isinstance(module, _ConvTransposeNd):
        return TRANSPOSED
    if isinstance(module, _ConvNd):
        return ONE if any(size > 1 for size in module.kernel_size) else None
    # Convolutions that a net wrote itself: a leaf with a kernel as its weight.
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or call.children or weight.dim() != len(call.output):
        return None
    return ONE if any(size > 1 for size in weight.shape[2:]) and call.output[1] in weight.shape[:2] else None


def _below(call: Call, root: Call) -> tuple[list[Block], list[Call]]:
    """Return the blocks with two convolutions below a call, and the convolutions that are in none."""
    if call is not root and kind_of(call) is not None:
        return [], [call]
    found: list[Block] = []
    single: list[Call] = []
    for child in call.children:
        blocks, rest = _below(child, root)
        found += blocks
        single += rest
    spatial = [conv for conv in single if kind_of(conv) == ONE]
    sizes = {conv.output[2:] for conv in spatial if conv.output}
    is_block = call is not root and not found and len(spatial) > 1 and len(sizes) == 1 and len(spatial) == len(single)
    if is_block and call.output is not None and len(call.output) == len(next(iter(sizes))) + 2:
        return [Block(call, TWO)], []
    return found, single


def _around(conv: Call, root: Call) -> Call:
    """Return the outermost call that is this convolution with its norm, activation and shortcut: never one with attention in it."""
    kept = conv
    for outer in conv.above():
        if outer is root or outer.output != conv.output or not _is_simple(outer, kept):
            break
        kept = outer
    return kept


def _is_simple(outer: Call, inner: Call) -> bool:
    inside = {id(call) for call in inner.walk()}
    others = [call for call in outer.walk() if call is not outer and id(call) not in inside]
    if any(kind_of(call) is not None or any(word in type(call.module).__name__.lower() for word in _NOT_SIMPLE) for call in others):
        return False
    if type(outer.module) is not nn.Sequential:
        return True
    # In a list of layers only what belongs to any convolution.
    return all("Norm" in type(call.module).__name__ or not any(True for _ in call.module.parameters()) for call in others)
