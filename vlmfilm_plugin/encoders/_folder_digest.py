"""The identity of a model in a local folder: its configuration and every byte of its weights, wherever the folder lies.

Gigabytes are read once: digests of files are kept under `cache_dir`, by path, size, time and inode. A sample would not do: a fine-tune
may change one layer.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from pathlib import Path

MEMORY = "model_digests.json"
_BLOCK = 8 << 20

_logger = logging.getLogger("vlmfilm.encoders")
_known: dict[str, str] = {}


def folder_digest(folder: Path, cache_dir: str) -> str:
    """Return 16 hex digits of a model folder: of `config.json` and of the content of every weight file."""
    state = hashlib.blake2b(digest_size=8)
    config = folder / "config.json"
    state.update(config.read_bytes() if config.is_file() else b"")
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    memory = Path(cache_dir) / MEMORY
    remembered = _read(memory)
    fresh: dict[str, str] = {}
    for path in weights:
        status = path.stat()
        key = f"{path.resolve()}:{status.st_size}:{status.st_mtime_ns}:{status.st_ino}"
        digest = _known.get(key) or remembered.get(key)
        if digest is None:
            digest = fresh[key] = _file_digest(path)
        _known[key] = digest
        state.update(f"{path.name}:{digest};".encode())
    if fresh:
        _write(memory, {**remembered, **fresh})
    return state.hexdigest()


def _file_digest(path: Path) -> str:
    state = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            state.update(block)
    return state.hexdigest()


def _read(memory: Path) -> dict[str, str]:
    try:
        content = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(key): str(value) for key, value in content.items()} if isinstance(content, dict) else {}


def _write(memory: Path, content: dict[str, str]) -> None:
    """Replace the file in one go; where that cannot be done the digests are computed again next time, nothing else."""
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=memory.parent, prefix=MEMORY)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file)
        os.replace(name, memory)
    except OSError as error:
        _logger.info("the digests of model files are not kept: %s", error)
