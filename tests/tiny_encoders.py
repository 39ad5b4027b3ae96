"""Tiny random image models of the real classes on disk, with their real image processors: no network, no weights to download."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tiny_qwen import rope_of

VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "patch_size": 8,
    "image_size": 32,
}
TEXT: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 99}
MARKS = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZE = {"height": 32, "width": 32}
CLIP_SIZES: dict[str, Any] = {"size": {"shortest_edge": 32}, "crop_size": SIZE}


def noise(sizes: Sequence[tuple[int, int]]) -> list[Image.Image]:
    """Return an RGB image of random pixels for each (height, width), the same ones each time."""
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


def build(name: str, folder: Path, *, seed: int = 0, **save: Any) -> Path:
    """Build model `name` of `MODELS` with weights drawn by `seed`, and save it and its image processor into `folder`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MODELS[name]()
        # Fresh models start some weights at zero or tiny: every one must matter here.
        for weight in model.parameters():
            weight.data.copy_(torch.randn(weight.shape) * 0.2)
    model.save_pretrained(folder, **save)
    processor, values = PROCESSORS[name]
    if name == "dinov3":  # its own class needs torchvision; the published file holds the same names
        processor = "ViTImageProcessor"
    pil_class(processor)(**values).save_pretrained(folder)
    if name == "dinov3":
        file = folder / "preprocessor_config.json"
        file.write_text(file.read_text().replace("ViTImageProcessor", "DINOv3ViTImageProcessorFast"))
    return folder


def pil_class(name: str) -> Any:
    """Return an image processor that works through PIL; in transformers 4 the plain class does."""
    return getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)


def _clip() -> Any:
    text = TEXT | {"max_position_embeddings": 64, "projection_dim": 20} | ENDS
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=VISION | {"projection_dim": 20}, projection_dim=20))


def _siglip() -> Any:
    text = TEXT | {"max_position_embeddings": 64} | ENDS
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=VISION))


def _siglip2() -> Any:
    vision = {key: value for key, value in VISION.items() if key != "image_size"} | {"num_patches": 16}
    text = TEXT | {"max_position_embeddings": 64} | ENDS
    return transformers.Siglip2Model(transformers.Siglip2Config(text_config=text, vision_config=vision))


def _dinov2() -> Any:
    values = {key: value for key, value in VISION.items() if key != "intermediate_size"}
    return transformers.Dinov2Model(transformers.Dinov2Config(**values))


def _dinov3() -> Any:
    return transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**VISION, num_register_tokens=4))


def _vit() -> Any:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**VISION))


def _convnext() -> Any:
    return transformers.ConvNextModel(transformers.ConvNextConfig(hidden_sizes=[8, 8, 16, 24], depths=[1, 1, 1, 1], image_size=32))


def _gemma3() -> Any:
    text = TEXT | {"num_key_value_heads": 2, "head_dim": 8} | ENDS
    vision = VISION | {"vision_use_head": False}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=90)
    return transformers.Gemma3ForConditionalGeneration(config)


def _qwen_text() -> dict[str, Any]:
    return TEXT | {"hidden_size": 32, "intermediate_size": 64, "num_key_value_heads": 2} | rope_of([1, 1, 2]) | ENDS


def _qwen2_vl() -> Any:
    vision = {"depth": 2, "embed_dim": 48, "hidden_size": 32, "num_heads": 4, "patch_size": 14, "mlp_ratio": 2}
    return transformers.Qwen2VLForConditionalGeneration(transformers.Qwen2VLConfig(text_config=_qwen_text(), vision_config=vision, **MARKS))


def _qwen2_5_vl() -> Any:
    vision = {"depth": 2, "hidden_size": 48, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32, "fullatt_block_indexes": [1]}
    config = transformers.Qwen2_5_VLConfig(text_config=_qwen_text(), vision_config=vision | {"window_size": 56}, **MARKS)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def _qwen3_vl() -> Any:
    vision = {"depth": 2, "hidden_size": 48, "intermediate_size": 64, "num_heads": 4, "patch_size": 16, "out_hidden_size": 32}
    vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [1]}
    return transformers.Qwen3VLForConditionalGeneration(
        transformers.Qwen3VLConfig(text_config=_qwen_text() | {"head_dim": 8}, vision_config=vision, **MARKS)
    )


MODELS: dict[str, Callable[[], Any]] = {
    "clip": _clip,
    "siglip": _siglip,
    "siglip2": _siglip2,
    "dinov2": _dinov2,
    "dinov3": _dinov3,
    "vit": _vit,
    "convnext": _convnext,
    "gemma3": _gemma3,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
}
NEEDS = {"dinov3": "DINOv3ViTModel", "siglip2": "Siglip2Model", "qwen3_vl": "Qwen3VLForConditionalGeneration", "gemma3": "Gemma3Model"}
_QWEN = ("Qwen2VLImageProcessor", {"min_pixels": 4 * 28 * 28, "max_pixels": 16 * 28 * 28})
PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "clip": ("CLIPImageProcessor", CLIP_SIZES),
    "siglip": ("SiglipImageProcessor", {"size": SIZE}),
    "siglip2": ("Siglip2ImageProcessor", {"patch_size": 8, "max_num_patches": 16}),
    "dinov2": ("BitImageProcessor", CLIP_SIZES),
    "dinov3": ("DINOv3ViTImageProcessorFast", {"size": SIZE}),
    "vit": ("ViTImageProcessor", {"size": SIZE}),
    "convnext": ("ConvNextImageProcessor", {"size": {"shortest_edge": 32}, "crop_pct": 1.0}),
    "gemma3": ("Gemma3ImageProcessor", {"size": SIZE}),
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": ("Qwen2VLImageProcessor", {"patch_size": 16, "min_pixels": 4 * 32 * 32, "max_pixels": 16 * 32 * 32}),
}
