"""One image whose feature is wanted, and the counts of where features came from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlmfilm_plugin.features.store.protocol import SourceStamp

if TYPE_CHECKING:
    from PIL.Image import Image


# Key and file of an image (as text, since paths are hashed slowly), and the content of stamped pixels without a file.
ImageId = tuple[str, str | None, str | None]


@dataclass(frozen=True)
class Sample:
    """One image whose feature is wanted: its cache key, its untouched file where there is one, and how to get its pixels.

    `stamp` is that of pixels without a file whose key does not name their content: under another stamp they are encoded anew.
    """

    key: str
    path: Path | None
    load: Callable[[], Image]
    stamp: SourceStamp | None = None

    @property
    def image(self) -> ImageId:
        """Return what tells this image from others: its key, its file, and the content of stamped pixels without a file."""
        return self.key, None if self.path is None else str(self.path), None if self.stamp is None else self.stamp.digest


@dataclass
class CacheStats:
    """Where features came from, counted in samples."""

    total: int = 0
    mem_hit: int = 0
    disk_hit: int = 0
    miss: int = 0

    @property
    def hit(self) -> int:
        """Return hits in memory and in the store together."""
        return self.mem_hit + self.disk_hit

    @property
    def hit_rate(self) -> float:
        """Return hits / total, 0 where nothing was asked for."""
        return self.hit / self.total if self.total else 0.0

    def since(self, before: CacheStats) -> CacheStats:
        """Return what was counted after `before`, an earlier copy."""
        return CacheStats(self.total - before.total, self.mem_hit - before.mem_hit, self.disk_hit - before.disk_hit, self.miss - before.miss)

    def __str__(self) -> str:
        return f"total={self.total} hit={self.hit} miss={self.miss} hit_rate={self.hit_rate:.4f} mem_hit={self.mem_hit} disk_hit={self.disk_hit}"
