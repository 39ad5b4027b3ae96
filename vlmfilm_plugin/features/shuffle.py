"""Mode `shuffle`: who gets whose feature. The one rule, for runs, for given features and for the soft-seg port's interface.

A draw depends on the step, on the setting `shuffle_seed` and on the images' names within their data set, and on nothing else: not on
where the data lie, on the order of a store, or on what ran before. Knows nothing of torch, files or stores.
"""

from __future__ import annotations

import hashlib
import math
import random
from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

from vlmfilm_plugin.errors import ConditionError, SettingsError
from vlmfilm_plugin.features.shuffle_classes import Classes
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
        donor: who may give its feature: `any` other image, one of an `other_class`, or the one with the `most_distant` feature.
        classes: of the images, for `other_class`.
    """

    seed: int = 0
    pairs: PairsFile = field(default_factory=PairsFile, compare=False)
    donor: str = "any"
    classes: Classes | None = field(default=None, compare=False)

    @classmethod
    def from_settings(cls, settings: Settings) -> Shuffle:
        """Return the rule that the settings `shuffle_...` ask for.

        Raises:
            SettingsError: `other_class` without the classes, or with wrong ones.
        """
        classes = None
        if settings.shuffle_donor == "other_class":
            if settings.shuffle_classes_file is None:
                raise SettingsError(
                    "cannot shuffle by class: nothing says the classes",
                    {"found": f"shuffle_donor other_class   (from {settings.origin('shuffle_donor')})", "expected": "shuffle_classes_file as well"},
                    "set `shuffle_classes_file` to a CSV file of lines `image,class`",
                )
            classes = Classes(settings.shuffle_classes_file, settings.origin("shuffle_classes_file"))
        return cls(settings.shuffle_seed, PairsFile(settings.shuffle_pairs_file), settings.shuffle_donor, classes)

    def exchange(
        self,
        images: Sequence[Hashable],
        step: int,
        *,
        names: Sequence[object] = (),
        distances: Callable[[], Sequence[Sequence[float]]] | None = None,
    ) -> list[int] | None:
        """Return for each row of a batch the row whose feature it gets; None where all rows are of one image.

        Images, not rows, change places, and every image does: a row never gets the feature of a row of its own image. With five images
        or more each step has another permutation, until all of them have been drawn. With another `donor` than `any` it is no permutation.

        Args:
            images: what tells the rows' images apart; rows of one image have equal values.
            names: of the rows, for `other_class`.
            distances: between the rows' features (R, R), for `most_distant`.

        Raises:
            ConditionError: the class of an image is not known, or no row is of another class.
        """
        first: dict[Hashable, int] = {}
        for row, image in enumerate(images):
            first.setdefault(image, row)
        if len(first) < 2:
            return None
        rows = list(first.values())
        if self.donor != "any":
            chosen = self._of_other_class(rows, names, step) if self.donor == "other_class" else _most_distant(rows, distances)
            donor_of = dict(zip(first, chosen, strict=True))
            return [donor_of[image] for image in images]
        place = {image: rows[other] for image, other in zip(first, self.derangement(len(first), step), strict=True)}
        return [place[image] for image in images]

    def class_of(self, *names: str) -> str:
        """Return the class of an image by its names; with `other_class` alone."""
        if self.classes is None:
            raise ConditionError("no classes are known", {"shuffle_donor": self.donor}, "set `shuffle_donor: other_class`")
        return self.classes.of(*names)

    def _of_other_class(self, rows: Sequence[int], names: Sequence[object], step: int) -> list[int]:
        classes = [self.class_of(str(names[row])) for row in rows]
        shift, chosen = self._number("shift", step), []
        for place, own in enumerate(classes):
            others = [row for row, other in zip(rows, classes, strict=True) if other != own]
            if not others:
                raise ConditionError(
                    "cannot shuffle by class: no row of the batch is of another class",
                    {"classes": f"{own!r} alone", "rows": len(names), "expected": "images of two classes or more"},
                    "give images of several classes at once",
                )
            chosen.append(others[(shift + place) % len(others)])
        return chosen

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


def _most_distant(rows: Sequence[int], distances: Callable[[], Sequence[Sequence[float]]] | None) -> list[int]:
    if distances is None:
        raise ConditionError("the distances of features are not known", {"shuffle_donor": "most_distant"}, "report this")
    table = distances()
    return [max(rows, key=lambda other: table[row][other]) for row in rows]


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


def distances_of(features: Tensor) -> list[list[float]]:
    """Return the distances between the features (R, F) of rows; reads the device."""
    values = features.detach().cpu().double()
    table: list[list[float]] = (values[:, None] - values[None]).norm(dim=2).tolist()
    return table


def permutation_hash(permutation: Sequence[int]) -> str:
    """Return 8 hex digits that name a permutation."""
    return hashlib.blake2b(",".join(map(str, permutation)).encode(), digest_size=4).hexdigest()
