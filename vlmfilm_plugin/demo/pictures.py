"""The demo's other task: real pictures, in which only the encoder sees what decides the mask.

A random half of the sources (photographs that scikit-image ships) means "dark curves are the vessels", the other half "bright ones". The UNet
sees a small patch with both families of curves, whose pixels do not depend on the class; the encoder reads the file of the whole picture.
Training and test pictures are crops of disjoint halves of the sources, turned and mirrored; mean and contrast are drawn anew.
"""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlmfilm_plugin.demo.dataset import curve
from vlmfilm_plugin.demo.folder import DemoError

SOURCES = (
    *("brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png"),
    *("gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "retina.jpg", "rocket.jpg"),
)
PICTURE, PATCH = 224, 32
_CURVES = 2

Pixels = NDArray[np.float32]


def make_pictures(folder: Path, *, train: int, test: int, seed: int) -> Path:
    """Write `{split}/{number}.png`, `{split}.npz` with patches and masks (N, 1, 32, 32), and `classes.csv`; return that file.

    Raises:
        DemoError: scikit-image, or a picture of it, is not installed.
    """
    rng = np.random.default_rng(seed)
    sources = read_sources()
    is_dark = np.zeros(len(sources), dtype=bool)
    is_dark[rng.permutation(len(sources))[: len(sources) // 2]] = True
    rows = []
    for split, count in (("train", train), ("test", test)):
        (folder / split).mkdir(parents=True)
        patches, masks = [], []
        for number in range(count):
            source = number % len(sources)
            path = folder / split / f"{number:04d}.png"
            Image.fromarray(_picture(rng, sources[source], is_training=split == "train")).save(path)
            patch, dark, bright = _patch(rng)
            patches.append(patch[None])
            masks.append((dark if is_dark[source] else bright)[None])
            rows.append((f"{split}/{path.name}", "dark" if is_dark[source] else "bright", SOURCES[source]))
        np.savez(folder / f"{split}.npz", patches=np.stack(patches).astype(np.float32), masks=np.stack(masks))
    classes = folder / "classes.csv"
    with classes.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "class", "source"), *rows])
    return classes


def read_sources() -> list[Pixels]:
    """Return the pictures, grey, in [0, 255]."""
    found = importlib.util.find_spec("skimage")
    if found is None or not found.submodule_search_locations:
        raise DemoError("cannot make the pictures", {"found": "no scikit-image"}, "pip install scikit-image")
    folder = Path(next(iter(found.submodule_search_locations))) / "data"
    absent = [name for name in SOURCES if not (folder / name).exists()]
    if absent:
        raise DemoError("cannot make the pictures", {"folder": folder, "found": f"no {', '.join(absent)}"}, "install another scikit-image")
    return [np.asarray(Image.open(folder / name).convert("L"), dtype=np.float32) for name in SOURCES]


def _picture(rng: np.random.Generator, source: Pixels, *, is_training: bool) -> NDArray[np.uint8]:
    """Return a crop of the half of a source that belongs to the split."""
    width = source.shape[1] // 2
    half = source[:, :width] if is_training else source[:, -width:]
    side = int(min(half.shape) * rng.uniform(0.6, 0.95))
    top, left = (int(rng.integers(0, size - side + 1)) for size in half.shape)
    crop = Image.fromarray(half[top : top + side, left : left + side]).resize((PICTURE, PICTURE), Image.Resampling.BICUBIC)
    x = np.rot90(np.asarray(crop), int(rng.integers(4)))
    x = x[:, ::-1] if rng.integers(2) else x
    x = (x - x.mean()) / max(float(x.std()), 1.0)
    levels: NDArray[np.float32] = np.clip(np.rint(x * rng.uniform(35, 60) + rng.uniform(105, 150)), 0, 255)
    return levels.astype(np.uint8)


def _patch(rng: np.random.Generator) -> tuple[Pixels, NDArray[np.bool_], NDArray[np.bool_]]:
    """Return the UNet's patch, its dark and its bright curves, (32, 32) each; swapping them negates what the patch is drawn from."""
    first, second = (np.any([curve(rng, PATCH) for _ in range(_CURVES)], axis=0) for _ in range(2))
    dark, bright = first & ~second, second & ~first
    patch = 0.3 * rng.standard_normal((PATCH, PATCH)) + bright - dark.astype(np.float64)
    return patch.astype(np.float32), dark, bright
