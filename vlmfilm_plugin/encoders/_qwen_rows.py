"""Several texts around one image through the whole Qwen2.5-VL at once: the tower runs once for all of them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from vlmfilm_plugin.encoders import _loading as loading
from vlmfilm_plugin.encoders._frozen import Prepared
from vlmfilm_plugin.encoders._pooling import image_tokens, token_counts
from vlmfilm_plugin.encoders._qwen_text import QwenModel, language_model_of

if TYPE_CHECKING:
    from torch import Tensor

# Token ids before and after those of the image.
Around = tuple[Sequence[int], Sequence[int]]


def last_states(encoder: QwenModel, model: Any, item: Prepared, texts: Sequence[Around]) -> tuple[Tensor, list[int]]:
    """Return the last hidden states (texts, length, hidden), and the length of each text with the image's tokens in it."""
    device = loading.device_of(model)
    grid = item.tensors["image_grid_thw"].to(device)
    tokens = _image_tokens(encoder, model, item.tensors["pixel_values"].to(device, model.dtype), grid)
    rows = [[*before, *[encoder.config.image_token_id] * len(tokens), *after] for before, after in texts]
    ids, mask = encoder.padded(rows, device)
    is_image = ids == encoder.config.image_token_id
    embeds = model.get_input_embeddings()(ids)
    embeds = embeds.masked_scatter(is_image[..., None], tokens.to(embeds).repeat(len(ids), 1))
    states: Tensor = language_model_of(model)(
        inputs_embeds=embeds, position_ids=_positions(model, ids, mask, is_image, grid), attention_mask=mask, use_cache=False
    ).last_hidden_state
    return states, [len(row) for row in rows]


def logits_at(model: Any, states: Tensor, rows: Sequence[int], places: Sequence[int]) -> Tensor:
    """Return the logits (places, vocabulary) at some places of some rows, float32 on the CPU; those of every token would be gigabytes."""
    chosen = states[torch.tensor(rows, device=states.device), torch.tensor(places, device=states.device)]
    logits: Tensor = model.lm_head(chosen).float().cpu()
    return logits


def _image_tokens(encoder: QwenModel, model: Any, patches: Tensor, grid: Tensor) -> Tensor:
    tower = model.visual if hasattr(model, "visual") else model.model.visual  # moved in transformers 4.52
    return image_tokens(tower(patches, grid_thw=grid), token_counts(grid, encoder.config.vision_config))[0]


def _positions(model: Any, ids: Tensor, mask: Tensor, is_image: Tensor, grid: Tensor) -> Tensor:
    """Return the positions (3, texts, length) as the model counts them for text around an image."""
    index = (model.model if hasattr(model.model, "get_rope_index") else model).get_rope_index
    # transformers 5 tells image tokens by this instead of by their id.
    types = {"mm_token_type_ids": is_image.int()} if "mm_token_type_ids" in inspect.signature(index).parameters else {}
    positions: Tensor = index(input_ids=ids, image_grid_thw=grid.expand(len(ids), -1), attention_mask=mask, **types)[0]
    return positions
