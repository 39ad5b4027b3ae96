"""A tiny random Qwen2.5-VL on disk, built and saved with the real classes: no network, about a second.

python tests/tiny_qwen.py FOLDER
"""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import pre_tokenizers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer, Qwen2TokenizerFast

try:
    from transformers import Qwen2VLImageProcessorPil as ImageProcessor
except ImportError:  # transformers 4: the plain class is the PIL one
    from transformers import Qwen2VLImageProcessor as ImageProcessor

HIDDEN = 32
END_OF_TEXT, END_OF_TURN = "<|endoftext|>", "<|im_end|>"
MARKS = (END_OF_TEXT, "<|im_start|>", END_OF_TURN, "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")


def build(folder: str | Path, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Build the model with weights drawn by `seed`, and save model, tokenizer and image processor into `folder`."""
    folder = Path(folder)
    tokenizer = _tokenizer(folder)
    ids = {mark: tokenizer.convert_tokens_to_ids(mark) for mark in MARKS}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(_config(len(tokenizer), ids)).to(dtype)
    model.generation_config.repetition_penalty = 1.05  # as the published checkpoints have it
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ImageProcessor(min_pixels=4 * 28 * 28, max_pixels=16 * 28 * 28, patch_size=14, merge_size=2, temporal_patch_size=2).save_pretrained(folder)
    return folder


def _tokenizer(folder: Path) -> Any:
    # One token a byte and no merges: any text can be written, and nothing has to be trained.
    vocab = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    common = {"unk_token": END_OF_TEXT, "eos_token": END_OF_TURN, "pad_token": END_OF_TEXT, "additional_special_tokens": list(MARKS[1:])}
    if "vocab_file" not in inspect.signature(Qwen2Tokenizer.__init__).parameters:
        return Qwen2Tokenizer(vocab=vocab, merges=[], model_max_length=512, **common)
    # transformers 4 reads files.
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    return Qwen2TokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=512, **common)


def rope_of(sections: list[int]) -> dict[str, object]:
    """Return the rotary part of a text configuration, as the installed transformers names it."""
    if int(transformers.__version__.split(".")[0]) < 5:
        return {"rope_theta": 10000.0, "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": sections}}
    return {"rope_parameters": {"rope_type": "default", "mrope_section": sections, "rope_theta": 10000.0}}


def _config(vocab_size: int, ids: dict[str, int]) -> Qwen2_5_VLConfig:
    # Ten times the usual spread, so that what the tiny model writes does depend on the image.
    rope = rope_of([1, 1, 2])
    text: dict[str, object] = {
        "vocab_size": vocab_size,
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    text |= {
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        **rope,
        "bos_token_id": ids[END_OF_TEXT],
        "initializer_range": 0.2,
    }
    vision: dict[str, object] = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 4,
        "out_hidden_size": HIDDEN,
        "fullatt_block_indexes": [1],
    }
    vision |= {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 56, "initializer_range": 0.2}
    text |= {"eos_token_id": ids[END_OF_TURN], "pad_token_id": ids[END_OF_TEXT]}
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )


if __name__ == "__main__":
    print(build(sys.argv[1]))
