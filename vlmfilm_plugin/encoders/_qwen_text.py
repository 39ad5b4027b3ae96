"""Text mode of Qwen2.5-VL: the model describes an image, and the description's last hidden state is the feature."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from vlmfilm_plugin.encoders import _loading as loading
from vlmfilm_plugin.encoders._frozen import LazyEncoder, Pack, features_of, in_groups
from vlmfilm_plugin.encoders._identity import facts_of_files
from vlmfilm_plugin.encoders._pooling import token_counts
from vlmfilm_plugin.errors import EncoderError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

# The chat format the model was trained with, written out: the processor class that would build it needs torchvision
# for its video half, and the template in the checkpoint needs jinja2.
_BEFORE_IMAGE = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
_AFTER_IMAGE = "<|vision_end|>{prompt}<|im_end|>\n<|im_start|>assistant\n"
_TEXTS_PER_BATCH = 32
# What decides the ids of a prompt, and, in text mode, where a text ends.
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_GENERATION_FILES = ("generation_config.json",)


class QwenModel(LazyEncoder):
    """Hold the whole frozen Qwen2.5-VL, and write prompts for it."""

    @cached_property
    def tokenizer(self) -> Any:
        """Return the tokenizer, read once."""
        return loading.read_tokenizer(self.settings)

    def _facts_of_files(self) -> dict[str, object]:
        return facts_of_files(self.settings, "tokenizer", TOKENIZER_FILES)

    def _prompt_ids(self, prompt: str) -> tuple[list[int], list[int]]:
        before, after = (self.tokenizer(part, add_special_tokens=False)["input_ids"] for part in (_BEFORE_IMAGE, _AFTER_IMAGE.format(prompt=prompt)))
        if self.config.image_token_id in after:
            facts = {"found": repr(prompt[:80]), "expected": "text without image placeholders"}
            raise EncoderError("cannot use this prompt: it names an image token", facts, "take the special token out of `prompt_template`")
        if self.config.vision_start_token_id not in before:
            facts = {"found": f"token ids {before[-3:]}", "expected": f"{self.config.vision_start_token_id} for <|vision_start|>"}
            raise EncoderError("cannot write a prompt: tokenizer and model do not fit", facts, "download the model again")
        return before, after

    @property
    def _pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad is None else pad)

    def padded(self, rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
        """Return ids and mask (rows, length) of rows of token ids.

        Padding on the right: attention is causal, so no real token sees it, and positions count from the left.
        """
        pad = torch.nn.utils.rnn.pad_sequence
        ids = pad([torch.tensor(row) for row in rows], batch_first=True, padding_value=self._pad_id)
        mask = pad([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True)
        return ids.to(device), mask.to(device)

    def _load(self) -> torch.nn.Module:
        from transformers import Qwen2_5_VLForConditionalGeneration

        return loading.load_model(self.settings, self.config, Qwen2_5_VLForConditionalGeneration)


def language_model_of(model: Any) -> Any:
    """Return the language model of a Qwen2.5-VL, whose place moved in transformers 4.52."""
    return getattr(model.model, "language_model", model.model)


class QwenTextEncoder(QwenModel):
    """Encode images by the text the model writes about them, pooled over the text's last hidden states.

    With several prompts a feature is the embeddings of the texts they get, in the order of the prompts.
    """

    @property
    def feature_dim(self) -> int:
        """Return F, the language model's width times the number of prompts."""
        return self._width * len(self.settings.prompts)

    @property
    def _width(self) -> int:
        return int(self.config.get_text_config().hidden_size)

    def encode(self, images: Sequence[Image]) -> Tensor:
        """Describe images (RGB, 8 bit, any sizes) and embed the descriptions.

        Shape:
            return: (N, F) float32, CPU, detached.

        Raises:
            FeatureError: a feature holds NaN or infinity.
            EncoderError: the weights cannot be loaded, or the prompt cannot be used.
        """
        return self.encode_annotated(images)[0]

    def encode_annotated(self, images: Sequence[Image]) -> tuple[Tensor, list[str]]:
        """Encode as `encode` does, and return the text behind each feature: as it is for one prompt, a JSON list of texts for several."""
        texts = [self.generate(images, prompt) for prompt in self.settings.prompts]
        with torch.inference_mode(False):
            features = torch.cat([self.embed(column) for column in texts], dim=1)
        if len(texts) == 1:
            return features, texts[0]
        return features, [json.dumps(row, ensure_ascii=False) for row in zip(*texts, strict=True)]

    def generate(self, images: Sequence[Image], prompt: str | None = None) -> list[str]:
        """Describe each image in at most `max_new_tokens` tokens, greedily, whatever else is in the batch.

        Args:
            images: RGB, 8 bit, any sizes.
            prompt: what to ask; None = the first prompt of the settings.
        """
        before, after = self._prompt_ids(self.settings.prompt if prompt is None else prompt)
        return self.run(images, lambda model, pack: self._describe(model, pack, before, after))

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Embed texts by the language model alone; `pool` is `mean` over a text's tokens or `last`.

        Shape:
            return: (N, F) float32, CPU, detached.
        """
        rows: list[Tensor] = []
        with self.using_module() as model:
            for start in range(0, len(texts), _TEXTS_PER_BATCH):
                rows.extend(self._pooled(model, texts[start : start + _TEXTS_PER_BATCH]))
        return features_of(rows, self._width, "text")

    def _describe(self, model: Any, pack: Pack, before: list[int], after: list[int]) -> list[str]:
        # Together only images of one grid: their prompts have one length and need no padding. With left padding over different
        # grids, several releases of transformers 4 give rows wrong positions, and a text depends on the other images.
        return in_groups(
            pack, lambda item: tuple(item.tensors["image_grid_thw"][0].tolist()), lambda part: self._describe_alike(model, part, before, after)
        )

    def _describe_alike(self, model: Any, pack: Pack, before: list[int], after: list[int]) -> list[str]:
        device = loading.device_of(model)
        image_token = self.config.image_token_id
        row = before + [image_token] * token_counts(pack[0].tensors["image_grid_thw"], self.config.vision_config)[0] + after
        ids = torch.tensor([row] * len(pack), device=device)
        grids, patches = (torch.cat([item.tensors[name] for item in pack]).to(device) for name in ("image_grid_thw", "pixel_values"))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "image_grid_thw": grids, "pixel_values": patches.to(model.dtype)}
        if "mm_token_type_ids" in inspect.signature(type(model).forward).parameters:
            # transformers 5 tells image tokens by this instead of by their id; without it the positions are silently those of plain text.
            inputs["mm_token_type_ids"] = (ids == image_token).int()
        # Greedy and nothing else: the checkpoint's own sampling values and repetition penalty are for chats.
        greedy = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "temperature": None, "top_p": None, "top_k": None}
        limits = {"max_new_tokens": self.settings.max_new_tokens, "pad_token_id": self._pad_id}
        written = model.generate(**inputs, **greedy, **limits)[:, len(row) :]
        return [text.strip() for text in self.tokenizer.batch_decode(written, skip_special_tokens=True)]

    def _pooled(self, model: Any, texts: Sequence[str]) -> list[Tensor]:
        # A model may answer with nothing: one pad token stands for the empty text.
        rows = [self.tokenizer(text, add_special_tokens=False)["input_ids"] or [self._pad_id] for text in texts]
        ids, mask = self.padded(rows, loading.device_of(model))
        # The language model alone: the whole one would reuse the image positions of the last generation.
        states = language_model_of(model)(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state.float()
        if self.settings.pool == "last":
            return [states[row, len(tokens) - 1].cpu() for row, tokens in enumerate(rows)]
        return [states[row, : len(tokens)].mean(0).cpu() for row, tokens in enumerate(rows)]

    def _facts_of_files(self) -> dict[str, object]:
        return facts_of_files(self.settings, "tokenizer", TOKENIZER_FILES + _GENERATION_FILES)

    def _facts(self) -> dict[str, object]:
        prompts = self.settings.prompts
        facts: dict[str, object] = {"encoder": "qwen2_5_vl", "mode": "text", "pooling": self.settings.pool}
        return {**facts, "prompt": prompts[0] if len(prompts) == 1 else list(prompts), "max_new_tokens": self.settings.max_new_tokens}
