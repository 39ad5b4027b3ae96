"""Qwen2.5-VL as a frozen encoder: its vision tower alone (image mode), or text it writes about an image (text mode).

Image mode: Bai et al. 2025, arXiv:2502.13923. Knows nothing of stores, hosts or FiLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from vlmfilm_plugin.encoders import _qwen_loading as loading
from vlmfilm_plugin.encoders._qwen_base import LazyQwen, Pack, features_of
from vlmfilm_plugin.encoders._qwen_text import QwenTextEncoder
from vlmfilm_plugin.errors import EncoderError
from vlmfilm_plugin.settings import resolve

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from vlmfilm_plugin.encoders.base import Encoder
    from vlmfilm_plugin.settings import Settings

__all__ = ["QwenImageEncoder", "QwenTextEncoder", "QwenVLMTextGenerator", "from_settings"]


def from_settings(settings: Settings) -> Encoder:
    """Build the encoder of image mode, or of text mode with `use_text_prompt_cond`; the configuration is read, weights are not.

    Raises:
        EncoderError: the model is not found, or is not a Qwen2.5-VL.
    """
    config = loading.read_config(settings)
    return QwenTextEncoder(settings, config) if settings.use_text_prompt_cond else QwenImageEncoder(settings, config)


class QwenImageEncoder(LazyQwen):
    """Encode images by the frozen vision tower, averaged over tokens; the language model is never loaded."""

    @property
    def feature_dim(self) -> int:
        """Return F, the width of the tower's output."""
        return int(self.config.vision_config.out_hidden_size)

    def encode(self, images: Sequence[Image]) -> Tensor:
        """Encode images (RGB, 8 bit, any sizes).

        Shape:
            return: (N, F) float32, CPU, detached.

        Raises:
            FeatureError: a feature holds NaN or infinity.
            EncoderError: the weights cannot be loaded, or one image alone does not fit in memory.
        """
        return features_of(self.run(images, self._means), self.feature_dim, "image")

    def _means(self, tower: torch.nn.Module, pack: Pack) -> list[Tensor]:
        device, weight = loading.device_of(tower), next(tower.parameters())
        grid = torch.cat(pack.grids).to(device)
        merged = int(self.config.vision_config.spatial_merge_size) ** 2
        output = tower(torch.cat(pack.patches).to(device, weight.dtype), grid_thw=grid)
        sizes = [int(size) for size in (torch.cat(pack.grids).prod(-1) // merged)]
        # The mean in float32: half precision would round sums over thousands of tokens.
        means = torch.stack([tokens.float().mean(0) for tokens in image_tokens(output, sizes)])
        return list(means.cpu().unbind())

    def _load(self) -> torch.nn.Module:
        return loading.load_tower(self.settings, self.config)

    def _mode_facts(self) -> dict[str, object]:
        return {"mode": "image", "pooling": "mean"}


def image_tokens(output: object, sizes: Sequence[int]) -> Sequence[Tensor]:
    """Return the tokens of each image from what a tower gave: (tokens_i, F) each.

    transformers 4 gives one tensor of all tokens, 5 an output object whose `pooler_output` is that tensor, or one tensor an image.

    Args:
        output: the tower's output.
        sizes: tokens of each image.

    Raises:
        EncoderError: any other form.
    """
    held: Any = getattr(output, "pooler_output", output)
    if isinstance(held, torch.Tensor) and held.ndim == 2 and len(held) == sum(sizes):
        return torch.split(held, list(sizes))
    if isinstance(held, tuple | list) and [getattr(tokens, "shape", (None,))[0] for tokens in held] == list(sizes):
        return list(held)
    found = f"{type(output).__name__}, holding {type(held).__name__} {tuple(getattr(held, 'shape', ()))}"
    facts = {"found": found, "expected": f"{sum(sizes)} tokens of {len(sizes)} images, as one tensor or one an image"}
    raise EncoderError("cannot read the output of the vision tower", facts, "use a version of transformers from 4.49 to 5")


class QwenVLMTextGenerator:
    """Describe images with Qwen2.5-VL and embed the text: text mode under the name and arguments of the soft-seg port.

    Args:
        model_name: a folder or a hub name.
        dtype: auto, float32, float16 or bfloat16.
        device_map: `auto`, a device, or None for one device.
        max_new_tokens: the most tokens of a description.
        prompt_template: the prompt; None = the default of the settings.
        pool: `mean` over the tokens of the text, or `last`.
        settings: any other setting of the encoder, by name.

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
        **settings: object,
    ) -> None:
        named = {"model_name": model_name, "dtype": dtype, "device_map": device_map, "max_new_tokens": max_new_tokens}
        values = {**named, "prompt_template": prompt_template, "pool": pool, "use_text_prompt_cond": True, **settings}
        self.settings = resolve([("arguments", values)])
        self._encoder: QwenTextEncoder | None = None

    @property
    def encoder(self) -> QwenTextEncoder:
        """Return the encoder behind this generator; the configuration is read at first use."""
        if self._encoder is None:
            self._encoder = QwenTextEncoder(self.settings, loading.read_config(self.settings))
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
