"""What a vision tower gave, as one feature an image: the forms of every supported family and version of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlmfilm_plugin.errors import EncoderError

# Tokens that stand for no patch, by the names of the weights they come from.
_EXTRA_TOKENS = ("cls_token", "class_embedding", "register_tokens", "distillation_token")


def token_counts(grids: Tensor, config: Any) -> list[int]:
    """Return how many tokens a tower of the Qwen family gives for each image.

    Args:
        grids: (N, 3), the (time, height, width) of each image's patches.
        config: the tower's.
    """
    return [int(size) for size in grids.prod(-1) // int(config.spatial_merge_size) ** 2]


def token_means(output: object, grids: Tensor, config: Any) -> list[Tensor]:
    """Return the mean over the tokens of each image (F,): float32, CPU.

    Args:
        output: what a tower of the Qwen family gave.
        grids: (N, 3), the (time, height, width) of each image's patches.
        config: the tower's.
    """
    # The mean in float32: half precision would round sums over thousands of tokens.
    return list(torch.stack([tokens.float().mean(0) for tokens in image_tokens(output, token_counts(grids, config))]).cpu().unbind())


def pooled(output: object, tower: torch.nn.Module, mask: Tensor | None = None) -> list[Tensor]:
    """Return the tower's own pooled feature of each image (F,), else the mean over patch tokens: float32, CPU.

    Args:
        output: what the tower gave.
        tower: tells how many tokens come before those of patches.
        mask: (N, patches), 1 where a patch is no padding; None = no padding.

    Raises:
        EncoderError: any other form.
    """
    for name in ("image_embeds", "pooler_output"):
        held = getattr(output, name, None)
        if isinstance(held, Tensor):
            return list(held.flatten(1).float().cpu().unbind())
    tokens = getattr(output, "last_hidden_state", None)
    if not isinstance(tokens, Tensor) or tokens.ndim not in (3, 4):
        facts = {"found": type(output).__name__, "expected": "image_embeds, pooler_output or last_hidden_state"}
        raise EncoderError("cannot read the output of the vision tower", facts, "use another model")
    if tokens.ndim == 4:  # (N, F, H, W) of a convolutional tower
        return list(tokens.float().mean((2, 3)).cpu().unbind())
    extra = sum(weight.numel() // tokens.shape[-1] for name, weight in tower.named_parameters() if name.rsplit(".", 1)[-1] in _EXTRA_TOKENS)
    tokens = tokens[:, extra:].float()
    weights = torch.ones_like(tokens[..., :1]) if mask is None else mask[..., None].to(tokens)
    return list(((tokens * weights).sum(1) / weights.sum(1)).cpu().unbind())


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
    if isinstance(held, tuple) and len(held) == 2 and isinstance(held[1], list):
        held = held[0]  # Qwen3-VL in transformers 4: the tokens, and a list for its deeper layers
    if isinstance(held, torch.Tensor) and held.ndim == 2 and len(held) == sum(sizes):
        return torch.split(held, list(sizes))
    if isinstance(held, tuple | list) and [getattr(tokens, "shape", (None,))[0] for tokens in held] == list(sizes):
        return list(held)
    found = f"{type(output).__name__}, holding {type(held).__name__} {tuple(getattr(held, 'shape', ()))}"
    facts = {"found": found, "expected": f"{sum(sizes)} tokens of {len(sizes)} images, as one tensor or one an image"}
    raise EncoderError("cannot read the output of the vision tower", facts, "use a version of transformers from 4.49 to 5")
