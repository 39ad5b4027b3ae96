"""Where the images of a batch are: in the arguments of whoever was called, and in those of the UNet. By the row ledger, else by names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmfilm_plugin.rows.ledger import Ledger

_MASKS = re.compile(
    r"mask|label|seg|(^|\W)gt(\W|$)|truth|target|annot|lbl|(^|[\W])y(\W|$)|noise|weight|coord|geometry|boundary|^t$|time", re.IGNORECASE
)
_IMAGES = re.compile(r"image|img|cond|scan|volume|slice|picture|photo|input|(^|\W)x(\W|$)|data", re.IGNORECASE)
_MOST_CHANNELS = 16
_FEW_VALUES = 3

Window = tuple[int, int]


@dataclass(frozen=True)
class FoundImage:
    """A tensor that holds the images of a batch.

    Attributes:
        argument: the argument that holds it.
        keys: the way from there to the tensor.
        channels: first and end of its channels in that tensor; None: all.
        is_loaded: whether the row ledger knows it as what a data loader gave.
        place: which leaf of a sample it is, where that is known.
    """

    argument: str
    keys: tuple[int | str, ...]
    tensor: Tensor
    is_loaded: bool
    place: Any = None
    channels: Window | None = None

    @property
    def text(self) -> str:
        """Return the expression: `batch["image"]`."""
        return self.argument + "".join(f"[{key!r}]" for key in self.keys) + window_text(self.channels)


def window_text(channels: Window | None) -> str:
    """Return an index of some channels: `[:, 0:3]`."""
    return "" if channels is None else f"[:, {channels[0]}:{channels[1]}]"


def images_in(arguments: Mapping[str, Any], ledger: Ledger, *, in_channels: bool = False) -> FoundImage | None:
    """Return the images among arguments: of those that the ledger knows the likeliest, or None where it knows none.

    Args:
        in_channels: look at some channels of each tensor, instead of all.
    """
    found: list[tuple[int, int, FoundImage]] = []
    for argument, value in arguments.items():
        for keys, tensor in _leaves(value):
            for channels, part in _windows(tensor) if in_channels else [(None, tensor)]:
                place = _place(part, ledger)
                if place is not None:
                    image = FoundImage(argument, keys, part, True, place, channels)
                    found.append((_score(f"{argument} {' '.join(map(str, keys))}", part), -len(found), image))
    return max(found, key=lambda each: each[:2])[2] if found else None


@dataclass(frozen=True)
class Condition:
    """Where a UNet's forward holds the condition image.

    Attributes:
        argument: of `forward`.
        channels: first and end of its channels there; None: all.
        is_proved: whether the image of the batch is there, value by value; else only names say so.
    """

    argument: str
    channels: Window | None
    is_proved: bool

    @property
    def text(self) -> str:
        """Return the expression: `x[:, :3]`."""
        return self.argument + window_text(self.channels)


def condition_in(arguments: Mapping[str, Any], image: FoundImage | None, ledger: Ledger) -> Condition | None:
    """Return where the images of the batch are in a UNet's arguments, or None where nothing says so."""
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor) and value.dim() > 2}
    for name, tensor in tensors.items():
        if _is_image(tensor, image, ledger):
            return Condition(name, None, True)
    for name, tensor in tensors.items():
        for channels, part in _windows(tensor):
            if _is_image(part, image, ledger):
                return Condition(name, channels, True)
    named = [name for name in tensors if re.search(r"cond|image|img|context", name, re.IGNORECASE) and not _MASKS.search(name)]
    return Condition(named[0], None, False) if named else None


def _is_image(tensor: Tensor, image: FoundImage | None, ledger: Ledger) -> bool:
    if image is not None and tensor.shape == image.tensor.shape:
        whole = image.tensor.detach().as_subclass(Tensor)
        if torch.equal(tensor.detach().as_subclass(Tensor).to(whole.device, whole.dtype), whole):
            return True
    place = _place(tensor, ledger)
    if place is None:
        return False
    return place == image.place if image is not None else _score("", tensor) > -1


def _windows(tensor: Tensor) -> Iterator[tuple[Window, Tensor]]:
    """Return every run of some channels of a tensor (R, C, ...), the longest first from each channel on."""
    count = tensor.shape[1] if tensor.dim() > 2 else 0
    if count <= _MOST_CHANNELS:
        for first, end in ((a, b) for a in range(count) for b in range(count, a, -1) if (a, b) != (0, count)):
            yield (first, end), tensor[:, first:end]


def _place(tensor: Tensor, ledger: Ledger) -> Any:
    """Return which leaf of a sample the rows of a tensor are, where the ledger knows all of them."""
    if tensor.dim() < 3 or not tensor.numel() or not tensor.shape[0]:
        return None
    rows = ledger.rows_of(tensor)
    places = [{row.place for row in each} for each in rows]
    common = set.intersection(*places) if places else set()
    return next(iter(common)) if len(common) == 1 else None


def _score(name: str, tensor: Tensor) -> int:
    score = (2 if _IMAGES.search(name) else 0) - (4 if _MASKS.search(name) else 0)
    values = tensor.detach().as_subclass(Tensor)[0].flatten()[:65536]
    few = torch.unique(values).numel() <= _FEW_VALUES
    return score - (3 if few else 0) - (0 if tensor.is_floating_point() else 1)


def _leaves(value: Any, keys: tuple[int | str, ...] = ()) -> Iterator[tuple[tuple[int | str, ...], Tensor]]:
    if isinstance(value, Tensor):
        yield keys, value
    elif len(keys) < 2:
        if isinstance(value, Mapping):
            for key, each in value.items():
                if isinstance(key, str | int):
                    yield from _leaves(each, (*keys, key))
        elif isinstance(value, tuple | list):
            for number, each in enumerate(value[:16]):
                yield from _leaves(each, (*keys, number))
