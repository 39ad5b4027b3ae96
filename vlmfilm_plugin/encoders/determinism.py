"""Proof that an encoder gives an image one feature: not another one in every forward, nor one that depends on the images beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from vlmfilm_plugin.encoders.base import Encoder, encode_annotated
from vlmfilm_plugin.errors import UnsteadyEncoderError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

# Rounding, relative to the norm of a feature.
_TOLERANCE, _TOLERANCE_HALF = 1e-4, 1e-2


def prove_deterministic(encoder: Encoder, pictures: Sequence[Image], features: Tensor) -> None:
    """Check an encoder on the first of the images that it has just encoded: again alone, and beside another image.

    Costs four more encodings of one image.

    Args:
        pictures: N > 0 images (RGB, 8 bit).
        features: (N, F), what the encoder gave for them.

    Raises:
        UnsteadyEncoderError: the features of the first image differ by more than rounding: 1e-2 of their norm where the encoder computes in
            half precision, 1e-4 in float32.
    """
    first, limit = pictures[0], _tolerance(encoder, features)
    # The negative: as large as the image, and as unlike it as can be.
    beside = first.point(lambda value: 255 - value)
    alone = _encode(encoder, [first])
    tries = {
        "encoded alone, twice": (alone, _encode(encoder, [first])),
        "encoded alone, and beside another image": (alone, _encode(encoder, [first, beside])),
    }
    if len(pictures) > 1:
        tries["encoded alone, and in a batch"] = alone, features[0]
    for what, (one, other) in tries.items():
        found = _difference(one, other)
        if not found <= limit:
            facts = {"encoder": type(encoder).__name__, "image": what, "found": f"features that differ by {found:.2g} of their norm"}
            fix = "use another model, or, where half precision or the batch decides, set `dtype` to float32 or `max_patches_per_batch` to 1"
            raise UnsteadyEncoderError(
                "cannot store the features of this encoder: the same image gets different ones", {**facts, "expected": f"at most {limit:g}"}, fix
            )


def _encode(encoder: Encoder, pictures: Sequence[Image]) -> Tensor:
    return encode_annotated(encoder, pictures)[0][0]


def _difference(one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape:
        return float("inf")
    size = max(float(one.double().norm()), float(other.double().norm()))
    return float((one.double() - other.double()).norm()) / size if size else 0.0


def _tolerance(encoder: Encoder, features: Tensor) -> float:
    """Return the tolerance by the dtype an encoder says it computes in (`compute_dtype`), else by that which holds its features exactly."""
    dtype = getattr(encoder, "compute_dtype", None)
    if not isinstance(dtype, torch.dtype):
        is_half = any(torch.equal(features.to(half).to(features.dtype), features) for half in (torch.float16, torch.bfloat16))
        return _TOLERANCE_HALF if is_half else _TOLERANCE
    return _TOLERANCE_HALF if dtype in (torch.float16, torch.bfloat16) else _TOLERANCE
