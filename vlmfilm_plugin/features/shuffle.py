"""Mode `shuffle`: who gets whose feature. The one rule, for runs, for given features and for the soft-seg port's interface.

A draw depends on the step, on the setting `shuffle_seed` and on the images' names within their data set, and on nothing else: not on
where the data lie, on the order of a store, or on what ran before. Knows nothing of torch, files or stores.
"""

from __future__ import annotations

import hashlib
import math
import random
from bisect import bisect_left
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

from vlmfilm_plugin.features.shuffle_pairs import PairsFile

if TYPE_CHECKING:
    from torch import Tensor

    from vlmfilm_plugin.settings.record import Settings


class Split:
    """The images among which donors are drawn: one split of one data set.

    Args:
        members: the images (a key, a path), each once, in the order of their names.
    """

    def __init__(self, members: Sequence[str]) -> None:
        self._members = members
        self._order: Sequence[str] = ()
        self._places: dict[str, int] = {}
        self._seed: int | None = None

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, image: str) -> bool:
        place = bisect_left(self._members, image)
        return place < len(self._members) and self._members[place] == image

    def others(self, image: str, shift: int, seed: int) -> Iterator[str]:
        """Yield every other image once, from the one `shift` places after `image` on, in an order that the seed alone draws."""
        if seed != self._seed:
            order = list(self._members)
            random.Random(f"order:{seed}").shuffle(order)
            self._order, self._places, self._seed = order, {member: place for place, member in enumerate(order)}, seed
        count = len(self._order)
        if image in self._places:
            start, others = self._places[image] + 1, count - 1
        elif count:
            # It stands before the image whose name follows its own.
            start, others = self._places[self._members[bisect_left(self._members, image) % count]], count
        else:
            return
        for number in range(others):
            yield self._order[(start + (shift + number) % others) % count]


@dataclass(frozen=True)
class Shuffle:
    """The rule of mode `shuffle`.

    Attributes:
        seed: the setting `shuffle_seed`.
        pairs: where the pairing is written, image by image.
    """

    seed: int = 0
    pairs: PairsFile = field(default_factory=PairsFile, compare=False)

    @classmethod
    def from_settings(cls, settings: Settings) -> Shuffle:
        """Return the rule that the settings `shuffle_seed` and `shuffle_pairs_file` ask for."""
        return cls(settings.shuffle_seed, PairsFile(settings.shuffle_pairs_file))

    def exchange(self, images: Sequence[Hashable], step: int) -> list[int] | None:
        """Return for each row of a batch the row whose feature it gets; None where all rows are of one image.

        Images, not rows, change places, and every image does: a row never gets the feature of a row of its own image. With five images
        or more each step has another permutation, until all of them have been drawn.

        Args:
            images: what tells the rows' images apart; rows of one image have equal values.
        """
        first: dict[Hashable, int] = {}
        for row, image in enumerate(images):
            first.setdefault(image, row)
        if len(first) < 2:
            return None
        rows = list(first.values())
        place = {image: rows[other] for image, other in zip(first, self.derangement(len(first), step), strict=True)}
        return [place[image] for image in images]

    def donors(self, image: str, step: int, split: Split) -> Iterator[str]:
        """Yield the images whose feature `image`, alone in its batch, may get: the first is the draw, the next stand in for it.

        At one step no two images of a split have the same first donor. The cost does not depend on the number of images.
        """
        return split.others(image, self._number("shift", step), self.seed)

    def derangement(self, n: int, step: int) -> list[int]:
        """Return a permutation of 0..n-1 that moves every element (n >= 2): one cycle, drawn by seed and step.

        There are (n-1)! cycles. A step takes the one that lies a fixed stride after the last step's, coprime to their number: so none
        comes again before all have come.
        """
        total, offset, stride = _course(self.seed, n)
        index = (offset + step * stride) % total
        left, cycle = list(range(1, n)), [0]
        while left:
            index, digit = divmod(index, len(left))
            cycle.append(left.pop(digit))
        result = [0] * n
        for here, there in zip(cycle, [*cycle[1:], 0], strict=True):
            result[here] = there
        return result

    def _number(self, purpose: str, step: int) -> int:
        return int.from_bytes(hashlib.blake2b(f"{purpose}:{self.seed}:{step}".encode(), digest_size=8).digest(), "big")


@lru_cache(maxsize=64)
def _course(seed: int, n: int) -> tuple[int, int, int]:
    """Return the number of cycles of n rows, the first one's number, and the stride from one step to the next."""
    total = math.factorial(n - 1)
    draw = random.Random(f"cycle:{seed}:{n}")
    offset, stride = draw.randrange(total), draw.randrange(total)
    while math.gcd(stride, total) != 1:
        stride = (stride + 1) % total
    return total, offset, stride


def images_of(features: Tensor) -> list[Hashable]:
    """Return what tells the images of rows (B, F) apart: images of equal bytes have equal features, whatever they are called.

    Reads the device.
    """
    return [row.tobytes() for row in features.detach().cpu().double().numpy()]


def permutation_hash(permutation: Sequence[int]) -> str:
    """Return 8 hex digits that name a permutation."""
    return hashlib.blake2b(",".join(map(str, permutation)).encode(), digest_size=4).hexdigest()
