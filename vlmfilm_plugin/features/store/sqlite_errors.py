"""What SQLite raises, as errors of this package: what could not be done, what the system said, one fix."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from vlmfilm_plugin.errors import StoreError
from vlmfilm_plugin.features.store.file_systems import lock_problem_in, type_of

FILE_NAME = "features.sqlite"
LOCAL_FIX = "set `cache_dir` to a folder on a local disk; `vlmfilm cache merge` copies a store there"

_DELETE = f"delete {FILE_NAME} with its -wal and -shm files; features are encoded again"
# What SQLite says where a lock was not granted, of the file and of its shared memory.
_LOCKS = ("locked", "locking protocol")
_FIXES = (
    ("locking protocol", "end the other processes that use this file, or set `cache_dir` to a folder on a local disk"),
    ("locked", "wait for, or end, the other process that writes to this file"),
    ("full", "free space on the disk, or set `cache_dir` to another one"),
    ("disk i/o", "free space on the disk, or set `cache_dir` to another one"),
    ("not a database", _DELETE),
    ("malformed", _DELETE),
    ("no such", _DELETE),
    ("too big", _DELETE),
    ("interrupted", _DELETE),
    ("readonly", "set `cache_dir` to a folder you can write"),
    ("unable to open", "set `cache_dir` to a folder you can write"),
)


def store_error(action: str, path: Path, error: Exception) -> StoreError:
    """Return the error that says why `action` could not be done."""
    said = str(error)
    if any(text in said for text in _LOCKS) and (problem := lock_problem_in(path.parent)) is not None:
        return without_locks(action, path, problem)
    if said == "interrupted":
        said = "interrupted: its pages lead in circles, or name more rows than the file can hold"
    fix = next((fix for text, fix in _FIXES if text in said.lower()), "check the disk and the folder of the file")
    facts = {"file": path, "SQLite said": said, "expected": "a feature store that can be read and written"}
    return StoreError(f"cannot {action} the feature store", facts, fix)


def without_locks(action: str, path: Path, problem: OSError) -> StoreError:
    """Return the error about a file system that grants no locks: no other process is to blame."""
    found = f"a file system ({type_of(path.parent) or 'of unknown type'}) that grants no locks"
    facts = {"file": path, "found": found, "system said": problem.strerror or str(problem), "expected": "a file system with locks"}
    return StoreError(f"cannot {action} the feature store: its file system grants no locks", facts, LOCAL_FIX)


def cannot_be_read_in_place(error: sqlite3.Error) -> bool:
    """Tell whether SQLite would have had to write something to read a file: a journal to roll back, shared memory to make."""
    return any(text in str(error).lower() for text in ("readonly", "unable to open"))


def foreign(path: Path, found: str) -> StoreError:
    """Return the error about a file that is not ours to touch."""
    facts = {"file": path, "found": found, "expected": "a feature store of vlmfilm-plugin, or an empty file"}
    headline = "cannot open the feature store: this database is none, or was changed"
    return StoreError(headline, facts, "set `cache_dir` to another folder; the file was left as it is")


def unknown_version(path: Path, version: int, known: int) -> StoreError:
    """Return the error about a store of a later version of this package."""
    facts = {"file": path, "found": f"version {version}", "expected": f"version {known} or older"}
    fix = "upgrade vlmfilm-plugin, or set `cache_dir` to another folder"
    return StoreError("cannot open the feature store: unknown schema", facts, fix)
