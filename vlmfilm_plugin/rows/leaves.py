"""What a sample or a batch holds, leaf by leaf, and a few values of each row by which rows are told apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Where a leaf stands: keys, field names and positions from the outside in.
LeafPath = tuple[Any, ...]

VALUES = 128
# For a proof against the few samples of one batch; each is a cache miss.
FEW = 32
_DEPTH = 5
_WIDTH = 64
_GOLDEN = 0.6180339887498949
_TEXTS = str | bytes | int | float


def leaves(held: Any, path: LeafPath = ()) -> Iterator[tuple[LeafPath, Any]]:
    """Yield tensors, arrays, texts, numbers, and lists of texts or numbers, with where they stand."""
    if isinstance(held, Tensor | np.ndarray | _TEXTS):
        yield path, held
        return
    if len(path) >= _DEPTH:
        return
    inner: list[tuple[Any, Any]] = []
    if isinstance(held, Mapping):
        inner = list(held.items())
    elif isinstance(held, list | tuple):
        if held and all(isinstance(item, _TEXTS) for item in held):
            yield path, held
            return
        names = getattr(held, "_fields", range(len(held)))
        inner = list(zip(names, held, strict=True))
    elif dataclasses.is_dataclass(held) and not isinstance(held, type):
        inner = [(item.name, getattr(held, item.name, None)) for item in dataclasses.fields(held)]
    for name, item in inner[:_WIDTH]:
        yield from leaves(item, (*path, name))


def plain(leaf: Any) -> Tensor | None:
    """Return a tensor or array as a plain tensor of the same memory, or None where that is not possible (negative strides, odd types)."""
    if isinstance(leaf, np.ndarray):
        try:
            return torch.from_numpy(leaf)
        except (TypeError, ValueError):
            return None
    if not isinstance(leaf, Tensor) or leaf.layout != torch.strided or leaf.is_complex() or leaf.is_quantized or leaf.is_meta:
        return None
    if type(leaf) is Tensor:
        return leaf.detach()
    # A subclass may answer every operation with its own, slower one.
    with torch._C.DisableTorchFunctionSubclass():
        return Tensor.detach(leaf.as_subclass(Tensor))


@lru_cache(maxsize=64)
def _positions(count: int, most: int) -> Tensor:
    """Return up to `most` places among `count` values, spread so that no period of an image hides from them."""
    if count <= most:
        return torch.arange(count)
    places: Tensor = torch.unique((torch.arange(1, most + 1, dtype=torch.float64) * _GOLDEN % 1.0 * count).long())
    return places


def some_values(row: Tensor, most: int = VALUES) -> Tensor:
    """Return up to `most` values (K,) of a tensor of any shape, of its type and device; K depends on the number of its values alone."""
    # `take` neither copies nor flattens a view.
    return torch.take(row, _positions(row.numel(), most).to(row.device))


def values_of_rows(leaf: Tensor, most: int = VALUES) -> Tensor:
    """Return up to `most` values of each row (R, K) of a leaf (R, ...) with values; the same as `some_values` of each."""
    rows = leaf.shape[0]
    if leaf.is_contiguous():
        flat = leaf.view(rows, -1)
        return flat.index_select(1, _positions(flat.shape[1], most).to(leaf.device))
    return torch.stack([some_values(row, most) for row in leaf])
