"""What a checkpoint says of its FiLM, as settings: the record, and the keys it stands under."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

METADATA = "vlm_film"
TRAINED_STAGES = "vlm_film_trained_stages"


@dataclass(frozen=True)
class CheckpointFacts:
    """What a checkpoint says of its FiLM: settings of its encoder (explicit settings win) and of its architecture (these win)."""

    path: str
    encoder: Mapping[str, object] = field(default_factory=dict)
    architecture: Mapping[str, object] = field(default_factory=dict)


def architecture_settings(architecture: Mapping[str, Any]) -> dict[str, object]:
    return {
        "decoder_stages": [stage["index"] for stage in architecture["stages"]],
        "apply_point": architecture["apply_point"],
        "cond_dim": architecture["cond_dim"],
        "text_mlp_hidden_dim": architecture["hidden_dim"],
        "gamma_scale": architecture["gamma_scale"],
        "beta_scale": architecture["beta_scale"],
        "cond_layernorm": architecture["use_layernorm"],
        "head": architecture.get("head", "film"),
    }
