"""Batches whose rows were put into another order: MONAI's MetaTensor keeps its metadata as it was when it is indexed, flipped or rolled.

The result is marked here, and so is everything that is made of it; metadata of a marked tensor names other rows' files.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import wrapt

_MARK = "_vlmfilm_is_reordered"
# fmt: off
_REORDERING = frozenset({
    "index_select", "flip", "flipud", "roll", "gather", "take", "take_along_dim", "sort", "msort", "scatter", "cat",
    "concat", "concatenate", "stack", "vstack", "row_stack", "index_copy", "repeat", "repeat_interleave", "tile",
    "masked_select", "index_add", "index_put",
})
# fmt: on
_is_watching = False


def watch_order() -> None:
    """Mark MetaTensors that are reordered from now on; nothing is imported."""
    global _is_watching
    if not _is_watching:
        _is_watching = True
        wrapt.register_post_import_hook(
            lambda module: wrapt.wrap_function_wrapper(module, "MetaTensor.update_meta", _update_meta), "monai.data.meta_tensor"
        )


def is_reordered(image: object) -> bool:
    """Tell whether the rows of a tensor are known to be in another order than its metadata."""
    return getattr(image, _MARK, False) is True


def _update_meta(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    returned = wrapped(*args, **kwargs)
    if len(args) >= 3:
        _, function, given, *_ = args
        if _reorders(function, given) or any(map(is_reordered, _flat(given))):
            for item in returned:
                if hasattr(item, "meta") and getattr(item, "is_batch", False):
                    setattr(item, _MARK, True)
    return returned


def _reorders(function: Any, given: tuple[Any, ...]) -> bool:
    name = getattr(function, "__name__", "")
    if name != "__getitem__":
        return name.rstrip("_") in _REORDERING
    index = given[1][0] if isinstance(given[1], tuple) and given[1] else given[1]
    # Of one row, and of slices, MONAI takes the metadata along; None and ... leave the rows alone.
    return not (index is None or index is Ellipsis or isinstance(index, int | slice))


def _flat(given: Iterable[Any]) -> Iterable[Any]:
    for item in given:
        if isinstance(item, list | tuple):
            yield from _flat(item)
        else:
            yield item
