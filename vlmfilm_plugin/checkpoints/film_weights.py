"""FiLM's weights alone, as a safetensors file of a few MB that people share: out of a checkpoint, and into another.

The file's metadata holds the architecture and the encoder's settings, as a checkpoint's does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from vlmfilm_plugin.checkpoints.facts import METADATA, TRAINED_STAGES
from vlmfilm_plugin.checkpoints.reading import read_checkpoint
from vlmfilm_plugin.checkpoints.soft_seg_layout import to_port_layout
from vlmfilm_plugin.errors import CheckpointError
from vlmfilm_plugin.files import new_file, refuse_to_replace
from vlmfilm_plugin.film.architecture import read_description, read_extra_state
from vlmfilm_plugin.film.module import MARKER

_KEY = "vlmfilm"
# Of everything else in the file: safetensors itself has no checksum. Files of the first version have none.
_DIGEST = "digest"


def export_adapter(checkpoint: str | Path, out: str | Path, layout: str = "own", *, force: bool = False) -> list[str]:
    """Write the FiLM weights of a checkpoint to a safetensors file.

    Args:
        checkpoint: a checkpoint with `state_dict`, or a bare state dict.
        layout: `own` keeps the names of this package, copies such as an EMA's included; `port` writes those of the soft-seg port.
        force: replace `out` where it exists; the checkpoint itself is never replaced.

    Returns:
        The names written.

    Raises:
        CheckpointError: the file cannot be read, or holds no FiLM; or `out` exists, or cannot be written.
    """
    from safetensors.torch import save

    what = "the FiLM weights"
    refuse_to_replace(out, what, inputs=[checkpoint], force=force, error=CheckpointError)
    content = read_checkpoint(checkpoint, is_whole=True)
    film = {name: value for name, value in _state_of(content, checkpoint).items() if MARKER in name}
    if not film:
        raise CheckpointError(
            "cannot export FiLM: the checkpoint holds none",
            {"checkpoint": checkpoint, "expected": f"keys with {MARKER!r} in them"},
            "give one of a FiLM run",
        )
    for name, value in film.items():
        _require_tensor(name, value, checkpoint)
    recorded = content[METADATA] if METADATA in content else {"architecture": _architecture(film), "settings": {}, "mode": None}
    described = _in_todays_terms(recorded, checkpoint)
    tensors = to_port_layout(film) if layout == "port" else film
    # safetensors refuses views of shared memory, which a checkpoint of a tied copy may hold.
    apart = {name: value.contiguous().clone() for name, value in tensors.items()}
    metadata = {_KEY: _as_json(described, checkpoint), "layout": layout, "order": json.dumps(list(tensors))}
    data = save(apart, {**metadata, _DIGEST: _digest(metadata, apart)})
    with new_file(out, what, inputs=[checkpoint], force=force, error=CheckpointError) as file:
        file.write(data)
    return list(tensors)


def apply_adapter(adapter: str | Path, checkpoint: str | Path, out: str | Path, *, force: bool = False) -> list[str]:
    """Write a copy of a checkpoint with the FiLM weights of such a file in place of its own, or where it had none.

    Optimizer state is left out of the copy: it belongs to other weights.

    Args:
        force: replace `out` where it exists; neither of the files that are read is ever replaced.

    Returns:
        The names put in.

    Raises:
        CheckpointError: a file cannot be read, the weights are in the port's layout, or the checkpoint's UNet stands elsewhere; or `out`
            exists, or cannot be written.
    """
    refuse_to_replace(out, "the checkpoint", inputs=[adapter, checkpoint], force=force, error=CheckpointError)
    described, tensors = _read_weights(adapter)
    content = dict(read_checkpoint(checkpoint, is_whole=True))
    is_bare = "state_dict" not in content
    merged = _merge(_state_of(content, checkpoint), tensors, adapter, checkpoint)
    if is_bare:
        content = merged
    else:
        content |= {
            "state_dict": merged,
            METADATA: described,
            TRAINED_STAGES: list(dict.fromkeys(stage["index"] for stage in described["architecture"]["stages"])),
        }
        content.pop("optimizer_states", None)
    with new_file(out, "the checkpoint", inputs=[adapter, checkpoint], force=force, error=CheckpointError) as file:
        torch.save(content, file)
    return list(tensors)


def _read_weights(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the description and the tensors of an exported file."""
    from safetensors import safe_open

    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            # The file sorts its names; the module's own order is kept beside them.
            order = json.loads(metadata.get("order", "[]"))
            tensors = {name: file.get_tensor(name) for name in order}
    except Exception as error:  # safetensors raises its own and the file system's
        raise _unreadable(path, error) from error
    if _KEY not in metadata or metadata.get("layout") != "own":
        facts = {"file": path, "found": f"layout {metadata.get('layout')!r}", "expected": "layout 'own'"}
        raise CheckpointError("cannot apply these FiLM weights", facts, "export it again without `--layout port`")
    if not tensors or not all(MARKER in name for name in tensors):
        facts = {"file": path, "found": f"tensors {', '.join(tensors) or 'none'}"[:200], "expected": f"names with {MARKER!r} in them"}
        raise CheckpointError("cannot apply these FiLM weights", facts, "give a file of `vlmfilm export`")
    if _DIGEST in metadata and metadata[_DIGEST] != _digest(metadata, tensors):
        facts = {"file": path, "found": "other content than its digest says", "expected": f"digest {metadata[_DIGEST]}"}
        raise CheckpointError("cannot apply these FiLM weights: the file is damaged", facts, "copy it again, or export it again")
    try:
        described = json.loads(metadata[_KEY])
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, error) from error
    return _in_todays_terms(described, path), tensors


