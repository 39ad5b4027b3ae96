"""FiLM from a frozen vision-language model for the decoder of an unmodified MedSegDiff-style UNet.

Importing this package imports nothing heavy: every public name is loaded at its first use.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# In a checkout (an editable install) the adapters lie beside the package, in hooks/; an installed wheel has them inside.
if not os.path.isdir(os.path.join(os.path.dirname(__file__), "hooks")):
    __path__.append(os.path.dirname(os.path.dirname(__file__)))

_HOME = {
    "AdaptiveFiLMHead": "film",
    "CheckpointError": "errors",
    "ConditionError": "errors",
    "Config": "hookspecs",
    "Encoder": "encoders",
    "EncoderError": "errors",
    "FeatureError": "errors",
    "FilmHandle": "attachment",
    "GateView": "gates",
    "HostError": "errors",
    "HostSpec": "hookspecs",
    "Identity": "encoders",
    "ImageReadError": "errors",
    "ImageToConditionVector": "film",
    "MissingFeatureError": "errors",
    "QwenVLMTextGenerator": "encoders.qwen2_5_vl",
    "RowView": "hookspecs",
    "SettingsError": "errors",
    "Steps": "hookspecs",
    "StoreError": "errors",
    "TargetMatchError": "errors",
    "TextToConditionVector": "film",
    "UNet": "hookspecs",
    "VLMConditioner": "conditioner",
    "VLMFiLMConditioner": "conditioner",
    "VlmFilmError": "errors",
    "activate": "_bootstrap",
    "apply_vlm_film": "conditioner",
    "attach": "attachment",
    "export_adapter": "adapter_file",
    "apply_adapter": "adapter_file",
    "hookimpl": "hookspecs",
    "register_gate": "gates",
    "running_batch": "_bootstrap",
    "to_port_layout": "checkpoint",
    "warmup_vlm_cache": "warmup",
}

__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
