"""The row ledger: of the batches that data loaders gave, which item each row is; asked with a tensor, it names the rows it can prove.

In order of strength: the very tensor, a view of it, equal values, values equal up to scale and offset. Anything else is unknown, with the
reason: never "the last batch".
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmfilm_plugin.rows.data_set_items import Choice, DataSetItems
from vlmfilm_plugin.rows.leaves import LeafPath, leaves, plain, values_of_rows
from vlmfilm_plugin.rows.recording import Carrier, MadeItem

MOST_ROWS = 4096
MOST_BATCHES = 512
# Correlation of some values of a row with those of its own image, scaled or rounded to half precision: at least 0.99994; with those of a
# neighbouring slice of one volume: at most 0.9905.
OWN_CORRELATION = 0.9999
_DISTINCT = 8


@dataclass(frozen=True)
class LedgerRow:
    """What a row is: an item of a data set, and the place of its tensor in it."""

    data_set: DataSetItems
    item: MadeItem
    place: LeafPath

    @property
    def identity(self) -> tuple[int, Any]:
        """Return what tells this item from others."""
        return id(self.data_set), self.item.index

    def image(self) -> tuple[Path | None, str]:
        """Return the file of its image, or None and the reason."""
        return self.data_set.image_of(self.item, self.place)


@dataclass(frozen=True)
class RowFiles:
    """The file of each row of a tensor; None where it is not known, and then the reason, in words, of the first such row."""

    paths: tuple[Path | None, ...]
    reason: str = ""


class _Entry:
    """A tensor of a batch: its rows, some values of each, and how its memory lies."""

    def __init__(self, leaf: Any, tensor: Tensor, rows: Sequence[LedgerRow | None]) -> None:
        self.rows = tuple(rows)
        self.values = _float64(values_of_rows(tensor))
        self.numel = tensor[0].numel()
        self.memory, self.start, self.step = tensor.untyped_storage().data_ptr(), int(tensor.storage_offset()), tensor.stride(0)
        self.row_end = _extent(tensor)
        self.itemsize = tensor.element_size()
        self._leaf, self._version = weakref.ref(leaf), _version(leaf)
        self._standard: Tensor | None = None

    def is_of(self, leaf: Any) -> bool:
        return self._leaf() is leaf

    def is_current(self) -> bool:
        """Tell whether the tensor lives and holds what it held: an in-place change leaves it the same object."""
        leaf = self._leaf()
        tensor = None if leaf is None else plain(leaf)
        return (
            tensor is not None
            and _version(leaf) == self._version
            and torch.equal(_float64(values_of_rows(tensor)).nan_to_num(), self.values.nan_to_num())
        )

    def row_of_view(self, first: int, end: int, itemsize: int) -> int | None:
        """Return the row that the elements `first` to `end` of the storage lie in, or None."""
        if itemsize != self.itemsize or self.step <= 0:
            return None
        row, offset = divmod(first - self.start, self.step)
        return row if 0 <= row < len(self.rows) and offset + (end - first) <= self.row_end else None

    @property
    def standard(self) -> Tensor:
        """Return the values (R, K) of each row with mean 0 and length 1; zeros where they tell too little."""
        if self._standard is None:
            self._standard = _standardised(self.values)
        return self._standard


class Ledger:
    """The rows of the latest batches of all loaders of this process. Threads may write and ask."""

    def __init__(self) -> None:
        self.choices: list[Choice] = []
        self.troubles: dict[str, None] = {}
        self.batches = 0
        self._entries: deque[list[_Entry]] = deque()
        self._row_count = 0
        self._by_id: dict[int, _Entry] = {}
        self._by_memory: dict[int, list[_Entry]] = {}
        self._lock = threading.RLock()

    @property
    def is_used(self) -> bool:
        """Tell whether a loader has given a batch in this process, or could not be observed: only then can rows be expected to have names."""
        return bool(self.batches or self.troubles)

    def note_trouble(self, text: str) -> None:
        """Note why rows of a loader have no names."""
        self.troubles.setdefault(text)

    def note(self, carrier: Carrier, data_set: DataSetItems) -> None:
        """Take in a batch that a loader is about to give."""
        with self._lock:
            self.batches += 1
            if carrier.trouble:
                self.note_trouble(carrier.trouble)
            for item in carrier.items:
                data_set.note(item)
            entries = []
            for place, leaf in leaves(carrier.batch):
                proved = carrier.rows.get(place)
                tensor = None if proved is None else plain(leaf)
                if proved is None or tensor is None or tensor.dim() < 3:
                    continue
                rows = [None if number is None else LedgerRow(data_set, carrier.items[number], place) for number in proved]
                entries.append(_Entry(leaf, tensor, rows))
                self._by_id[id(leaf)] = entries[-1]
                self._by_memory.setdefault(entries[-1].memory, []).append(entries[-1])
                self._row_count += len(rows)
            self._entries.append(entries)
            while len(self._entries) > MOST_BATCHES or (self._row_count > MOST_ROWS and len(self._entries) > 1):
                self._forget(self._entries.popleft())

    def _forget(self, entries: Sequence[_Entry]) -> None:
        gone = {id(entry) for entry in entries}
        for entry in entries:
            self._row_count -= len(entry.rows)
            self._by_memory[entry.memory] = [other for other in self._by_memory[entry.memory] if id(other) not in gone]
            if not self._by_memory[entry.memory]:
                del self._by_memory[entry.memory]
        self._by_id = {key: entry for key, entry in self._by_id.items() if id(entry) not in gone}

    def rows_of(self, tensor: Tensor) -> list[tuple[LedgerRow, ...]]:
        """Return for each row of a tensor (R, ...) what it is: nothing where that is unknown, several where items hold the same values."""
        with self._lock:
            entry = self._by_id.get(id(tensor))
            if entry is not None and entry.is_of(tensor) and entry.is_current():
                return [() if row is None else (row,) for row in entry.rows]
            held = plain(tensor)
            if held is None or not held.dim() or not held.numel():
                return [()] * (tensor.shape[0] if tensor.dim() else 0)
            found = self._of_view(held)
            missing = [row for row, each in enumerate(found) if not each]
            if missing:
                values = _float64(values_of_rows(held if len(missing) == len(found) else held[missing]))
                by_content = self._of_content(values, held[0].numel(), held.dtype)
                for row, each in zip(missing, by_content, strict=True):
                    found[row] = each
            return found

    def files_of(self, tensor: Tensor) -> RowFiles:
        """Return the file of each row of a tensor (R, ...): of the images that a host's step was given."""
        paths: list[Path | None] = []
        reason = ""
        for number, rows in enumerate(self.rows_of(tensor)):
            images = [row.image() for row in rows]
            files = {path for path, _ in images}
            if len(files) == 1 and None not in files:
                paths.append(files.pop())
                continue
            paths.append(None)
            reason = reason or f"row {number}: {self._why(images)}"
        return RowFiles(tuple(paths), reason)

    def _why(self, images: Sequence[tuple[Path | None, str]]) -> str:
        if not images:
            troubles = f" ({'; '.join(self.troubles)})" if self.troubles else ""
            return f"it is no row of a batch that a data loader gave in this process, up to scale and offset{troubles}"
        unnamed = next((why for path, why in images if path is None), "")
        return unnamed or f"it has the pixels of several images: {', '.join(sorted({str(path) for path, _ in images})[:4])}"

    def _of_view(self, tensor: Tensor) -> list[tuple[LedgerRow, ...]]:
        entries = [entry for entry in self._by_memory.get(tensor.untyped_storage().data_ptr(), ()) if entry.is_current()]
        found: list[tuple[LedgerRow, ...]] = [()] * tensor.shape[0]
        if not entries:
            return found
        extent = _extent(tensor)
        for row in range(tensor.shape[0]):
            first = int(tensor.storage_offset()) + row * tensor.stride(0)
            for entry in entries:
                place = entry.row_of_view(first, first + extent, tensor.element_size())
                if place is not None and (known := entry.rows[place]) is not None:
                    found[row] = (known,)
        return found

    def _of_content(self, values: Tensor, numel: int, dtype: torch.dtype) -> list[tuple[LedgerRow, ...]]:
        entries = [entry for batch in reversed(self._entries) for entry in batch if entry.numel == numel]
        if not entries:
            return [()] * values.shape[0]
        rows = [row for entry in entries for row in entry.rows]
        known = torch.cat([entry.values for entry in entries]).to(dtype).double()
        # Few values decide for nearly all.
        is_near = (values[:, None, :4] == known[None, :, :4]).all(2)
        found = []
        standard = similar = None
        for row, near in enumerate(is_near):
            places = near.nonzero().flatten().tolist()
            same = [place for place in places if torch.equal(values[row], known[place])] if _tells(values[row]) else []
            if not same:
                if similar is None:
                    standard = _standardised(values)
                    similar = standard @ torch.cat([entry.standard for entry in entries]).T > OWN_CORRELATION
                same = similar[row].nonzero().flatten().tolist()
            named = {known_row.identity: known_row for place in reversed(same) if (known_row := rows[place]) is not None}
            found.append(tuple(named.values()))
        return found


