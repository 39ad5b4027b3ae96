"""FiLM from a frozen vision-language model for the decoder of an unmodified MedSegDiff-style UNet.

Importing this package imports nothing heavy: every public name is loaded at its first use.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# In a checkout (an editable install) the host adapters lie beside the package, in hooks/; an installed wheel has them inside.
if not os.path.isdir(os.path.join(os.path.dirname(__file__), "hooks")):
    __path__.append(os.path.dirname(os.path.dirname(__file__)))

_HOME = {
    "AdaptiveFiLMHead": "film.layers",
    "CheckpointError": "errors",
    "ConditionError": "errors",
    "Config": "host_spec",
    "Encoder": "encoders.base",
    "EncoderError": "errors",
    "FeatureError": "errors",
    "FilmHandle": "forward.handle",
    "GateView": "film.gate_view",
    "Head": "film.heads",
    "HeadShape": "film.heads",
    "HostError": "errors",
    "HostSpec": "host_spec",
    "EncoderIdentity": "encoders.base",
    "Inspection": "inspection.report",
    "Model": "host_spec",
    "Identity": "encoders.base",
    "ImageReadError": "errors",
    "ImageToConditionVector": "film.layers",
    "Masks": "host_spec",
    "MissingFeatureError": "errors",
    "QwenVLMTextGenerator": "encoders.qwen2_5_vl",
    "RowView": "host_spec",
    "SeenStage": "inspection.report",
    "SeenUNet": "inspection.report",
    "SettingsError": "errors",
    "Steps": "host_spec",
    "StoreError": "errors",
    "TargetMatchError": "errors",
    "TextToConditionVector": "film.layers",
    "UNet": "host_spec",
    "VLMConditioner": "soft_seg.conditioner",
    "VLMFiLMConditioner": "soft_seg.conditioner",
    "VlmFilmError": "errors",
    "activate": "hosts.activation",
    "apply_vlm_film": "soft_seg.apply",
    "attach": "forward.attach",
    "export_adapter": "checkpoints.film_weights",
    "apply_adapter": "checkpoints.film_weights",
    "hookimpl": "host_spec",
    "inspect": "inspection.look",
    "register_gate": "film.gates",
    "register_head": "film.heads",
    "running_batch": "hosts.activation",
    "to_port_layout": "checkpoints.soft_seg_layout",
    "warmup_vlm_cache": "warmup.encode",
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
