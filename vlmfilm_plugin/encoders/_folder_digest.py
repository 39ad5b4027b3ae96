"""The identity of a model in a local folder: its configuration and every byte of the files it is loaded from, wherever the folder lies.

Gigabytes are read once: digests of files are kept under `cache_dir`, by path, size, times and inode. A sample would not do: a fine-tune
may change one layer.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from vlmfilm_plugin.errors import EncoderError
from vlmfilm_plugin.files import new_file

MEMORY = "model_digests.json"
_BLOCK = 8 << 20
# A write this soon after another may leave all times of a file as they were; coarse file systems count whole seconds.
_TICK_S, _COARSE_TICK_S = 0.05, 2.0

_logger = logging.getLogger("vlmfilm.encoders")
_known: dict[str, str] = {}


class FileStamp(NamedTuple):
    """What a file was when it was looked at. A rewrite changes the time of the last change of its inode, which nobody can set back."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> FileStamp:
        """Stamp a file; nothing of it is read."""
        status = path.stat()
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)

    @property
    def is_settled(self) -> bool:
        """Tell whether a later write would be seen by its time."""
        tick = _TICK_S if self.ctime_ns % 1_000_000_000 else _COARSE_TICK_S
        return time.time() - self.ctime_ns / 1e9 > tick


def folder_digest(folder: Path, names: Iterable[str], cache_dir: str) -> str:
    """Return 16 hex digits of a model folder: of `config.json` and of the content of the files `names`, relative to it."""
    state = hashlib.blake2b(digest_size=8)
    config = folder / "config.json"
    state.update(config.read_bytes() if config.is_file() else b"")
    wanted = sorted(set(names))
    for name, digest in zip(wanted, _digests([folder / name for name in wanted], Path(cache_dir) / MEMORY), strict=True):
        state.update(f"{name}:{digest};".encode())
    return state.hexdigest()


def files_of_first_version(folder: Path) -> list[str]:
    """Return the files that the first version of this package took for a model's weights, used or not."""
    return [path.name for path in sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))]


def content_digest(folder: Path, names: Sequence[str]) -> str:
    """Return 16 hex digits of small files: of those of `names` that are there."""
    state = hashlib.blake2b(digest_size=8)
    for name in names:
        path = folder / name
        if path.is_file():
            state.update(f"{name}:{path.stat().st_size};".encode() + path.read_bytes())
    return state.hexdigest()


def _digests(paths: Sequence[Path], memory: Path) -> list[str]:
    remembered = _read(memory)
    fresh: dict[str, str] = {}
    digests = []
    for path in paths:
        key, digest = _key(path), None
        if key is not None:
            digest = _known.get(key) or remembered.get(key)
        if digest is None:
            digest = _file_digest(path)
            # Only under the stamp that the file had before it was read and still has.
            if key is not None and key == _key(path):
                _known[key] = fresh[key] = digest
        digests.append(digest)
    if fresh:
        _write(memory, {**remembered, **fresh})
    return digests


def _key(path: Path) -> str | None:
    """Return what a digest is remembered by, or None where the file was written so lately that its stamp proves nothing."""
    stamp = FileStamp.of(path)
    return f"{path.resolve()}:{':'.join(map(str, stamp))}" if stamp.is_settled else None


def _file_digest(path: Path) -> str:
    state = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            state.update(block)
    return state.hexdigest()


def _read(memory: Path) -> dict[str, str]:
    try:
        content = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return {str(key): str(value) for key, value in content.items()} if isinstance(content, dict) else {}


def _write(memory: Path, content: dict[str, str]) -> None:
    """Replace the file in one go; where that cannot be done the digests are computed again next time, nothing else."""
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        with new_file(memory, "the digests of model files", force=True, error=EncoderError) as file:
            file.write(json.dumps(content).encode())
    except (OSError, EncoderError) as error:
        _logger.info("the digests of model files are not kept: %s", error)
