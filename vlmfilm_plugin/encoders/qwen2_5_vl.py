"""Qwen2.5-VL as a frozen encoder: its vision tower alone (image mode), or text it writes about an image (text mode).

Image mode: Bai et al. 2025, arXiv:2502.13923. Knows nothing of stores, hosts or FiLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from vlmfilm_plugin.encoders import _loading as loading
from vlmfilm_plugin.encoders._answers import AnswerEncoder, check_prompts
from vlmfilm_plugin.encoders._frozen import OnePassEncoder, Pack
from vlmfilm_plugin.encoders._pooling import token_means
from vlmfilm_plugin.encoders._qwen_text import QwenTextEncoder
from vlmfilm_plugin.errors import SettingsError
from vlmfilm_plugin.settings.layers import resolve

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from vlmfilm_plugin.encoders.base import Encoder
    from vlmfilm_plugin.settings.record import Settings

__all__ = ["QwenImageEncoder", "QwenTextEncoder", "QwenVLMTextGenerator", "from_settings"]


def read_config(settings: Settings) -> Any:
    """Read the configuration of a Qwen2.5-VL; no weights."""
    return loading.read_config(settings, "qwen2_5_vl")


def from_settings(settings: Settings) -> Encoder:
    """Build the encoder of image mode, of text mode (`use_text_prompt_cond`) or of the port's answers (`use_logits_feature_cond`).

    The configuration is read, weights are not.

    Raises:
        SettingsError: both `prompt_template` and `prompt_templates` are set, or there are not three of them for the port's answers.
        EncoderError: the model is not found, or is not a Qwen2.5-VL.
    """
    if settings.prompt_template is not None and settings.prompt_templates is not None:
        facts = {name: f"{getattr(settings, name)!r}   (from {settings.origin(name)})" for name in ("prompt_template", "prompt_templates")}
        raise SettingsError("cannot use `prompt_template` and `prompt_templates` together", facts, "take one of them out")
    if settings.are_answers_asked:
        check_prompts(settings)
    config = read_config(settings)
    if settings.are_answers_asked:
        return AnswerEncoder(settings, config)
    return QwenTextEncoder(settings, config) if settings.use_text_prompt_cond else QwenImageEncoder(settings, config)


class QwenImageEncoder(OnePassEncoder):
    """Encode images by the frozen vision tower, averaged over tokens; the language model is never loaded."""

    @property
    def feature_dim(self) -> int:
        """Return F, the width of the tower's output."""
        return int(self.config.vision_config.out_hidden_size)

    def _features(self, tower: Any, pack: Pack) -> list[Tensor]:
        device, dtype = loading.device_of(tower), loading.dtype_of(tower)
        grids, patches = (torch.cat([item.tensors[name] for item in pack]).to(device) for name in ("image_grid_thw", "pixel_values"))
        return token_means(tower(patches.to(dtype), grid_thw=grids), grids, self.config.vision_config)

    def _part(self) -> loading.Part:
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

        return loading.Part(Qwen2_5_VisionTransformerPretrainedModel, self.config.vision_config)

    def _load(self) -> torch.nn.Module:
        # The language model, four fifths of the weights, is never materialised.
        return loading.load_part(self.settings, self.config, self._part())

    def _facts(self) -> dict[str, object]:
        return {"encoder": "qwen2_5_vl", "mode": "image", "pooling": "mean"}


class QwenVLMTextGenerator:
    """Describe images with Qwen2.5-VL and embed the text: text mode under the name and arguments of the soft-seg port.

    Args:
        model_name: a folder or a hub name.
        dtype: auto, float32, float16 or bfloat16.
        device_map: `auto`, a device, or None for one device.
        max_new_tokens: the most tokens of a description.
        prompt_template: the prompt; None = the default of the settings.
        pool: `mean` over the tokens of the text, or `last`.
        other: any other setting of the encoder, by name.

    Raises:
        SettingsError: a bad value.
        EncoderError: at first use, when the model is not found.
    """

    def __init__(
        self,
        model_name: str = "Qwen/Qwen2.5-VL-3B-Instruct",
        dtype: str = "auto",
        device_map: str | None = "auto",
        max_new_tokens: int = 48,
        prompt_template: str | None = None,
        pool: str = "mean",
        **other: object,
    ) -> None:
        named = {"model_name": model_name, "dtype": dtype, "device_map": device_map, "max_new_tokens": max_new_tokens}
        values = {**named, "prompt_template": prompt_template, "pool": pool, "use_text_prompt_cond": True, **other}
        self.settings = resolve([("arguments", values)])
        self._encoder: QwenTextEncoder | None = None

    @property
    def encoder(self) -> QwenTextEncoder:
        """Return the encoder behind this generator; the configuration is read at first use."""
        if self._encoder is None:
            self._encoder = QwenTextEncoder(self.settings, read_config(self.settings))
        return self._encoder

    def generate(self, images: Sequence[Image], prompt: str | None = None) -> list[str]:
        """Describe each image (RGB, 8 bit), greedily; `prompt` replaces the generator's own for this call."""
        return self.encoder.generate(images, prompt)

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Embed texts.

        Shape:
            return: (N, F) float32, CPU, detached.
        """
        return self.encoder.embed(texts)
