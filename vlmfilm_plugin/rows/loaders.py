"""Observe the iterators of torch's data loaders: the private names of `torch.utils.data`, alone in this file.

The loader, its data set and its collate function stay the host's: only the iterator, an object of torch's own that lives for an epoch,
holds what records in their place.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

from torch.utils.data import IterDataPipe, MapDataPipe, dataloader, default_collate

from vlmfilm_plugin.log import film_logger
from vlmfilm_plugin.rows.data_set_items import DataSetItems
from vlmfilm_plugin.rows.ledger import Ledger
from vlmfilm_plugin.rows.recording import Carrier, NamingCollate, Recorder, RecordingDataSet

_ITEMS = "_vlmfilm_items"
_NEEDED = ("_dataset", "_collate_fn", "_dataset_kind", "_auto_collation")
_ITERATOR = "_BaseDataLoaderIter"


class _Observer:
    """What one ledger knows of the data sets behind iterators."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._items: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self._of: dict[int, DataSetItems] = {}

    def items_of(self, data_set: Any) -> DataSetItems:
        """Return what is known of a data set, over all its loaders and epochs; it goes with the data set."""
        key = id(data_set)
        if self._items.get(key) is data_set:
            return self._of[key]
        items = self._of[key] = DataSetItems(type(data_set).__name__, self.ledger.choices)
        try:
            self._items[key] = data_set
            weakref.finalize(data_set, self._of.pop, key, None)
        except TypeError:  # a list, say, cannot be referred to weakly: known for one iterator
            del self._of[key]
        return items


# Of every ledger that is written: an iterator records once, for all of them.
_observers: list[_Observer] = []
_undo: list[Callable[[], None]] = []


def watch_loaders(ledger: Ledger) -> Callable[[], None]:
    """Write the rows of every batch that a data loader gives from now on into a ledger; return the undo."""
    cls: Any = getattr(dataloader, _ITERATOR, None)
    if cls is None or "__next__" not in vars(cls):
        _say_unknown(ledger, f"this torch has no torch.utils.data.dataloader.{_ITERATOR}.__next__")
        return lambda: None
    observer = _Observer(ledger)
    _observers.append(observer)
    if len(_observers) == 1:
        _undo.append(_patch(cls))

    def undo() -> None:
        if observer in _observers:
            _observers.remove(observer)
            while _undo and not _observers:
                _undo.pop()()

    return undo


def _patch(cls: Any) -> Callable[[], None]:
    init, step = cls.__init__, cls.__next__

    @functools.wraps(init)
    def observed_init(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        _observe(self)

    @functools.wraps(step)
    def observed_next(self: Any) -> Any:
        data = step(self)
        if type(data) is not Carrier:
            return data
        for observer, items in getattr(self, _ITEMS, ()):
            observer.ledger.note(data, items)
        return data.batch

    cls.__init__, cls.__next__ = observed_init, observed_next

    def undo() -> None:
        if cls.__init__ is observed_init and cls.__next__ is observed_next:
            cls.__init__, cls.__next__ = init, step

    return undo


def _observe(iterator: Any) -> None:
    """Put what records into an iterator whose `__init__` has set its data set and collate function, and has loaded nothing yet."""
    why_not = _why_not(iterator)
    if why_not or not _observers:
        for observer in _observers:
            observer.ledger.note_trouble(why_not)
        return
    setattr(iterator, _ITEMS, [(observer, observer.items_of(iterator._dataset)) for observer in _observers])
    recorder, is_in_order = Recorder(), iterator._collate_fn is default_collate
    collate = NamingCollate(iterator._collate_fn, recorder, is_batched=iterator._auto_collation, is_in_order=is_in_order)
    iterator._dataset, iterator._collate_fn = RecordingDataSet(iterator._dataset, recorder), collate


def _why_not(iterator: Any) -> str:
    """Return why the rows of an iterator cannot be named; empty where they can."""
    own = {getattr(dataloader, name, None) for name in ("_SingleProcessDataLoaderIter", "_MultiProcessingDataLoaderIter")}
    if type(iterator) not in own:
        return f"batches come from a {type(iterator).__module__}.{type(iterator).__name__}, which is no iterator of torch's own"
    if missing := [name for name in _NEEDED if not hasattr(iterator, name)]:
        return f"this torch's data loader has no {', '.join(missing)}"
    if iterator._dataset_kind != dataloader._DatasetKind.Map or isinstance(iterator._dataset, IterDataPipe | MapDataPipe):
        return f"{type(iterator._dataset).__name__} is iterated, not asked for items: its rows have no index"
    return ""


def _say_unknown(ledger: Ledger, text: str) -> None:
    ledger.note_trouble(text)
    film_logger().warning("[VLM] WARNING: rows of data loaders have no names: %s", text)