def _unreadable(path: object, error: Exception) -> CheckpointError:
    return CheckpointError("cannot read the FiLM weights", {"file": path, "error": " ".join(str(error).split())}, "give a file of `vlmfilm export`")


def _digest(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    state = hashlib.blake2b(digest_size=16)
    state.update(json.dumps([metadata.get(name) for name in (_KEY, "layout", "order")]).encode())
    for name in sorted(tensors):
        value = tensors[name]
        state.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        state.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def _as_json(described: Mapping[str, Any], checkpoint: object) -> str:
    try:
        return json.dumps(described)
    except (TypeError, ValueError, RecursionError) as error:
        facts = {"checkpoint": checkpoint, "found": error, "expected": "text, numbers, lists and mappings"}
        raise CheckpointError("cannot export FiLM: its description is no plain data", facts, "load a checkpoint that this plugin wrote") from error


def _state_of(content: Mapping[Any, Any], checkpoint: object) -> Mapping[str, Any]:
    state: Any = content.get("state_dict", content)
    strange = [name for name in state if not isinstance(name, str)] if isinstance(state, Mapping) else [type(state).__name__]
    if strange:
        facts = {"checkpoint": checkpoint, "found": repr(strange[0])[:100], "expected": "a state dict: names and tensors"}
        raise CheckpointError("cannot use the checkpoint: its `state_dict` is none", facts, "give a checkpoint of a model")
    return cast("Mapping[str, Any]", state)


def _require_tensor(name: str, value: object, checkpoint: object) -> None:
    """Check that a value is a tensor that holds what it shows: none on `meta`, none of a format of its own, none spread out of a few numbers."""
    if isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized:
        if value.numel() * value.element_size() <= value.untyped_storage().nbytes():
            return
        found = f"shape {tuple(value.shape)} out of {value.untyped_storage().nbytes()} bytes"
    else:
        found = f"{value.layout} on {value.device}" if isinstance(value, Tensor) else type(value).__name__
    facts = {"checkpoint": checkpoint, "name": name, "found": found, "expected": "a tensor with all of its numbers"}
    raise CheckpointError("cannot export FiLM: one of its weights is no plain tensor", facts, "load a checkpoint that this plugin wrote")


def _merge(state: Mapping[str, Any], tensors: Mapping[str, Tensor], adapter: object, checkpoint: object) -> dict[str, Any]:
    """Put FiLM's tensors behind the last key of the UNet they belong to, where the module itself would have them."""
    rest = {name: value for name, value in state.items() if MARKER not in name}
    by_unet: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        by_unet.setdefault(name[: name.index(MARKER)], {})[name] = value
    last = {unet: [name for name in rest if name.startswith(unet)][-1:] for unet in by_unet}
    homeless = [unet for unet, found in last.items() if not found]
    if homeless:
        raise CheckpointError(
            "cannot apply these FiLM weights: the checkpoint has no such UNet",
            {"FiLM weights": adapter, "checkpoint": checkpoint, "expected": f"keys that begin with {', '.join(map(repr, homeless))}"},
            "give a checkpoint of the architecture that they were trained with",
        )
    merged: dict[str, Any] = {}
    for name, value in rest.items():
        merged[name] = value
        for unet, (final,) in last.items():
            if final == name:
                merged |= by_unet[unet]
    return merged


def _in_todays_terms(metadata: Any, file: object) -> dict[str, Any]:
    if not isinstance(metadata, Mapping) or "architecture" not in metadata:
        facts = {"file": file, "found": type(metadata).__name__, "expected": "a mapping with an architecture"}
        raise CheckpointError("cannot use this file's FiLM: its description cannot be understood", facts, "give a file that this plugin wrote")
    return {**metadata, "architecture": read_description(metadata["architecture"])}


def _architecture(film: Mapping[str, Any]) -> Mapping[str, Any]:
    extra = next((value for name, value in film.items() if name.endswith(f"{MARKER}_extra_state")), None)
    if extra is None:
        raise CheckpointError(
            "cannot export FiLM: its description is missing", {"expected": "a key ending in `_extra_state`"}, "save the model again"
        )
    return read_extra_state(extra)
