"""Any image encoder of transformers as a frozen encoder: CLIP, SigLIP, DINOv2, DINOv3, Qwen-VL, the tower of MedGemma, and more.

Of a model that also has a language or text part the vision tower alone is loaded. Knows nothing of single families besides a class
name where transformers' own tables name none.
"""

from __future__ import annotations

import copy
import importlib
import inspect
from typing import TYPE_CHECKING, Any

import torch

from vlmfilm_plugin.encoders import _loading as loading
from vlmfilm_plugin.encoders._frozen import OnePassEncoder, Pack, Prepared, in_groups
from vlmfilm_plugin.encoders._pooling import pooled, token_means
from vlmfilm_plugin.errors import EncoderError

if TYPE_CHECKING:
    from torch import Tensor

    from vlmfilm_plugin.settings.record import Settings

# Towers that transformers' table of models does not have, or has without the projection that makes CLIP's image embedding.
_TOWERS = {
    "clip": "CLIPVisionModelWithProjection",
    "qwen2_vl": "Qwen2VisionTransformerPretrainedModel",
    "qwen2_5_vl": "Qwen2_5_VisionTransformerPretrainedModel",
    "qwen3_vl": "Qwen3VLVisionModel",
}
# Known ones are refused by name, before a feature that an earlier version stored could be served; any other is found by its features.
_DRAWS_AT_RANDOM = frozenset({"vit_mae"})
_WIDTHS = ("out_hidden_size", "hidden_size", "hidden_sizes", "embed_dim")


def from_settings(settings: Settings) -> HfEncoder:
    """Build the encoder of `model_name`; the configuration is read, weights are not.

    Raises:
        EncoderError: the model is not found, or has no image encoder that this can use.
    """
    config = loading.read_config(settings)
    kind = type(config).model_type
    if kind in _DRAWS_AT_RANDOM:
        facts = {"model": loading.name_of(settings), "found": f"model type {kind!r}, which hides patches at random in every forward"}
        raise EncoderError("cannot use this model with encoder hf", {**facts, "expected": "one feature an image"}, "use a DINOv2 or ViT model")
    return HfEncoder(settings, config, *tower_of(config, loading.name_of(settings)))


def tower_of(config: Any, model: str) -> tuple[Any, Any]:
    """Return class and configuration of a model's vision tower, which is the whole model where it has no other part.

    Raises:
        EncoderError: no class of transformers is known for it.
    """
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    tower_config = copy.deepcopy(getattr(config, "vision_config", config))
    name = _TOWERS.get(type(config).model_type)
    if name is not None:
        if hasattr(config, "projection_dim"):
            tower_config.projection_dim = config.projection_dim  # CLIP projects to the width of the whole model
        modeling = importlib.import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
        return getattr(modeling, name), tower_config
    found = MODEL_MAPPING.get(type(tower_config), None)
    # Some configurations stand under several classes, the plain one first.
    tower_class = found[0] if isinstance(found, tuple) else found
    if tower_class is None or (not hasattr(config, "vision_config") and tower_class.main_input_name != "pixel_values"):
        facts = {"model": model, "found": f"model type {type(config).model_type!r}", "expected": "an image encoder of transformers"}
        raise EncoderError("cannot use this model with encoder hf", facts, "use CLIP, SigLIP, DINOv2, DINOv3, Qwen-VL or MedGemma, for example")
    return tower_class, tower_config


class HfEncoder(OnePassEncoder):
    """Encode images by a frozen vision tower of transformers: its pooled output, else the mean over its patch tokens.

    Args:
        settings: model, dtype, device and preprocessing.
        config: the model's configuration, read already.
        tower_class: the vision tower's class.
        tower_config: the vision tower's configuration.
    """

    def __init__(self, settings: Settings, config: Any, tower_class: Any, tower_config: Any) -> None:
        super().__init__(settings, config)
        self.tower_class, self.tower_config = tower_class, tower_config

    @property
    def feature_dim(self) -> int:
        """Return F, the width of the tower's output."""
        names = ("projection_dim",) if self.tower_class.__name__.endswith("WithProjection") else _WIDTHS
        width = next((value for name in names if (value := getattr(self.tower_config, name, None)) is not None), None)
        if isinstance(width, list | tuple):
            width = width[-1]
        if not isinstance(width, int):
            facts = {"found": f"{type(self.tower_config).__name__} without {', '.join(names)}", "expected": "a width in the configuration"}
            raise EncoderError(f"cannot tell the width of {loading.name_of(self.settings)}", facts, "use another model")
        return width

    def _features(self, tower: Any, pack: Pack) -> list[Tensor]:
        return in_groups(pack, _form, lambda part: self._features_alike(tower, part))

    def _features_alike(self, tower: Any, pack: Pack) -> list[Tensor]:
        device, dtype = loading.device_of(tower), loading.dtype_of(tower)
        inputs = {name: torch.cat([item.tensors[name] for item in pack]).to(device) for name in pack[0].tensors}
        pixels = inputs["pixel_values"].to(dtype)
        if "image_grid_thw" in inputs:
            return token_means(tower(pixels, grid_thw=inputs["image_grid_thw"]), inputs["image_grid_thw"], self.tower_config)
        if len(pixels) != len(pack):
            facts = {"found": f"{len(pixels)} pieces of {len(pack)} images", "expected": "one an image"}
            raise EncoderError("cannot encode with this model: its image processor cuts images into pieces", facts, "use another model")
        taken = inspect.signature(tower.forward).parameters
        more = {name: value for name, value in inputs.items() if name in taken and name != "pixel_values"}
        return pooled(tower(pixel_values=pixels, **more), tower, inputs.get("pixel_attention_mask"))

    def _patches(self, pixels: Tensor) -> int:
        if pixels.ndim < 4:  # (patches, values), or (1, patches, values)
            return pixels.shape[-2]
        patch = getattr(self.tower_config, "patch_size", None)
        return max(1, pixels.shape[-2] * pixels.shape[-1] // (patch if isinstance(patch, int) else 16) ** 2)

    def _part(self) -> loading.Part | None:
        is_part = type(self.tower_config) is not type(self.config)
        return loading.Part(self.tower_class, self.tower_config) if is_part else None

    def _load(self) -> torch.nn.Module:
        if (part := self._part()) is not None:
            return loading.load_part(self.settings, self.config, part)
        options = {}
        if "add_pooling_layer" in inspect.signature(self.tower_class.__init__).parameters:
            # Checkpoints for classification have no pooling layer; a random one must not be used.
            options["add_pooling_layer"] = any("pooler." in name for name in loading.weight_names(self.settings, self.config))
        return loading.load_model(self.settings, self.config, self.tower_class, **options)

    def _facts(self) -> dict[str, object]:
        return {"encoder": "hf", "mode": "image", "model_type": type(self.config).model_type}


def _form(item: Prepared) -> object:
    """Images go together where their pixels have one shape; those of the Qwen family have patches in a row and always do."""
    return None if "image_grid_thw" in item.tensors else tuple(item.tensors["pixel_values"].shape)
