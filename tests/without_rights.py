"""Run a function in a forked process that may write only where the mode of a file says so, whoever runs the tests."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import pytest

FORK = multiprocessing.get_context("fork")
_CAPSET, _VERSION = {"x86_64": 126, "aarch64": 91}, 0x2008_0522


def run_without_rights(work: Callable[..., Any], *arguments: object) -> Any:
    """Return what `work(*arguments)` returns there; an exception fails the test with its traceback."""
    here, there = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_run, args=(there, work, arguments))
    process.start()
    there.close()
    try:
        kind, result = here.recv()
    finally:
        process.join(60)
    if kind == "skip":
        pytest.skip(result)
    assert kind == "done", result
    return result


def _run(reports: Connection, work: Callable[..., Any], arguments: tuple[object, ...]) -> None:
    try:
        if not _drop_rights():
            reports.send(("skip", "the rights of root cannot be dropped here"))
            return
        reports.send(("done", work(*arguments)))
    except BaseException:
        reports.send(("failed", traceback.format_exc()))


def _drop_rights() -> bool:
    """Give up what lets root write everywhere."""
    if os.geteuid() != 0:
        return True
    if sys.platform != "linux" or os.uname().machine not in _CAPSET:
        return False
    header, data = (ctypes.c_uint32 * 2)(_VERSION, 0), (ctypes.c_uint32 * 6)()
    return ctypes.CDLL(None).syscall(_CAPSET[os.uname().machine], header, data) == 0
