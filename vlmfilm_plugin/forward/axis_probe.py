"""Where the channels of a block are when its sizes do not tell: by what its own convolutions gave, which have them at axis 1."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm)


class AxisProbe:
    """Compares the features of blocks with what the convolutions and normalisations in them gave, as it is and with channels last."""

    def __init__(self) -> None:
        self._last: dict[str, Tensor] = {}
        self._votes: list[bool] = []

    @property
    def is_first(self) -> bool:
        """Tell whether every block that told has its channels at axis 1, and one did."""
        return bool(self._votes) and all(self._votes)

    @contextmanager
    def watching(self, blocks: Mapping[str, nn.Module]) -> Iterator[None]:
        """Watch these blocks."""

        def watch(path: str) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                self._last[path] = output

            return hook

        leaves = [(path, leaf) for path, block in blocks.items() for leaf in block.modules() if _has_channels_first(leaf)]
        # A block may be a convolution: what it gave is seen before its features are judged.
        handles = [leaf.register_forward_hook(watch(path), prepend=True) for path, leaf in leaves]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def judge(self, path: str, features: Tensor) -> None:
        """Compare the features of a block, whose first and last axis have one size, with what was given last inside it."""
        given = self._last.pop(path, None)
        if given is None or given.shape != features.shape:
            return
        rank, as_is, moved = features.dim(), _likeness(features, given), _likeness(features, given.movedim(1, -1))
        if rank > 3:
            # Any other order of the axes is none of the two.
            moved = max(moved, _likeness(features, given.transpose(1, -1)))
        if abs(as_is - moved) > 0.1 or max(as_is, moved) > 0.9999 > min(as_is, moved):
            self._votes.append(as_is > moved)


def _has_channels_first(leaf: nn.Module) -> bool:
    return isinstance(leaf, (torch.nn.modules.conv._ConvNd, *_NORMS))


def _likeness(one: Tensor, other: Tensor) -> float:
    """Return the correlation of two tensors, without its sign."""
    a, b = (each.detach().as_subclass(Tensor).double().flatten() for each in (one, other))
    a, b = a - a.mean(), b - b.mean()
    return float((a @ b).abs() / (a.norm() * b.norm()).clamp_min(1e-30))
