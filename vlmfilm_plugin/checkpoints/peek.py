"""Read what a checkpoint file says of its FiLM, before its model is built."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmfilm_plugin.checkpoints.facts import GATE_SETTINGS, METADATA, CheckpointFacts, known_settings
from vlmfilm_plugin.checkpoints.reading import read_checkpoint
from vlmfilm_plugin.checkpoints.soft_seg_reading import PORT_HEADS, port_facts
from vlmfilm_plugin.errors import CheckpointError
from vlmfilm_plugin.film.architecture import as_settings, read_description, read_extra_state
from vlmfilm_plugin.film.module import MARKER
from vlmfilm_plugin.log import film_logger


def peek(path: object) -> CheckpointFacts | None:
    """Read what a checkpoint file says of its FiLM, without its tensors; None for a plain baseline, or what is no local file.

    A file that cannot be read without running code of its own counts as one that says nothing; a line says so.

    Raises:
        CheckpointError: it describes its FiLM in a way that this version cannot use.
    """
    if not isinstance(path, str | Path) or not Path(path).is_file():
        return None
    try:
        content = read_checkpoint(path)
    except CheckpointError as error:
        film_logger().warning(
            "[VLM] WARNING: what %s says of its FiLM is not known, so the settings of this run decide: %s (%s)",
            path,
            error.headline,
            error.facts.get("error", error.facts.get("found")),
        )
        return None
    return facts_of(content, str(path))


def facts_of(checkpoint: Mapping[str, Any], path: str) -> CheckpointFacts | None:
    """Return what a loaded checkpoint says of its FiLM; None for a plain baseline.

    Raises:
        CheckpointError: it cannot be understood.
    """
    state = checkpoint.get("state_dict", checkpoint)
    if METADATA in checkpoint:
        return _recorded(checkpoint[METADATA], path)
    if not isinstance(state, Mapping):
        return None
    if any(str(name).startswith(PORT_HEADS) for name in state):
        return port_facts(checkpoint, state, path)
    extra = next((value for name, value in state.items() if str(name).endswith(f"{MARKER}_extra_state")), None)
    return None if extra is None else CheckpointFacts(path, {}, as_settings(read_extra_state(extra)))


def _recorded(metadata: Any, path: str) -> CheckpointFacts:
    if not isinstance(metadata, Mapping) or not {"architecture", "settings"} <= set(metadata):
        found = f"{METADATA!r} with {', '.join(map(str, metadata))}" if isinstance(metadata, Mapping) else type(metadata).__name__
        facts = {"checkpoint": path, "found": found, "expected": f"architecture and settings under {METADATA!r}"}
        raise CheckpointError("cannot use this checkpoint's FiLM: its description cannot be understood", facts, "load a checkpoint of this plugin")
    settings = known_settings(metadata["settings"], f"checkpoint {path}")
    gate = {name: settings.pop(name) for name in GATE_SETTINGS if name in settings}
    return CheckpointFacts(path, settings, as_settings(read_description(metadata["architecture"])), gate)
