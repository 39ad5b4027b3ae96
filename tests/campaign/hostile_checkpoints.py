"""Someone's checkpoint: payloads that must not run, whatever reads it, and content of any shape, which must not stop us with a bare traceback."""

from __future__ import annotations

import builtins
import functools
import json
import os
import pickle
import random
import runpy
import shutil
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import made
import torch
from referee import Kind, Wrong
from torch import nn

from vlmfilm_plugin import apply_adapter, export_adapter
from vlmfilm_plugin.checkpoints.peek import peek
from vlmfilm_plugin.errors import VlmFilmError

FUSE = "went-off"


class Call:
    """Pickled, a call of a function; `setstate` calls what a safe class would do with a state."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.reduced


def payloads(fuse: Path) -> list[Any]:
    """Return objects that touch `fuse` when a pickle of them is loaded without care."""
    text = f"open({str(fuse)!r}, 'w').close()"
    return [
        Call(os.system, f"touch {fuse}"),
        Call(os.popen, f"touch {fuse}"),
        Call(builtins.exec, text),
        Call(builtins.eval, text),
        Call(builtins.open, str(fuse), "w"),
        Call(subprocess.Popen, ["touch", str(fuse)]),
        Call(subprocess.check_output, ["touch", str(fuse)]),
        Call(shutil.copyfile, sys.executable, str(fuse)),
        Call(os.mkdir, str(fuse)),
        Call(os.symlink, "/", str(fuse)),
        Call(runpy.run_path, str(fuse)),
        Call(functools.partial, builtins.exec, text),
        Call(functools.reduce, functools.partial(map, builtins.exec), [[text]]),
        Call(getattr, Call(__import__, "os"), "system"),
        Call(torch.load, str(fuse)),
        Call(torch.hub.load, str(fuse), "model"),
        Call(torch.utils._config_module.install_config_module, "os") if hasattr(torch.utils, "_config_module") else Call(os.mkdir, str(fuse)),
        Call(nn.Module.apply, nn.Linear(1, 1), functools.partial(builtins.exec, text)),
        Call(OrderedDict, [("a", Call(os.mkdir, str(fuse)))]),
        Call(dict, state={"x": Call(os.mkdir, str(fuse))}),
        Call(torch.nn.modules.linear.Linear, 1, 1, state={"_parameters": Call(os.mkdir, str(fuse))}),
        Call(torch.jit.load, str(fuse)),
        Call(pickle.loads, pickle.dumps(Call(os.mkdir, str(fuse)))),
    ]


PLACES: tuple[tuple[str, ...], ...] = (
    (), ("callbacks",), ("state_dict", "extra"), ("state_dict", "vlm_film._extra_state"), ("hyper_parameters", "x"), ("vlm_film",),
    ("vlm_film", "architecture"), ("vlm_film", "settings", "encoder"), ("optimizer_states",), ("vlm_film_trained_stages",),
)  # fmt: skip
FORMATS = ("zip", "legacy", "pickle 0", "pickle 2", "pickle 4", "pickle 5", "zip with code")


def planted(content: dict[str, Any], place: tuple[str, ...], thing: Any) -> Any:
    """Return the content with a thing in a place of it."""
    if not place:
        return thing
    inner = content.get(place[0])
    return {**content, place[0]: planted(dict(inner) if isinstance(inner, Mapping) else {}, place[1:], thing)}


def written(content: Any, path: Path, form: str) -> None:
    """Save as torch did, does, or would never do."""
    if form.startswith("pickle"):
        path.write_bytes(pickle.dumps(content, protocol=int(form[-1])))
        return
    torch.save(content, path, _use_new_zipfile_serialization=form != "legacy")
    if form == "zip with code":
        with zipfile.ZipFile(path, "a") as file:
            root = file.namelist()[0].split("/")[0]
            file.writestr(f"{root}/code/__torch__.py", "import os\n")
            file.writestr(f"{root}/constants.pkl", pickle.dumps(Call(os.mkdir, FUSE)))


def read_everywhere(path: Path, folder: Path, others: tuple[Path, Path]) -> list[str]:
    """Let every reader of ours read a checkpoint; return which did and which refused."""
    weights, plain = others
    readers: dict[str, Callable[[], Any]] = {
        "peek": lambda: peek(path),
        "export": lambda: export_adapter(path, folder / "exported"),
        "apply to": lambda: apply_adapter(weights, path, folder / "applied"),
        "apply": lambda: apply_adapter(path, plain, folder / "applied-2"),
    }
    said = []
    for name, reader in readers.items():
        try:
            reader()
        except VlmFilmError:
            continue
        except Exception as error:
            error.args = (f"{name}: {error}",)
            raise
        said.append(name)
    return said


class _OfCheckpoints(Kind):
    """Attempts that begin with a checkpoint of ours, exported weights, and a plain one."""

    def prepare(self, folder: Path) -> None:
        self.content = torch.load(made.film_checkpoint(folder / "film.ckpt"), weights_only=True)
        self.others = folder / "weights", made.film_checkpoint(folder / "plain.ckpt", with_film=False)
        export_adapter(folder / "film.ckpt", self.others[0])


class Payloads(_OfCheckpoints):
    name, full, short = "payload in checkpoint", 720, 24

    def attempt(self, number: int, folder: Path, chance: random.Random) -> str:
        fuse, path = folder / FUSE, folder / "someones.ckpt"
        found = payloads(fuse)
        place, form = chance.choice(PLACES), chance.choice(FORMATS)
        written(planted(self.content, place, found[number % len(found)]), path, form)
        # A payload may need a module that is not there yet, or is found beside the file.
        (folder / "evil.py").write_text(f"open({str(fuse)!r}, 'w').close()\n")
        said = read_everywhere(path, folder, self.others)
        if fuse.exists() or fuse.is_symlink():
            raise Wrong(f"payload {number % len(found)} ran, at {place} in {form}")
        if "export" in said and not form.startswith("pickle") and place[:1] != ():
            return "read without it"
        return "refused"


def strange_things() -> list[Callable[[], Any]]:
    """Return what no version of ours ever wrote into a checkpoint."""
    deep: Any = []
    for _ in range(5000):
        deep = [deep]
    many: dict[str, Any] = {}
    many["again"] = many

    def state(text: bytes) -> torch.Tensor:
        return torch.frombuffer(bytearray(text), dtype=torch.uint8)

    return [
        lambda: None, lambda: 0, lambda: -(2**70), lambda: float("nan"), lambda: "", lambda: "\0", lambda: "x" * 1_000_000, lambda: b"\xff",
        list, dict, lambda: [1, "a", None], lambda: {1: 2}, lambda: {"format": 1}, lambda: {"format": 10**30},
        lambda: {"format": 2, "stages": []}, lambda: many, lambda: torch.zeros(()), lambda: torch.zeros(0),
        lambda: torch.full((3,), float("nan")), lambda: torch.zeros(1).expand(2**40), lambda: torch.zeros(2, 3, dtype=torch.complex64),
        lambda: torch.eye(3).to_sparse(), lambda: torch.zeros(3, device="meta"),
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), lambda: nn.Parameter(torch.zeros(3)), lambda: torch.float16,
        lambda: torch.Size([1, 2]), lambda: torch.device("cuda:7"), lambda: state(b"{}"), lambda: state(b"not json"),
        lambda: state(b"[" * 100_000), lambda: state(b'{"format": 2}'), lambda: state(b"\xff\xfe"), lambda: state(b'{"format": 1e999}'),
        lambda: state(b"9" * 10_000), lambda: torch.full((5,), 300.0), lambda: deep, lambda: OrderedDict(a=OrderedDict()),
        lambda: (1, (2, (3,))), lambda: {"a"}, lambda: 10**4000,
    ]  # fmt: skip


KEYS = (
    "", 0, None, (1, 2), "vlm_film", "vlm_film.", "ups.vlm_film.", "vlm_film.vlm_film.x", "\0vlm_film.a", "vlm_film._extra_state",
    "é.vlm_film.b", b"bytes",
)  # fmt: skip


class StrangeCheckpoints(_OfCheckpoints):
    name, full, short = "strange checkpoint", 600, 24

    def prepare(self, folder: Path) -> None:
        super().prepare(folder)
        self.places = [*PLACES, ("state_dict",), *(("vlm_film", "architecture", name) for name in self.content["vlm_film"]["architecture"])]
        self.places += [("state_dict", name) for name in self.content["state_dict"]]

    def attempt(self, number: int, folder: Path, chance: random.Random) -> str:
        things = strange_things()
        thing, content, path = things[number % len(things)](), self.content, folder / "strange.ckpt"
        for _ in range(chance.choice([1, 1, 1, 3])):
            content = planted(content, chance.choice(self.places), thing) if isinstance(content, dict) else content
        if chance.random() < 0.2 and isinstance(content, dict) and isinstance(content.get("state_dict"), Mapping):
            content = {**content, "state_dict": {**content["state_dict"], chance.choice(KEYS): thing}}
        if chance.random() < 0.2 and isinstance(content, dict):
            content = content.get("state_dict", content)  # a bare state dict
        if chance.random() < 0.1:
            path.write_bytes(chance.randbytes(chance.choice([0, 1, 10, 1000, 100_000])))
        else:
            limit = sys.getrecursionlimit()
            sys.setrecursionlimit(100_000)
            try:
                written(content, path, chance.choice(("zip", "zip", "legacy", "pickle 2", "pickle 4")))
            finally:
                sys.setrecursionlimit(limit)
        data = path.read_bytes()
        if chance.random() < 0.1:
            path.write_bytes(data[: chance.randrange(len(data) + 1)])
        said = read_everywhere(path, folder, self.others)
        return f"read by {len(said)} of 4"


class StrangeWeights(Kind):
    name, full, short = "strange weights", 300, 16

    def prepare(self, folder: Path) -> None:
        film, self.plain = made.film_checkpoint(folder / "film.ckpt"), made.film_checkpoint(folder / "plain.ckpt", with_film=False)
        export_adapter(film, folder / "weights")
        data = (folder / "weights").read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        self.header, self.body = json.loads(data[8 : 8 + size]), data[8 + size :]

    def attempt(self, number: int, folder: Path, chance: random.Random) -> str:
        values = [
            None,
            "",
            "{}",
            "[]",
            "[" * 50_000,
            "null",
            '["a"]',
            '{"architecture": {}}',
            1,
            [],
            {},
            "x" * 100_000,
            '["vlm_film.nothing"]',
            "1e999",
        ]
        header = json.loads(json.dumps(self.header))
        metadata = header["__metadata__"]
        names = [name for name in header if name != "__metadata__"]
        for _ in range(chance.randrange(1, 4)):
            match chance.randrange(6):
                case 0:
                    metadata[chance.choice([*metadata, "other"])] = chance.choice(values)
                case 1:
                    metadata.pop(chance.choice(list(metadata)), None) if metadata else None
                case 2:
                    header[chance.choice(["", "a", "x.y", "\0", "vlm_film."])] = header[names[0]]
                case 3:
                    header[chance.choice(names)]["shape"] = chance.choice([[], [-1], [2**62, 2**62], [0], "a", [1.5], None])
                case 4:
                    header[chance.choice(names)]["data_offsets"] = chance.choice([[0, 0], [5, 1], [0, 2**63], [], "a", [-4, 4]])
                case 5:
                    header[chance.choice(names)]["dtype"] = chance.choice(["F64", "U8", "X", None, "F8_E4M3", "BF16"])
        text = json.dumps(header).encode()
        path = folder / "weights"
        length = chance.choice([len(text)] * 8 + [0, 2**63, len(text) - 1, len(text) + 1])
        path.write_bytes(struct.pack("<Q", length) + text + self.body[: chance.choice([None, None, None, 0, 10])])
        apply_adapter(path, self.plain, folder / "out")
        torch.load(folder / "out", weights_only=True)
        return "applied"
