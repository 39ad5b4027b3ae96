"""How much of their files' range the images of a data set use: twelve-bit data in sixteen-bit files reaches an encoder as a black image.

A whole data set is judged, never one image: a dark image among others is what it is. Knows nothing of encoders; torch is never imported.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from vlmfilm_plugin.errors import ImageReadError, NarrowRangeError
from vlmfilm_plugin.features.images import sample_range

LOOKED_AT = 64
_FIRST_LOOK = 8
_SHARE = 0.25
# The range of a set is that of most of its images: one image of another kind, or with text burnt in, must not decide.
_MOST = 90
# Fewer are looked at where half of the first are wide already.
_HALF = 50

Item = TypeVar("Item")
Range = tuple[float, float, float]


def refuse_narrow_range(paths: Iterable[Path]) -> None:
    """Look at up to 64 images of a data set, evenly spread over its names; fewer where the first eight suffice.

    Files that cannot be read are left to whoever needs them.

    Raises:
        NarrowRangeError: files of one depth use less than a quarter of their range together.
    """
    ranges: list[Range] = []
    for count, path in enumerate(_spread(sorted(set(paths))), 1):
        try:
            found = sample_range(path)
        except ImageReadError:
            found = None
        if found is not None:
            ranges.append(found)
        if count % _FIRST_LOOK == 0 and len(ranges) == count and not _narrow(ranges, _HALF):
            return
    if narrow := _narrow(ranges, _MOST):
        low, high, limit, images = narrow
        share = 100 * (high - low) / limit
        raise NarrowRangeError(
            "cannot condition on these images: nearly all of them would reach the encoder black or flat",
            {
                "found": f"values {low:g} to {high:g} of 0 to {limit:g}, {share:.1f} % of the range (of {images} images looked at)",
                "expected": f"at least {100 * _SHARE:g} %",
            },
            "write the images with the full range of their files, or set `accept_narrow_range` to true",
        )


def siblings(paths: Sequence[Path]) -> list[Path]:
    """Return these files and others of the same kind beside them, as many as are looked at: a small batch is no data set."""
    found = dict.fromkeys(paths)
    for folder, suffix in dict.fromkeys((path.parent, path.suffix) for path in paths):
        if len(found) >= LOOKED_AT:
            break
        try:
            names = sorted(entry.name for entry in os.scandir(folder) if entry.name.endswith(suffix) and entry.is_file())
        except OSError:
            continue
        found.update(dict.fromkeys([folder / name for name in _spread(names)][: LOOKED_AT - len(found)]))
    return list(found)


def _spread(items: Sequence[Item]) -> list[Item]:
    """Return at most 64 items, evenly spread; the first eight of them are so, too."""
    count = min(len(items), LOOKED_AT)
    chosen = [items[index * len(items) // count] for index in range(count)]
    return [chosen[index] for start in range(_FIRST_LOOK) for index in range(start, count, _FIRST_LOOK)]


def _narrow(ranges: Sequence[Range], percent: int) -> tuple[float, float, float, int] | None:
    """Return low, high, limit and number of the images whose container is used too little, or None."""
    for limit in {limit for _, _, limit in ranges}:
        lows, highs = zip(*[(low, high) for low, high, other in ranges if other == limit], strict=True)
        if len(lows) * _FIRST_LOOK < len(ranges):
            continue  # a few files of another depth are no data set
        # Of very few images each counts.
        share = percent if len(lows) >= _FIRST_LOOK else 100
        low = float(np.percentile(lows, 100 - share, method="higher"))
        high = float(np.percentile(highs, share, method="lower"))
        if high - low < _SHARE * limit:
            return low, high, limit, len(lows)
    return None
