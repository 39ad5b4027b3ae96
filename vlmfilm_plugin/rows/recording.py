"""What stands between a data loader's iterator and the host's data set and collate function, in whatever process loads.

The data set's proxy notes each item's index and the files that were opened for it; the collate function's wrapper proves which item became
which row and sends that along. Both reach workers by fork or pickle, so nothing here may be a closure.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import wrapt
from torch.utils.data import Subset
from torch.utils.data._utils.pin_memory import pin_memory

from vlmfilm_plugin.rows.leaves import LeafPath, leaves
from vlmfilm_plugin.rows.opened_files import opened_files
from vlmfilm_plugin.rows.proof import prove_rows

# Batches of one collate function that are proved value by value, and after those every so many; the others by some values of each row.
_FIRST = 4
_EVERY = 64


@dataclass(frozen=True)
class MadeItem:
    """An item of a data set as it was made once.

    Attributes:
        index: what the loader asked its data set for.
        opened: the files that were opened for it, absolute, in order; None where it was made together with others.
        stated: the file that a tensor of it says it was read from (a MetaTensor), by the tensor's place.
    """

    index: Any
    opened: tuple[str, ...] | None
    stated: Mapping[LeafPath, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Carrier:
    """A batch on its way from the collate function to the loader's `__next__`, with what its rows are.

    Attributes:
        rows: by place of a tensor in the batch, the item (its position in `items`) of each row; None where that is not proved.
        trouble: why nothing could be proved; empty where that did not fail.
    """

    batch: Any
    items: Sequence[MadeItem]
    rows: Mapping[LeafPath, tuple[int | None, ...]]
    trouble: str = ""

    def pin_memory(self, *device: Any) -> Carrier:
        """Return this with its batch in pinned memory: torch calls it for types it does not know."""
        pinned: Any = pin_memory(self.batch, *device)  # type: ignore[no-untyped-call]
        return Carrier(pinned, self.items, self.rows, self.trouble)


class Recorder(threading.local):
    """The items that were made for the batch at hand, by thread: a loader may be iterated in a thread of its own."""

    def __init__(self) -> None:
        self.made: list[tuple[Any, MadeItem]] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return Recorder, ()

    def take(self, samples: Sequence[Any]) -> list[MadeItem] | None:
        """Return the items behind these samples, in their order, and forget all; None where a sample is another."""
        made, self.made = self.made, []
        last = made[-len(samples) :] if samples else []
        if len(last) == len(samples) and all(sample is held for sample, (held, _) in zip(samples, last, strict=True)):
            return [item for _, item in last]
        known = {id(held): item for held, item in made}
        found = [known[id(sample)] for sample in samples if id(sample) in known]
        return found if len(found) == len(samples) else None


class RecordingDataSet(wrapt.ObjectProxy):  # type: ignore[type-arg]
    """The host's data set, which notes what it is asked for; all else is the data set's own."""

    def __init__(self, data_set: Any, recorder: Recorder) -> None:
        super().__init__(data_set)
        self._self_recorder = recorder

    def __getitem__(self, index: Any) -> Any:
        with opened_files() as log:
            sample = self.__wrapped__[index]
        self._self_recorder.made.append((sample, MadeItem(_plain_index(index), tuple(log), _stated(sample))))
        return sample

    @property
    def __getitems__(self) -> Callable[[Sequence[Any]], Any] | None:
        """Return the data set's own way to make a whole batch; None, which torch takes for "no", where it is only a loop over items."""
        made = self.__wrapped__
        while isinstance(made, Subset):
            made = made.dataset
        return self._together if callable(getattr(made, "__getitems__", None)) else None

    def _together(self, indices: Sequence[Any]) -> Any:
        with opened_files() as log:
            samples = self.__wrapped__.__getitems__(indices)
        opened = tuple(log) if len(indices) == 1 else None
        if isinstance(samples, list) and len(samples) == len(indices):
            pairs = zip(samples, indices, strict=True)
            self._self_recorder.made += [(sample, MadeItem(_plain_index(index), opened, _stated(sample))) for sample, index in pairs]
        return samples

    def __reduce__(self) -> tuple[Any, ...]:
        return RecordingDataSet, (self.__wrapped__, self._self_recorder)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return self.__reduce__()


class NamingCollate:
    """The host's collate function, whose batches come as `Carrier`s."""

    def __init__(self, collate: Callable[[Any], Any], recorder: Recorder, *, is_batched: bool, is_in_order: bool) -> None:
        self._collate, self._recorder, self._is_batched, self._is_in_order = collate, recorder, is_batched, is_in_order
        self._count = 0

    def __call__(self, samples: Any) -> Carrier:
        items = self._recorder.take(samples if isinstance(samples, list) and self._is_batched else [samples])
        # The host's function first, and on its own: what it raises is the host's, what it draws at random as well.
        batch = self._collate(samples)
        if items is None:
            return Carrier(batch, (), {}, "the collate function was given other samples than the data set made")
        if not self._is_batched:
            return Carrier(batch, (), {}, "the loader makes no batches (batch_size=None)")
        self._count += 1
        is_full = self._count <= _FIRST or self._count % _EVERY == 0
        try:
            rows = prove_rows(samples, batch, is_in_order=self._is_in_order, is_full=is_full)
        except Exception as error:  # foreign objects may fail in any way: their rows have no names then, and whoever needs one says why
            return Carrier(batch, (), {}, f"{type(error).__name__} while the rows were proved: {error}")
        return Carrier(batch, items, rows)


def _plain_index(index: Any) -> Any:
    """Return an index that equals itself in another process: samplers may yield tensors."""
    try:
        return operator.index(index)
    except TypeError:
        return index if isinstance(index, str | tuple) else None


def _stated(sample: Any) -> dict[LeafPath, str]:
    """Return the files that tensors of a sample say they were read from."""
    found = {}
    for path, leaf in leaves(sample):
        meta = getattr(leaf, "meta", None)
        if isinstance(meta, Mapping) and isinstance(file := meta.get("filename_or_obj"), str) and file:
            found[path[1:] if isinstance(sample, list) and path else path] = file
    return found
