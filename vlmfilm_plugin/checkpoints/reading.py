"""Read a checkpoint file without running anything of it: tensors and plain data alone, by torch's own restricted unpickler."""

from __future__ import annotations

import importlib
import os
import pickle
import re
import stat
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vlmfilm_plugin.errors import CheckpointError

# What the checkpoints of Lightning and of MONAI's users hold beside tensors: classes and functions that make plain data and do nothing else.
# A best score, for one, is a MetaTensor where the loss came from MONAI's images, and its meta data are arrays.
_NUMPY = [f"numpy.{core}.multiarray.{name}" for core in ("_core", "core") for name in ("_reconstruct", "scalar")] + ["numpy.ndarray", "numpy.dtype"]
_MONAI = ["monai.data.meta_tensor.MetaTensor", *(f"monai.utils.enums.{name}" for name in ("MetaKeys", "SpaceKeys", "TraceKeys"))]
_OMEGACONF = ["dictconfig.DictConfig", "listconfig.ListConfig", "base.ContainerMetadata", "base.Metadata"]
_OMEGACONF += [f"nodes.{kind}Node" for kind in ("Any", "Boolean", "Bytes", "Float", "Integer", "Path", "String")]
_PYTHON = [f"pathlib{part}.{name}" for part in ("", "._local") for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")]
_PYTHON += ["argparse.Namespace", "types.SimpleNamespace", "collections.defaultdict", "typing.Any"]
_PYTHON += [f"builtins.{name}" for name in ("dict", "list", "tuple", "int", "float", "str", "bool")]
# How Lightning's weight averaging with an older torch names its annealing; `_annealing` stands for `getattr`.
_ANNEALING = {"_cosine_anneal", "_linear_anneal"}
_AVERAGING = ["torch.optim.swa_utils.SWALR", "builtins.getattr"]
_SMALL = 1 << 20  # bytes: descriptions are smaller, weights mostly larger
_BLOCK = 1 << 20
SAFE = frozenset([*_NUMPY, *_MONAI, *(f"omegaconf.{name}" for name in _OMEGACONF), *_PYTHON, *_AVERAGING])


def read_checkpoint(path: str | Path, *, is_whole: bool = False) -> Mapping[Any, Any]:
    """Return what a checkpoint file holds; tensors stay on disk where the format allows it.

    Args:
        is_whole: all of it is wanted, large tensors included: their checksums are compared, too.

    Raises:
        CheckpointError: the file cannot be read, is damaged, holds objects that only running code could make, or is no mapping.
    """
    _refuse_damaged(path, is_whole)
    try:
        content = _load(path)
    except pickle.UnpicklingError:
        content = _load_with(_safe_objects(path), path)
    except Exception as error:  # torch, zip and the file system each raise their own
        raise _unreadable(path, error) from error
    if not isinstance(content, Mapping):
        facts = {"file": path, "found": type(content).__name__, "expected": "a mapping"}
        raise CheckpointError("cannot use the checkpoint", facts, "give a checkpoint")
    return content


def _refuse_damaged(path: str | Path, is_whole: bool) -> None:
    """Compare a file's parts with the checksums that `torch.save` wrote, which `torch.load` looks at nowhere."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError("a folder, a device or a pipe")
        if not zipfile.is_zipfile(path):
            return  # torch's format before 1.6 has none
        with zipfile.ZipFile(path) as file:
            parts = file.infolist()
            if not any(part.CRC for part in parts):
                return  # `torch.serialization.set_crc32_options(False)`
            wrong = [part.filename for part in parts if (is_whole or part.file_size <= _SMALL) and not _is_sound(file, part)]
    except Exception as error:  # a damaged directory of the archive: `zipfile` raises anything
        raise _unreadable(path, error) from error
    if wrong:
        facts = {"file": path, "found": f"other content than its checksum says: {', '.join(wrong)[:200]}", "expected": "what `torch.save` wrote"}
        raise CheckpointError("cannot read the checkpoint: the file is damaged", facts, "copy it again, or take an earlier checkpoint")


def _is_sound(file: zipfile.ZipFile, part: zipfile.ZipInfo) -> bool:
    # What torch writes is as it is; something packed would be no tensor's bytes, and could grow without end.
    if part.compress_type != zipfile.ZIP_STORED:
        return False
    try:
        with file.open(part) as content:
            while content.read(_BLOCK):
                pass
    except zipfile.BadZipFile:
        return False
    return True


def _load(path: str | Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # torch's format before 1.6 cannot be mapped
        return torch.load(path, map_location="cpu", weights_only=True)


def _load_with(objects: list[Any], path: str | Path) -> Any:
    try:
        with torch.serialization.safe_globals(objects):
            return _load(path)
    except Exception as error:
        raise _unreadable(path, error) from error


def _safe_objects(path: str | Path) -> list[Any]:
    """Import what a file needs of `SAFE`, and nothing where it needs anything else."""
    names = getattr(torch.serialization, "get_unsafe_globals_in_checkpoint", None)
    if names is None:  # torch 2.5 cannot tell: what the process has imported already
        return [_object(name) for name in SAFE if name.rpartition(".")[0] in sys.modules] + _numpy_dtypes()
    try:
        needed = list(names(path))
    except Exception as error:
        raise _unreadable(path, error) from error
    if foreign := sorted(set(needed) - SAFE):
        raise _foreign(path, foreign)
    try:
        return [(_object(name), name) for name in needed] + _numpy_dtypes()
    except (ImportError, AttributeError) as error:
        raise _unreadable(path, error) from error


def _annealing(owner: Any, name: str) -> Any:
    if getattr(owner, "__qualname__", None) != "SWALR" or name not in _ANNEALING:
        raise pickle.UnpicklingError("WeightsUnpickler error: Unsupported global: GLOBAL builtins.getattr")
    return getattr(owner, name)


# Under the name that a file asks for; torch 2.5 knows safe objects by their own names alone.
_annealing.__module__, _annealing.__qualname__, _annealing.__name__ = "builtins", "getattr", "getattr"


def _object(name: str) -> Any:
    if name == "builtins.getattr":
        return _annealing
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def _numpy_dtypes() -> list[Any]:
    import numpy

    return [type(numpy.dtype(code)) for code in "?bBhHiIlLqQefdFDUSMmO"]


def _unreadable(path: str | Path, error: Exception) -> CheckpointError:
    # torch's own advice, in front of what it found, is to run the file's code.
    said = " ".join(str(error).rpartition("WeightsUnpickler error:")[2].split())[:300]
    if named := re.search(r"Unsupported (?:global: GLOBAL|class|function) (\S+)", said):
        return _foreign(path, [named.group(1)])
    return CheckpointError("cannot read the checkpoint", {"file": path, "error": said}, "give a file that torch.save wrote")


def _foreign(path: str | Path, names: Sequence[str]) -> CheckpointError:
    return CheckpointError(
        "cannot read the checkpoint without running code of its own",
        {"file": path, "found": f"objects of {', '.join(names)}", "expected": "tensors and plain data"},
        "save it without these objects",
    )
