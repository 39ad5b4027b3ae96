"""A synthetic angiography set whose masks hang on something the host cannot see.

Every image shows dark curves and bright curves on a grey background. In underexposed images the dark ones are the vessels, in overexposed
images the bright ones. Exposure is an offset added to a finished picture, so a host that normalises each image by itself sees
exactly the same picture either way, to the last bit; an encoder that reads the raw file sees the offset.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# Grey levels before exposure lie in [0, _RANGE]; with the largest offset and its jitter they still fit 8 bits, so nothing is clipped.
_RANGE = 100
_OFFSETS = {"dark": 20, "bright": 120}
_JITTER = 10
_LEVELS = {"dark": 14, "background": 50, "bright": 86}
_NOISE = 5


def make_dataset(folder: str | Path, *, train: int = 240, val: int = 8, test: int = 40, size: int = 32, seed: int = 0) -> dict[str, list[str]]:
    """Write `{train,val,test}/{image,label}/*.png` under `folder`: 8-bit grey images, masks of 0 and 255.

    Args:
        train, val, test: number of images; half of each split (rounded down) is overexposed.
        size: height and width in pixels.

    Returns:
        For every split the cue of image i, in the order of the file names: `dark` or `bright` is the vessel.
    """
    cues: dict[str, list[str]] = {}
    for number, (split, count) in enumerate({"train": train, "val": val, "test": test}.items()):
        rng = np.random.default_rng([seed, number])
        cues[split] = [("dark", "bright")[index % 2] for index in rng.permutation(count)]
        for kind in ("image", "label"):
            (Path(folder) / split / kind).mkdir(parents=True, exist_ok=True)
        for index, cue in enumerate(cues[split]):
            picture, masks = _draw(rng, size)
            offset = _OFFSETS[cue] + int(rng.integers(-_JITTER, _JITTER + 1))
            name = f"{index:04d}.png"
            Image.fromarray((picture + offset).astype(np.uint8)).save(Path(folder) / split / "image" / name)
            Image.fromarray(masks[cue].astype(np.uint8) * 255).save(Path(folder) / split / "label" / name)
    return cues


def _draw(rng: np.random.Generator, size: int) -> tuple[NDArray[np.int64], dict[str, NDArray[np.bool_]]]:
    """Return a picture (size, size) in [0, _RANGE] and the visible pixels of both families; knows no cue."""
    owner = np.full((size, size), "background", dtype=object)
    strokes = ["dark", "dark", "bright", "bright"]
    for family in rng.permutation(strokes):
        owner[curve(rng, size)] = family
    noise = rng.integers(-_NOISE, _NOISE + 1, (size, size))
    picture = np.vectorize(_LEVELS.__getitem__, otypes=[np.int64])(owner) + noise + _shade(rng, size)
    return picture.clip(0, _RANGE), {family: owner == family for family in ("dark", "bright")}


def _shade(rng: np.random.Generator, size: int) -> NDArray[np.int64]:
    """Return a gentle slope across the picture, (size, size), within 8 grey levels of zero."""
    y, x = np.mgrid[0:size, 0:size] / (size - 1) - 0.5
    angle = rng.uniform(0, 2 * np.pi)
    slope: NDArray[np.float64] = np.rint(10 * (np.cos(angle) * x + np.sin(angle) * y))
    return slope.astype(np.int64)


def curve(rng: np.random.Generator, size: int) -> NDArray[np.bool_]:
    """Return the pixels of one bent line across the picture, (size, size)."""
    angle = rng.uniform(0, 2 * np.pi)
    along = np.array([np.sin(angle), np.cos(angle)])
    across = np.array([along[1], -along[0]])
    middle = size / 2 + across * rng.uniform(-0.35, 0.35) * size
    ends = middle - 0.8 * size * along, middle + 0.8 * size * along
    control = middle + across * rng.uniform(-0.4, 0.4) * size
    t = np.linspace(0, 1, 4 * size)[:, None]
    points = (1 - t) ** 2 * ends[0] + 2 * t * (1 - t) * control + t**2 * ends[1]
    grid = np.moveaxis(np.mgrid[0:size, 0:size], 0, -1)
    distance = np.linalg.norm(grid[:, :, None, :] - points, axis=-1).min(axis=-1)
    return np.asarray(distance <= 0.04 * size, dtype=np.bool_)
