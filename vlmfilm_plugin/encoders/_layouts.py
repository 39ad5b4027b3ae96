"""Model folders that are refused by name: from them transformers would load, or run, something else than the weights that are looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlmfilm_plugin.errors import EncoderError


def refuse_other_layouts(folder: Path | None, model: str) -> None:
    """Refuse what PEFT has saved, and a distributed checkpoint, in a local folder.

    Args:
        folder: None for a model of the hub.
        model: how errors call it.
    """
    if folder is None:
        return
    if (folder / "adapter_config.json").is_file():
        facts = {"model": model, "found": "adapter_config.json", "expected": "a model with all its weights"}
        raise EncoderError(
            "cannot use this model: PEFT has saved what it adds to another one", facts, "merge it (merge_and_unload) and save the model it gives"
        )
    if shard := next(folder.glob("shard-?????-model-*.safetensors"), None):
        facts = {"model": model, "found": shard.name, "expected": "model.safetensors, or an index of its parts"}
        raise EncoderError("cannot use this model: it is a distributed checkpoint", facts, "load it with transformers and save it by save_pretrained")


def refuse_fetched_kernels(config: Any, model: str) -> None:
    """Refuse a configuration that names code on the hub for its attention: nobody has asked for that code to run."""
    parts = [config, *(value for value in vars(config).values() if hasattr(value, "model_type"))]
    named = [str(name) for part in parts if "/" in str(name := getattr(part, "_attn_implementation", None) or "")]
    if named:
        facts = {"model": model, "found": f"attn_implementation {named[0]!r}", "expected": "an implementation that transformers has"}
        raise EncoderError("cannot use this model: its configuration names code to download", facts, "take attn_implementation out of config.json")
