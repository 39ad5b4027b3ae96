"""What a feature store is: what it keeps of an image, and the six things it does. Another backend is one file that does these.

Knows neither SQLite nor torch.
"""

from __future__ import annotations

import functools
import hashlib
import os
import stat
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from vlmfilm_plugin.errors import ImageReadError

if TYPE_CHECKING:
    from vlmfilm_plugin.encoders.base import EncoderIdentity


# What SQLite holds of the number of an inode; some file systems use more.
INODE_BITS = (1 << 63) - 1
# A write this soon after another may leave all times of a file as they were; coarse file systems count whole seconds.
_TICK_NS, _COARSE_TICK_NS = 50_000_000, 2_000_000_000


# Named tuples: eight of each are made for every batch, and frozen dataclasses take twice as long.
class SourceStamp(NamedTuple):
    """What a source file was when its feature was made: bytes, modification time in ns, blake2b-128 of the content, its place, and its inode.

    The place names the absolute path: two files of one name, size and time are told apart by it without being read. A modification time can
    be set back, as copying tools do; the time of the inode's last change cannot. It is None where it proves nothing: the file had been
    written too lately, or an earlier version of this package stored the stamp.
    """

    size: int
    mtime_ns: int
    digest: str
    place: str | None = None
    ctime_ns: int | None = None
    inode: int | None = None

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> SourceStamp:
        """Stamp a file; reads all of it.

        Raises:
            ImageReadError: the file cannot be read.
        """
        state = hashlib.blake2b(digest_size=16)
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise OSError("a folder, a device or a pipe")
            with open(path, "rb") as file:
                status = os.fstat(file.fileno())
                while block := file.read(1 << 20):
                    state.update(block)
        except OSError as error:
            facts = {"file": path, "system said": error.strerror or str(error), "expected": "a readable file"}
            raise ImageReadError(f"cannot read image {path}", facts, "correct the path, or restore the file") from error
        is_settled = time.time_ns() - status.st_ctime_ns > (_TICK_NS if status.st_ctime_ns % 1_000_000_000 else _COARSE_TICK_NS)
        changed = status.st_ctime_ns if is_settled else None
        return cls(status.st_size, status.st_mtime_ns, state.hexdigest(), place_of(path), changed, status.st_ino & INODE_BITS)

    def is_of(self, status: os.stat_result, place: str) -> bool:
        """Tell whether the file at a place is, by its status alone, the very one that was stamped, unchanged."""
        return (
            self.mtime_ns == status.st_mtime_ns
            and self.ctime_ns == status.st_ctime_ns
            and self.size == status.st_size
            and self.inode == status.st_ino & INODE_BITS
            and self.place == place
        )


class StoredFeature(NamedTuple):
    """A feature (F,), its cache key, the stamp of its source file (None where it came from a tensor), and what the encoder said of the image."""

    key: str
    feature: np.ndarray[Any, Any]
    stamp: SourceStamp | None = None
    note: str | None = None


@runtime_checkable
class Store(Protocol):
    """Features between runs and processes, one namespace for each encoder identity.

    A row is found by its cache key and the content of its source file: images of two data sets that share a name are both kept.
    A feature that is stored twice under one key and content is replaced. Features come back in `embedding_dtype`, rounded where they were
    written in a wider one; what was written in a narrower one counts as absent. Safe for several processes and threads. A store may also
    have `restamp(identity, rows)`, which notes the stamps of files that were found to be those of stored rows.

    Attributes:
        embedding_dtype: `float16` or `float32`.
        path: where it is, for messages.
    """

    embedding_dtype: str

    @property
    def path(self) -> object:
        """Return where the store is, for messages."""

    def rows(self, identity: EncoderIdentity, keys: Sequence[str]) -> list[StoredFeature]:
        """Return every sound row of these keys: several of one key where files of different content have it, the newest last."""

    def rows_of_content(self, identity: EncoderIdentity, stamps: Sequence[SourceStamp]) -> list[StoredFeature]:
        """Return sound rows whose source file had the size and digest of one of these, under any key."""

    def known_sizes(self, identity: EncoderIdentity, sizes: Sequence[int]) -> set[int]:
        """Return those of these sizes in bytes that the source file of some row has."""

    def write(self, identity: EncoderIdentity, rows: Iterable[StoredFeature]) -> None:
        """Store features: all of them, or none.

        Raises:
            FeatureError: NaN, infinity, a value that `embedding_dtype` cannot hold, or mixed widths.
            StoreError: nothing can be written.
        """

    def keys(self, identity: EncoderIdentity) -> list[str]:
        """Return the keys stored for an identity, sorted, each once."""

    def close(self) -> None:
        """Release what it holds open; doing it twice is fine."""


def place_of(path: str | os.PathLike[str]) -> str:
    """Return 16 hex digits that name the absolute path of a file."""
    text = os.fspath(path)
    # The common case in place: this runs for every image of every batch.
    is_plain = text.startswith("/") and "/." not in text and "//" not in text and not text.endswith("/")
    return _place(text if is_plain else os.path.abspath(text))


@functools.lru_cache(maxsize=1 << 16)
def _place(absolute: str) -> str:
    return hashlib.blake2b(os.fsencode(absolute), digest_size=8).hexdigest()
