"""Permutations for mode `shuffle`: drawn by the step alone, naming themselves in a log line."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def derangement(n: int, seed: int) -> Tensor:
    """Return a permutation (n,) of 0..n-1 that moves every element (n >= 2): one random cycle, drawn by seed alone.

    A shuffled row that met its own condition would not be shuffled.
    """
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    result = torch.empty(n, dtype=torch.long)
    result[order] = order.roll(-1)
    return result


def permutation_hash(permutation: Sequence[int]) -> str:
    """Return 8 hex digits that name a permutation."""
    return hashlib.blake2b(",".join(map(str, permutation)).encode(), digest_size=4).hexdigest()
