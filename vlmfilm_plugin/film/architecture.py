"""The architecture of FiLM in one UNet: what decides the shape and the meaning of its weights, and how two of them are compared.

No torch: a checkpoint's description can be read and checked without a model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vlmfilm_plugin.errors import CheckpointError

FORMAT = 1


@dataclass(frozen=True)
class Stage:
    """A decoder stage that carries FiLM: `index` 0 is next to the bottleneck, `path` its block in the UNet, `channels` its C."""

    index: int
    path: str
    channels: int


@dataclass(frozen=True)
class Architecture:
    """Everything that decides the shape and the meaning of FiLM's weights; it travels in every checkpoint."""

    stages: tuple[Stage, ...]
    apply_point: str
    feature_dim: int
    cond_dim: int
    hidden_dim: int
    gamma_scale: float | None
    beta_scale: float | None
    use_layernorm: bool
    is_text: bool
    head: str = "film"
    fingerprint: str | None = None
    encoder: Mapping[str, object] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, with the format's version."""
        return {"format": FORMAT, **asdict(self)}


def read_extra_state(state: Any) -> Mapping[str, Any]:
    """Read the architecture that a checkpoint holds under `_extra_state`."""
    try:
        content = json.loads(bytes(state.cpu().tolist()))
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(
            "cannot read the FiLM description in this checkpoint", {"error": error}, "load a checkpoint that this plugin wrote"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(
            "cannot use this checkpoint's FiLM: unknown format",
            {"found": found, "expected": FORMAT},
            "update vlmfilm-plugin, or load an older checkpoint",
        )
    return content


def check_architecture(found: Mapping[str, Any], expected: Architecture) -> None:
    """Compare a checkpoint's FiLM with the FiLM of this run.

    Raises:
        CheckpointError: another encoder (both fingerprints are shown) or another architecture (the differing values are shown).
    """
    wanted = json.loads(json.dumps(expected.as_dict()))
    if found.get("fingerprint") and wanted["fingerprint"] and found["fingerprint"] != wanted["fingerprint"]:
        raise CheckpointError(
            "cannot load this checkpoint: its FiLM was trained on the features of another encoder",
            {
                "checkpoint": f"{found['fingerprint']}   {_brief(found.get('encoder'))}",
                "this run": f"{wanted['fingerprint']}   {_brief(wanted.get('encoder'))}",
            },
            "set `encoder`, `model_name` and the prompt and pixel settings to those of the checkpoint",
        )
    # A description without a head is of the time when there was one kind.
    found = {"head": "film", **found}
    differing = [name for name in wanted if name not in {"fingerprint", "encoder", "format"} and found.get(name) != wanted[name]]
    if differing:
        facts = {name: f"{_brief(found.get(name))} in the checkpoint, {_brief(wanted[name])} in this run" for name in differing}
        raise CheckpointError(
            "cannot load this checkpoint: its FiLM has another architecture",
            facts,
            f"build the model with the checkpoint's settings: {_as_settings(found, differing)}",
        )


def _brief(value: object) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return ", ".join(f"{item['index']} ({item['path']}, {item['channels']} channels)" for item in value)
    if isinstance(value, dict):
        return " ".join(f"{key}={item}" for key, item in value.items() if key in {"mode", "model", "prompt"} and item)
    return str(value)


_SETTING_OF = {"hidden_dim": "text_mlp_hidden_dim", "use_layernorm": "cond_layernorm", "is_text": "use_text_prompt_cond"}


def _as_settings(found: Mapping[str, Any], differing: Sequence[str]) -> str:
    parts = []
    for name in differing:
        if name == "stages":
            parts.append(f"decoder_stages={[stage['index'] for stage in found.get('stages', [])]}")
        elif name != "feature_dim":
            parts.append(f"{_SETTING_OF.get(name, name)}={found.get(name)}")
    return ", ".join(parts) or "the encoder it was trained with"
