"""Content hashes: the name of an image that has none, taken from its content and its crop.

Tensors and arrays are duck-typed: torch is not imported.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vlmfilm_plugin.errors import ConditionError


def content_hashes(image: object, crops: Sequence[bytes]) -> list[str]:
    """Return 32 hex digits for each row of an image: equal content and crop give equal digits, at any position.

    Args:
        crops: what the metadata says about the crop of each row, empty where it says nothing.

    Shape:
        image: (rows, C, H, W), any dtype, any device.

    Raises:
        ConditionError: `image` has not one array for each row.
    """
    rows = row_count(image)
    digests = [_digest(image[row], crop) for row, crop in enumerate(crops)] if rows == len(crops) else []  # type: ignore[index]
    if rows is None or len(digests) != rows or not all(digests):
        raise ConditionError(
            "cannot name the rows of this batch: no field names them, and no image can be hashed",
            {"found": f"image {type(image).__name__} {getattr(image, 'shape', '')}".rstrip(), "expected": f"a tensor of {len(crops)} rows"},
            "give each row a name in batch['name'], or pass the image",
        )
    return digests


def _digest(row: Any, crop: bytes) -> str:
    """Return 32 hex digits of a row's dtype, shape, values and crop; empty where the row is no array."""
    if not hasattr(row, "shape") or not hasattr(row, "dtype"):
        return ""
    dtype = str(row.dtype).removeprefix("torch.")
    if hasattr(row, "detach"):
        plain = row.as_tensor() if hasattr(row, "as_tensor") else row
        plain = plain.detach().cpu()
        row = (plain.float() if dtype == "bfloat16" else plain).numpy()  # numpy has no bfloat16; float32 holds it exactly
    values = np.ascontiguousarray(row)
    # The whole content: borders of medical images are often black, and a sample of bytes would make different images equal.
    state = hashlib.blake2b(f"{dtype}{values.shape}".encode() + crop, digest_size=16)
    state.update(values.tobytes())
    return state.hexdigest()


def row_vectors(held: object, rows: int, *, is_scalar_fine: bool) -> list[list[object]] | None:
    """Return one vector of numbers a row, or None where `held` does not give exactly that."""
    if row_count(held) != rows or isinstance(held, str | bytes | Mapping):
        return None
    items: Sequence[Any] = held if isinstance(held, list | tuple) else attempt(getattr(held, "tolist", list))  # type: ignore[assignment]
    if isinstance(held, list | tuple) and any(row_count(item) == rows and hasattr(item, "tolist") for item in items):
        # PyTorch collates points into one tensor a coordinate: with as many rows as coordinates nobody can tell it
        # from one tensor a row, and a wrong reading would make the key depend on the position in the batch.
        return None
    vectors = [attempt(item.tolist) if hasattr(item, "tolist") else item for item in items]
    is_vector = [isinstance(vector, list | tuple) for vector in vectors]
    if not all(is_vector) and not is_scalar_fine:
        return None
    flat = [list(vector) if isinstance(vector, list | tuple) else [vector] for vector in vectors]
    return flat if all(isinstance(x, int | float) for vector in flat for x in vector) else None


def row_count(held: object) -> int | None:
    """Return the length of a list, tuple, array or tensor, or None where `held` is none of these."""
    shape = getattr(held, "shape", None)
    if isinstance(shape, tuple):
        return int(shape[0]) if shape else None
    return len(held) if isinstance(held, list | tuple) else None


def attempt(call: Callable[[], object]) -> object:
    """Return what a call returns, or None where it raises."""
    try:
        return call()
    except Exception:  # foreign objects: what cannot be read names nothing
        return None
