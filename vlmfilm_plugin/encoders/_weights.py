"""The weight files of a checkpoint: which of them hold a part of a model, and that part's weights by the part's own names.

Only the files that hold the part are opened, and of a hub model only these are downloaded. Knows nothing of model classes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from vlmfilm_plugin.encoders._quantised import dtype_code, marks, quantised
from vlmfilm_plugin.errors import EncoderError, some_of

if TYPE_CHECKING:
    from torch import Tensor

# In the order of preference: an index names the file of every weight, so it is asked for before the single file.
_NAMES = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")


@dataclass(frozen=True)
class WeightFiles:
    """Where each weight of a checkpoint lies.

    Args:
        file_of: key -> name of the file that holds it.
        locate: name of a file -> its path on this machine, downloaded where it has to be; raises FileNotFoundError.
    """

    file_of: Mapping[str, str]
    locate: Callable[[str], Path]

    @classmethod
    def of(cls, model: str, revision: str | None = None, named: str | None = None) -> WeightFiles:
        """Find the weight files of a local folder or a hub model; of the hub, one index or one file is downloaded.

        Args:
            named: the index or file that the model's configuration names, where it does.

        Raises:
            FileNotFoundError: there are none.
            EncoderError: two sets of weights lie side by side, or an index is no index or names a file outside the folder.
        """
        folder = Path(model)
        locate = _in_folder(folder) if folder.is_dir() else _from_hub(model, revision)
        for name in (named,) if named else _NAMES:
            try:
                path = locate(name)
            except FileNotFoundError as error:
                missing = error
                continue
            if name.endswith(".json"):
                files = cls(_read_index(path), locate)
                single = folder / name.removesuffix(".index.json")
                if not named and single.is_file() and {single.name} != set(files.file_of.values()):
                    facts = {"folder": folder, "found": f"{name} and {single.name}", "expected": "one of them"}
                    raise EncoderError("cannot tell which weights of this model are meant: there are two sets", facts, "move one of them away")
                return files
            with _opened(path) as opened:
                return cls(dict.fromkeys(opened.keys, name), locate)
        raise FileNotFoundError(f"none of {named or ', '.join(_NAMES)}") from missing

    @property
    def are_safetensors(self) -> bool:
        """Tell whether the weights are safetensors files, as opposed to torch's."""
        return all(name.endswith(".safetensors") for name in self.file_of.values())

    def present(self) -> list[str]:
        """Return the files that the checkpoint names and that can be located; asked of local folders."""
        return sorted(name for name in set(self.file_of.values()) if _is_there(self.locate, name))

    def dtypes(self) -> dict[str, str]:
        """Return the dtype of each weight in the files that can be located (`F32`, `I8`); of safetensors from their headers alone."""
        found = {}
        for name in self.present():
            with _opened(self.locate(name)) as file:
                found.update({key: file.dtype(key) for key in file.keys})
        return found

    def absent(self) -> list[str]:
        """Return the files that the checkpoint names and that cannot be located; asked of local folders."""
        return sorted(name for name in set(self.file_of.values()) if not _is_there(self.locate, name))

    def prefix_of(self, names: Sequence[str], model: str) -> str:
        """Return the prefix that the weights of a part have in the checkpoint.

        Args:
            names: every weight of the part, by the part's own names.
            model: how errors call the model.

        Raises:
            EncoderError: a weight is missing.
        """
        prefix = find_prefix(self.file_of, names)
        missing = [name for name in names if prefix + name not in self.file_of]
        packed = [key for key in marks(dict.fromkeys(self.file_of, "")) if key.startswith(prefix)]
        if missing and packed:
            raise quantised(model, None, dict.fromkeys(packed, "in place of weights"))
        if missing:
            raise incomplete(model, "missing", missing, f"{len(names)} weights under one prefix, best {prefix!r}")
        return prefix

    def read(self, names: Sequence[str], model: str) -> dict[str, Tensor]:
        """Read the weights of one part of the model.

        Args:
            names: every weight of the part, by the part's own names; the prefix they have in the checkpoint is found.
            model: how errors call the model.

        Raises:
            EncoderError: a weight, or a file that holds one, is missing.
        """
        prefix = self.prefix_of(names, model)
        wanted: dict[str, list[str]] = {}
        for name in names:
            wanted.setdefault(self.file_of[prefix + name], []).append(name)
        weights: dict[str, Tensor] = {}
        for file, held in sorted(wanted.items()):
            with _opened(self.locate(file)) as opened:
                weights.update({name: opened.get(prefix + name) for name in held})
        return weights


def incomplete(model: str, label: str, names: Sequence[str], expected: str) -> EncoderError:
    """Return the error about weights that a checkpoint lacks; `label` says in which way."""
    facts = {"model": model, label: some_of(names), "expected": expected}
    return EncoderError("cannot use these weights: some are missing", facts, "download the model again; its files are not complete")


def find_prefix(keys: Mapping[str, str] | Sequence[str], names: Sequence[str]) -> str:
    """Return the prefix under which most of `names` stand in `keys`: `visual.`, `model.visual.`, `vision_tower.vision_model.`, or none."""
    found: dict[str, int] = {}
    for name in names:
        for key in keys:
            if key == name or key.endswith("." + name):
                prefix = key[: len(key) - len(name)]
                found[prefix] = found.get(prefix, 0) + 1
    return min(found, key=lambda prefix: (-found[prefix], len(prefix), prefix), default="")


def _in_folder(folder: Path) -> Callable[[str], Path]:
    def locate(name: str) -> Path:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"no file {name} in this folder")
        return folder / name

    return locate


def _from_hub(model: str, revision: str | None) -> Callable[[str], Path]:
    def locate(name: str) -> Path:
        import huggingface_hub
        from huggingface_hub.errors import EntryNotFoundError

        try:
            return Path(huggingface_hub.hf_hub_download(model, name, revision=revision))
        except EntryNotFoundError as error:  # not in the repository, or not in the cache and no network
            raise FileNotFoundError(" ".join(str(error).split())) from error

    return locate


def _is_there(locate: Callable[[str], Path], name: str) -> bool:
    try:
        locate(name)
    except FileNotFoundError:
        return False
    return True


def _read_index(path: Path) -> dict[str, str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        content = error
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        facts = {"file": path, "found": type(content).__name__, "expected": "a weight_map: the file of every weight"}
        raise EncoderError("cannot read the index of these weights", facts, "download the model again")
    # What lies elsewhere is no part of the model: the index must not decide which file of the machine is read.
    outside = sorted({name for name in names.values() if PurePath(name).is_absolute() or ".." in PurePath(name).parts})
    if outside:
        raise EncoderError("cannot use the index of these weights", {"file": path, "found": outside[0], "expected": "files beside it"}, "correct it")
    return names


@dataclass(frozen=True)
class _Opened:
    """A weight file: its keys, a function that reads one weight, and one that tells its dtype."""

    keys: list[str]
    get: Callable[[str], Tensor]
    dtype: Callable[[str], str]


@contextmanager
def _opened(path: Path) -> Iterator[_Opened]:
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, framework="pt", device="cpu") as file:
            yield _Opened(list(file.keys()), file.get_tensor, lambda key: str(file.get_slice(key).get_dtype()))
    else:
        import torch

        # Torch's safe loader alone: a pickle in a model's folder must not run.
        held: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        yield _Opened(list(held), held.__getitem__, lambda key: dtype_code(held[key].dtype))