def _float64(values: Tensor) -> Tensor:
    return values.to("cpu", torch.float64)


def _extent(tensor: Tensor) -> int:
    """Return how far the last element of a row lies behind its first."""
    return sum((size - 1) * abs(step) for size, step in zip(tensor.shape[1:], tensor.stride()[1:], strict=True))


def _version(leaf: Any) -> int:
    # NumPy arrays and tensors of inference mode count no changes; their values are compared all the same.
    return leaf._version if isinstance(leaf, Tensor) and not leaf.is_inference() else -1


def _tells(values: Tensor) -> bool:
    """Tell whether values differ among themselves: a constant row is everybody's."""
    return bool((values != values[0]).any())


def _standardised(values: Tensor) -> Tensor:
    """Return rows with mean 0 and length 1, and zeros for those with too few distinct values: a binary mask, up to scale, is many."""
    centred = values - values.mean(1, keepdim=True)
    length = centred.norm(dim=1, keepdim=True)
    ordered = values.sort(1).values
    distinct = (ordered[:, 1:] != ordered[:, :-1]).sum(1, keepdim=True) + 1
    is_fine = torch.isfinite(length) & (length > 0) & (distinct >= _DISTINCT)
    return torch.where(is_fine, centred / length, torch.zeros_like(centred))
