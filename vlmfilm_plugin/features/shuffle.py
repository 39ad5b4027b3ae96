"""Permutations for mode `shuffle`: drawn by the step alone, naming themselves in a log line."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence

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


def exchange(images: Sequence[Hashable], seed: int) -> list[int] | None:
    """Return for each row the row whose feature it gets in mode `shuffle`; None where all rows are of one image.

    Images, not rows, change places: a row never gets the feature of another row of its own image.

    Args:
        images: the image of each row.
        seed: the step.
    """
    first: dict[Hashable, int] = {}
    for row, image in enumerate(images):
        first.setdefault(image, row)
    if len(first) < 2:
        return None
    rows = list(first.values())
    place = {image: rows[other] for image, other in zip(first, derangement(len(first), seed).tolist(), strict=True)}
    return [place[image] for image in images]


def groups_of(vectors: Tensor) -> list[int]:
    """Return a number for each row (B, F) that equal rows share; reads the device."""
    return [int(group) for group in torch.unique(vectors.detach(), dim=0, return_inverse=True)[1]]


def permutation_hash(permutation: Sequence[int]) -> str:
    """Return 8 hex digits that name a permutation."""
    return hashlib.blake2b(",".join(map(str, permutation)).encode(), digest_size=4).hexdigest()
