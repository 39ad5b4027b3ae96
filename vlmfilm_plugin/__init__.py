"""FiLM from a frozen vision-language model for the decoder of an unmodified MedSegDiff-style UNet.

Importing this package imports nothing heavy: every public name is loaded at its first use.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# What a type checker and an editor see; the names are loaded by `_HOME`, below. A test compares the two.
if TYPE_CHECKING:
    from vlmfilm_plugin.checkpoints.film_weights import apply_adapter as apply_adapter
    from vlmfilm_plugin.checkpoints.film_weights import export_adapter as export_adapter
    from vlmfilm_plugin.checkpoints.soft_seg_layout import to_port_layout as to_port_layout
    from vlmfilm_plugin.encoders.base import Encoder as Encoder
    from vlmfilm_plugin.encoders.base import EncoderIdentity as EncoderIdentity
    from vlmfilm_plugin.encoders.qwen2_5_vl import QwenVLMTextGenerator as QwenVLMTextGenerator
    from vlmfilm_plugin.errors import CheckpointError as CheckpointError
    from vlmfilm_plugin.errors import ConditionError as ConditionError
    from vlmfilm_plugin.errors import EncoderError as EncoderError
    from vlmfilm_plugin.errors import FeatureError as FeatureError
    from vlmfilm_plugin.errors import HostError as HostError
    from vlmfilm_plugin.errors import ImageReadError as ImageReadError
    from vlmfilm_plugin.errors import MissingFeatureError as MissingFeatureError
    from vlmfilm_plugin.errors import SettingsError as SettingsError
    from vlmfilm_plugin.errors import StoreError as StoreError
    from vlmfilm_plugin.errors import TargetMatchError as TargetMatchError
    from vlmfilm_plugin.errors import VlmFilmError as VlmFilmError
    from vlmfilm_plugin.film.gates import GateView as GateView
    from vlmfilm_plugin.film.gates import register_gate as register_gate
    from vlmfilm_plugin.film.layers import AdaptiveFiLMHead as AdaptiveFiLMHead
    from vlmfilm_plugin.film.layers import ImageToConditionVector as ImageToConditionVector
    from vlmfilm_plugin.film.layers import TextToConditionVector as TextToConditionVector
    from vlmfilm_plugin.forward.attach import attach as attach
    from vlmfilm_plugin.forward.handle import FilmHandle as FilmHandle
    from vlmfilm_plugin.host_spec import Config as Config
    from vlmfilm_plugin.host_spec import HostSpec as HostSpec
    from vlmfilm_plugin.host_spec import Model as Model
    from vlmfilm_plugin.host_spec import RowView as RowView
    from vlmfilm_plugin.host_spec import Steps as Steps
    from vlmfilm_plugin.host_spec import UNet as UNet
    from vlmfilm_plugin.host_spec import hookimpl as hookimpl
    from vlmfilm_plugin.hosts.activation import activate as activate
    from vlmfilm_plugin.hosts.activation import running_batch as running_batch
    from vlmfilm_plugin.soft_seg.apply import apply_vlm_film as apply_vlm_film
    from vlmfilm_plugin.soft_seg.conditioner import VLMConditioner as VLMConditioner
    from vlmfilm_plugin.soft_seg.conditioner import VLMFiLMConditioner as VLMFiLMConditioner
    from vlmfilm_plugin.warmup.encode import warmup_vlm_cache as warmup_vlm_cache

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
    "GateView": "film.gates",
    "HostError": "errors",
    "HostSpec": "host_spec",
    "EncoderIdentity": "encoders.base",
    "Model": "host_spec",
    "ImageReadError": "errors",
    "ImageToConditionVector": "film.layers",
    "MissingFeatureError": "errors",
    "QwenVLMTextGenerator": "encoders.qwen2_5_vl",
    "RowView": "host_spec",
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
    "register_gate": "film.gates",
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
