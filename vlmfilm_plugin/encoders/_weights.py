"""The weight files of a checkpoint: which of them hold a part of a model, and that part's weights by the part's own names.

Only the files that hold the part are opened, and of a hub model only these are downloaded. Knows nothing of model classes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmfilm_plugin.errors import EncoderError

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
    def of(cls, model: str, revision: str | None = None) -> WeightFiles:
        """Find the weight files of a local folder or a hub model; of the hub, one index or one file is downloaded.

        Raises:
            FileNotFoundError: there are none.
        """
        folder = Path(model)
        locate = _in_folder(folder) if folder.is_dir() else _from_hub(model, revision)
        for name in _NAMES:
            try:
                path = locate(name)
            except FileNotFoundError as error:
                missing = error
                continue
            if name.endswith(".json"):
                return cls(json.loads(path.read_text(encoding="utf-8"))["weight_map"], locate)
            with _opened(path) as (keys, _):
                return cls(dict.fromkeys(keys, name), locate)
        raise FileNotFoundError(f"none of {', '.join(_NAMES)}") from missing

    def absent(self) -> list[str]:
        """Return the files that the checkpoint names and that cannot be located; asked of local folders."""
        return sorted(name for name in set(self.file_of.values()) if not _is_there(self.locate, name))

    def read(self, names: Sequence[str], model: str) -> dict[str, Tensor]:
        """Read the weights of one part of the model.

        Args:
            names: every weight of the part, by the part's own names; the prefix they have in the checkpoint is found.
            model: how errors call the model.

        Raises:
            EncoderError: a weight, or a file that holds one, is missing.
        """
        prefix = find_prefix(self.file_of, names)
        missing = [name for name in names if prefix + name not in self.file_of]
        if missing:
            raise incomplete(model, "missing", missing, f"{len(names)} weights under one prefix, best {prefix!r}")
        wanted: dict[str, list[str]] = {}
        for name in names:
            wanted.setdefault(self.file_of[prefix + name], []).append(name)
        weights: dict[str, Tensor] = {}
        for file, held in sorted(wanted.items()):
            with _opened(self.locate(file)) as (_, get):
                weights.update({name: get(prefix + name) for name in held})
        return weights


def incomplete(model: str, label: str, names: Sequence[str], expected: str) -> EncoderError:
    """Return the error about weights that a checkpoint lacks; `label` says in which way."""
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    facts = {"model": model, label: shown, "expected": expected}
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


@contextmanager
def _opened(path: Path) -> Iterator[tuple[list[str], Callable[[str], Tensor]]]:
    """Open a weight file: its keys, and a function that reads one weight."""
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, framework="pt", device="cpu") as file:
            yield list(file.keys()), file.get_tensor
    else:
        import torch

        held: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        yield list(held), held.__getitem__
