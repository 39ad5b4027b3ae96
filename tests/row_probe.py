"""Whose feature each row of each UNet forward got, told from outside: y = gamma x + beta is solved for gamma and beta, channel by channel.

The probe knows neither names nor rows: x is a block's output before FiLM, y what leaves it. Every image file has a level of its own
(`make_image`), so a row's own file is read off the pixels that the UNet was given; the file whose feature gives the solved gamma and beta is
the one that FiLM used.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def make_image(path: Path, number: int, count: int, size: int = 64) -> None:
    """Write an image of which most pixels have the level of `number` among `count`, some are black and some white: every crop shows it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((size, size), level(number, count), np.uint8)
    pixels[::8, ::2], pixels[4::8, ::2] = 0, 255
    # A texture of its own: no two images are equal up to scale and offset.
    pixels[np.random.default_rng(number).random((size, size)) < 0.1] = 200
    Image.fromarray(pixels).save(path, quality=100, subsampling=0) if path.suffix == ".jpg" else Image.fromarray(pixels).save(path)


def level(number: int, count: int) -> int:
    return 40 + number * 140 // max(count - 1, 1)


# Where a UNet's call has the image, and the value of black in it.
_SHOWN: dict[str, tuple[float, Callable[..., Tensor]]] = {
    "concatenated": (0.0, lambda x, *_, **__: x[:, :-1]),
    "condition": (-1.0, lambda x, time, cond, *_, **__: cond),
    "input": (0.0, lambda x, *_, **__: x),
}


class Probe:
    """Watches one UNet.

    Args:
        files: the images, by number.
        shown: the UNet's call -> the condition images (R, C, h, w) that it was given.
        low, high: the values of black and white in them.
    """

    def __init__(self, unet: Any, block: Any, head: int, files: list[Path], shown: Callable[..., Tensor], low: float, high: float) -> None:
        from vlmfilm_plugin.encoders.descriptor import DescriptorEncoder
        from vlmfilm_plugin.features.images import from_tensor, read_image

        self.unet, self.head, self.shown, self.low, self.high = unet, head, shown, low, high
        images = [from_tensor(torch.load(file), (0.0, 1.0)) if file.suffix == ".pt" else read_image(file) for file in files]
        self.features = DescriptorEncoder().encode(images).half().float()
        self.levels = np.array([level(number, len(files)) for number in range(len(files))])
        self.rows: list[tuple[int, int, bool]] = []
        self.before: Tensor | None = None
        block.register_forward_hook(self._take, prepend=True)
        block.register_forward_hook(self._solve)
        unet.register_forward_pre_hook(self._called, with_kwargs=True)

    def _called(self, unet: Any, args: Any, kwargs: Any) -> None:
        image = torch.as_tensor(self.shown(*args, **kwargs)).detach().float()
        pixels = (image.as_subclass(Tensor)[:, 0].flatten(1) - self.low) / (self.high - self.low) * 255
        self.own = [int(np.abs(self.levels - row.median().item()).argmin()) for row in pixels]

    def _take(self, block: Any, args: Any, output: Tensor) -> None:
        self.before = output.detach().clone()

    def _solve(self, block: Any, args: Any, output: Tensor) -> None:
        assert self.before is not None
        x, y = (each.detach().as_subclass(Tensor).flatten(2).double() for each in (self.before, output))
        centred = x - x.mean(2, keepdim=True)
        gamma = (centred * y).sum(2) / (centred * centred).sum(2)
        beta = (y - gamma[:, :, None] * x).mean(2)
        solved = torch.cat([gamma, beta], 1)
        film = self.unet.vlm_film
        with torch.no_grad():
            known = torch.cat(film.heads[self.head](film.project(self.features)), 1).flatten(1).double()
        distance = torch.cdist(solved, known)
        best = distance.argmin(1)
        closest = distance.sort(1).values
        is_clear = (closest[:, 0] < 0.2 * closest[:, 1]).tolist()
        self.rows += list(zip(self.own, best.tolist(), is_clear, strict=True))


def wake(film: Any) -> None:
    """Give the heads of a fresh FiLM weights by which images differ."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for head in film.heads:
            head.mlp[2].weight.copy_(torch.randn(head.mlp[2].weight.shape, generator=generator))


def watch(kind: str) -> None:
    """Probe every UNet that FiLM is attached to from now on, and write [own, used, clear] of all rows to the file PROBE_OUT at exit."""
    import atexit

    from vlmfilm_plugin.run.runtime import Runtime

    files = [Path(line) for line in Path(os.environ["PROBE_FILES"]).read_text().splitlines()]
    probes: list[Probe] = []
    attach = Runtime.attach

    def attach_probed(self: Any, unet: Any, spec: Any) -> Any:
        handle = attach(self, unet, spec)
        if handle is not None:
            wake(unet.vlm_film)
            path = handle.stages[0].path
            low, shown = _SHOWN[kind]
            probes.append(Probe(unet, unet.get_submodule(path), 0, files, shown, low, 1.0))
        return handle

    Runtime.attach = attach_probed  # type: ignore[method-assign]
    pid = os.getpid()

    def write() -> None:
        if os.getpid() == pid:
            Path(os.environ["PROBE_OUT"]).write_text(json.dumps([row for probe in probes for row in probe.rows]))

    atexit.register(write)


def make_isic(root: Path, train: int, test: int) -> list[Path]:
    """Write a data set in the layout of MedSegDiff's ISIC loader; return its images."""
    files: list[Path] = []
    for mode, count in (("Training", train), ("Test", test)):
        lines = ["image_id,label"]
        for _ in range(count):
            number = len(files)
            files.append(root / f"ISBI2016_ISIC_Part3B_{mode}_Data" / f"ISIC_{number:07d}.jpg")
            make_image(files[-1], number, train + test)
            mask = (np.random.default_rng(number).random((64, 64)) > 0.5).astype(np.uint8) * 255
            Image.fromarray(mask).save(files[-1].with_name(f"ISIC_{number:07d}_Segmentation.png"))
            lines.append(f"ISIC_{number:07d},{'benign' if mode == 'Training' else 0}")
        (root / f"ISBI2016_ISIC_Part3B_{mode}_GroundTruth.csv").write_text("\n".join(lines) + "\n")
    return files


def make_splits(root: Path, counts: dict[str, int], kinds: tuple[str, ...] = ("label",)) -> list[Path]:
    """Write data sets `{folder}/{image,label}/{number}.png`, numbered from 0 in each folder; return their images."""
    files: list[Path] = []
    for folder, count in counts.items():
        for number in range(count):
            files.append(root / folder / "image" / f"{number}.png")
            make_image(files[-1], len(files) - 1, sum(counts.values()))
            mask = (np.random.default_rng(len(files)).random((64, 64)) > 0.5).astype(np.uint8) * 255
            for kind in kinds:
                (root / folder / kind).mkdir(exist_ok=True)
                Image.fromarray(mask).save(root / folder / kind / f"{number}.png")
    return files
