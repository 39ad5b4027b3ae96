"""A small UNet of the MedSegDiff shape, written for the tests: `ups.{i}` = [block1, block2, attention, upsample]."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlmfilm_plugin.film.module import FilmModule

Film = Callable[[Tensor, int], Tensor]


class Block(nn.Module):
    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.conv, self.time = nn.Conv2d(inner, outer, 3, padding=1), nn.Linear(1, outer)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(self.conv(x) + self.time(t[:, None])[:, :, None, None])


class SmallUNet(nn.Module):
    """`use_reentrant` None runs block2 plainly; True or False run it by `checkpoint`."""

    def __init__(
        self, widths: tuple[int, ...] = (6, 4), *, use_reentrant: bool | None = None, checkpoint: Callable[..., Tensor] = checkpoint
    ) -> None:
        super().__init__()
        self.use_reentrant, self.checkpoint = use_reentrant, checkpoint
        self.stem = nn.Conv2d(2, widths[0], 3, stride=2 ** (len(widths) - 1), padding=1)
        pairs = zip(widths, (*widths[1:], widths[-1]), strict=True)
        self.ups = nn.ModuleList(nn.ModuleList([Block(a, a), Block(a, a), nn.Conv2d(a, a, 1), nn.Conv2d(a, b, 1)]) for a, b in pairs)
        self.final = nn.Conv2d(widths[-1], 1, 1)

    def forward(self, x: Tensor, time: Tensor, cond: Tensor, film: Film | None = None) -> Tensor:
        h = self.stem(torch.cat([x, cond], dim=1))
        for i, (block1, block2, attention, up) in enumerate(self.ups):
            h = block1(h, time)
            h = block2(h, time) if self.use_reentrant is None else self.checkpoint(block2, h, time, use_reentrant=self.use_reentrant)
            h = up(h + attention(h if film is None else film(h, i))) if film is None else up((y := film(h, i)) + attention(y))
            h = h if i == len(self.ups) - 1 else nn.functional.interpolate(h, scale_factor=2.0)
        return self.final(h)


def inputs(rows: int, size: int = 8, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Return (x, time, cond) of `rows` rows."""
    generator = torch.Generator().manual_seed(seed)
    x, cond = (torch.randn(rows, 1, size, size, generator=generator, dtype=dtype) for _ in range(2))
    return x, torch.rand(rows, generator=generator, dtype=dtype), cond


def randomise(film: FilmModule, seed: int = 0) -> None:
    """Move heads away from the identity, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in film.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
