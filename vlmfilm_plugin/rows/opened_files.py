"""Which files a thread opens while it makes an item: an audit hook for `open`, and the readers that open files below Python.

Blind to what is opened elsewhere: an open h5py handle, zarr, lmdb, a cache, threads of the data set's own.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Module -> its functions that read a file by a path, their first argument, without Python's `open`.
_READERS = {"cv2": ("imread",), "SimpleITK": ("ReadImage",)}
_MOST = 256


class _Logs(threading.local):
    """The logs of this thread, an item within an item (a data set that loads through another loader) last."""

    def __init__(self) -> None:
        self.open: list[dict[str, None]] = []


_logs = _Logs()
# What was installed in this process; a forked worker has it from its parent.
_installed: set[str] = set()


@contextmanager
def opened_files() -> Iterator[dict[str, None]]:
    """Log the absolute paths of files that this thread opens for reading inside the block: the keys of the dict, in order."""
    _install()
    log: dict[str, None] = {}
    _logs.open.append(log)
    try:
        yield log
    finally:
        _logs.open.remove(log)


def _install() -> None:
    """Install what is missing: in the process that loads, when it first does, and for a reader when it has been imported."""
    if "audit" not in _installed:
        _installed.add("audit")
        sys.addaudithook(_heard)
    for name, functions in _READERS.items():
        if name in sys.modules and name not in _installed:
            _installed.add(name)
            for function in functions:
                _watch_function(sys.modules[name], function)
    if "h5py" in sys.modules and "h5py" not in _installed:
        _installed.add("h5py")
        _watch_file_class(sys.modules["h5py"].File)


def _heard(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _logs.open:
        path, mode, flags = arguments
        # `os.open` has no mode, only flags.
        if isinstance(path, str | bytes) and (mode.startswith("r") if isinstance(mode, str) else not flags & (os.O_WRONLY | os.O_RDWR)):
            _note(path)


def _note(path: Any) -> None:
    try:
        absolute = os.path.abspath(os.fsdecode(path))
    except (TypeError, ValueError, OSError):
        return  # no path: a buffer, or a name that no file can have
    for log in _logs.open:
        if len(log) < _MOST:
            log[absolute] = None


def _watch_function(module: Any, name: str) -> None:
    original = getattr(module, name, None)
    if original is None:
        return

    @functools.wraps(original)
    def read(*args: Any, **kwargs: Any) -> Any:
        if _logs.open:
            first = args[0] if args else next(iter(kwargs.values()), None)
            # SimpleITK reads a series from a list of files.
            for path in first if isinstance(first, list | tuple) else (first,):
                _note(path)
        return original(*args, **kwargs)

    setattr(module, name, read)


def _watch_file_class(cls: Any) -> None:
    original: Callable[..., None] = cls.__init__

    @functools.wraps(original)
    def init(self: Any, name: Any, *args: Any, **kwargs: Any) -> None:
        if _logs.open:
            _note(name)
        original(self, name, *args, **kwargs)

    cls.__init__ = init
