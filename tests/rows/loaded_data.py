"""Data sets and collate functions that tests load with workers: a spawned worker imports them."""

from __future__ import annotations

import os
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate

COUNT, SIZE, CROP = 13, 40, 24
Pair = namedtuple("Pair", ["image", "mask"])


@dataclass
class Batch:
    image: Tensor
    mask: Tensor


def make_files(folder: Path) -> None:
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for number in range(COUNT):
        noise = np.random.default_rng(number)
        Image.fromarray(noise.integers(0, 256, (SIZE, SIZE), dtype=np.uint8)).save(folder / "images" / f"{number}.png")
        # Half of the masks are black: they are nobody's and everybody's.
        mask = noise.integers(0, 2, (SIZE, SIZE), dtype=np.uint8) * 255 * (number % 2)
        Image.fromarray(mask).save(folder / "masks" / f"{number}.png")


def own_number(folder: Path, row: Tensor) -> int:
    """Return which file a crop is cut from, by its pixels; independent of everything under test."""
    crop = np.rint(row.double().numpy() * 255).astype(int).reshape(row.shape[-2:])
    for number in range(COUNT):
        pixels = np.asarray(Image.open(folder / "images" / f"{number}.png")).astype(int)
        for top, left in np.argwhere(pixels[: SIZE - CROP + 1, : SIZE - CROP + 1] == crop[0, 0]):
            if np.array_equal(pixels[top : top + CROP, left : left + CROP], crop):
                return number
    raise AssertionError("a row that is of no file")


class Crops(Dataset):  # type: ignore[type-arg]
    """Random crops; `kind` is what an item is."""

    def __init__(self, folder: Path, kind: str = "tuple") -> None:
        self.folder, self.kind = folder, kind

    def __len__(self) -> int:
        return COUNT

    def read(self, number: int) -> tuple[Tensor, Tensor]:
        image, mask = (np.asarray(Image.open(self.folder / kind / f"{number}.png")) for kind in ("images", "masks"))
        top, left = torch.randint(0, SIZE - CROP + 1, (2,)).tolist()
        return tuple(  # type: ignore[return-value]
            torch.from_numpy(each[top : top + CROP, left : left + CROP].astype(np.float32) / 255)[None] for each in (image, mask)
        )

    def __getitem__(self, number: int) -> Any:
        image, mask = self.read(int(number))
        if self.kind == "crops":
            return [dict(zip(("image", "mask"), self.read(int(number)), strict=True)) for _ in range(2)]
        if self.kind == "arrays":
            return {"image": image.numpy().astype(np.float64), "mask": mask.numpy()}
        return {"tuple": (image, mask), "list": [image, mask], "dict": {"image": image, "mask": mask, "n": number}, "named": Pair(image, mask)}[
            "tuple" if self.kind == "dataclass" else self.kind
        ]


class InMemory(Crops):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.items = [self.read(number) for number in range(COUNT)]

    def __getitem__(self, number: int) -> Any:
        return self.items[number]


class Cached(Crops):
    """Opens each file once, as a cache does."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.known: dict[int, Any] = {}

    def __getitem__(self, number: int) -> Any:
        if number not in self.known:
            self.known[number] = super().__getitem__(number)
        return self.known[number]


def sorted_by_mean(samples: list[Any]) -> Any:
    return default_collate(sorted(samples, key=lambda sample: float(sample[0].mean())))


def drops_one(samples: list[Any]) -> Any:
    return default_collate(samples[:-2] + samples[-1:] if len(samples) > 2 else samples)


def flattens(samples: list[Any]) -> Any:
    return default_collate([crop for sample in samples for crop in sample])


def as_dataclass(samples: list[Any]) -> Batch:
    return Batch(*default_collate(samples))


def shifts_values(samples: list[Any]) -> Any:
    """Change every row in its own way: nothing proves which is whose."""
    return torch.stack([sample[0].flip(-1) * (position + 1) for position, sample in enumerate(samples)]), torch.zeros(len(samples), 1, 2, 2)


def image_of(batch: Any) -> Tensor:
    return batch["image"] if isinstance(batch, dict) else getattr(batch, "image", None) if hasattr(batch, "image") else batch[0]


def opened_elsewhere(folder: Path) -> str:
    return os.path.join(folder, "images", "0.png")
