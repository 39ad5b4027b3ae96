"""Read what a checkpoint file says of its FiLM, before its model is built."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vlmfilm_plugin.checkpoints.facts import METADATA, CheckpointFacts, architecture_settings
from vlmfilm_plugin.checkpoints.soft_seg_layout import (
    PORT_HEADS,
    port_facts,
)
from vlmfilm_plugin.film.architecture import read_extra_state
from vlmfilm_plugin.film.module import MARKER


def peek(path: object, *, weights_only: bool = False) -> CheckpointFacts | None:
    """Read what a checkpoint file says of its FiLM, without its tensors; None for a plain baseline, or what is no local file.

    Args:
        weights_only: the host is about to load the file with this flag: where it is set, no object is unpickled here either.
    """
    if not isinstance(path, str | Path) or not Path(path).is_file():
        return None
    content = None
    # Checkpoints of Lightning may hold objects; mmap leaves the tensors on disk, but cannot read torch's old format.
    for is_safe, mmap in ((True, True), (True, False), (False, True), (False, False)):
        if weights_only and not is_safe:
            return None
        try:
            content = torch.load(path, map_location="cpu", weights_only=is_safe, mmap=mmap)
            break
        except (RuntimeError, pickle.UnpicklingError):
            continue
    return facts_of(content, str(path)) if isinstance(content, Mapping) else None


def facts_of(checkpoint: Mapping[str, Any], path: str) -> CheckpointFacts | None:
    """Return what a loaded checkpoint says of its FiLM; None for a plain baseline."""
    state = checkpoint.get("state_dict", checkpoint)
    if METADATA in checkpoint:
        metadata = checkpoint[METADATA]
        return CheckpointFacts(path, metadata["settings"], architecture_settings(metadata["architecture"]))
    if any(str(name).startswith(PORT_HEADS) for name in state):
        return port_facts(checkpoint, state, path)
    extra = next((value for name, value in state.items() if str(name).endswith(f"{MARKER}_extra_state")), None)
    return None if extra is None else CheckpointFacts(path, {}, architecture_settings(read_extra_state(extra)))
