"""Checkpoint files are read without running anything of them; what cannot be read that way counts as absent, and is said."""

from __future__ import annotations

import argparse
import functools
import os
import struct
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_unet import SmallUNet
from torch.optim.swa_utils import SWALR

from vlmfilm_plugin import CheckpointError, attach, export_adapter
from vlmfilm_plugin.checkpoints.metadata import write_metadata
from vlmfilm_plugin.checkpoints.peek import peek
from vlmfilm_plugin.checkpoints.reading import read_checkpoint


def film_checkpoint(path: Path, **content: Any) -> Path:
    handle = attach(SmallUNet(), encoder="descriptor", decoder_stages=[1])
    checkpoint: dict[str, Any] = {"state_dict": handle.unet.state_dict(), **content}
    write_metadata(handle.unet, handle.settings, checkpoint)
    torch.save(checkpoint, path)
    return path


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("is_old_format", [False, True])
def test_a_payload_is_never_run_by_any_reader_of_ours(is_old_format: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fuse, path = tmp_path / "went-off", tmp_path / "bomb.ckpt"
    handle = attach(SmallUNet(), encoder="descriptor")
    torch.save({"state_dict": handle.unet.state_dict(), "callbacks": Bomb(fuse)}, path, _use_new_zipfile_serialization=not is_old_format)
    assert peek(path) is None
    line = next(line for line in capsys.readouterr().out.splitlines() if "is not known" in line)
    assert str(path) in line and ("open" in line or is_old_format)
    with pytest.raises(CheckpointError, match="cannot read the checkpoint"):
        export_adapter(path, tmp_path / "film.safetensors")
    assert not fuse.exists()


def harmless_call(*_: object) -> None:
    raise AssertionError("called")


class Sneaky:
    def __init__(self, function: Any, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    "thing",
    [harmless_call, functools.partial(print, "x"), Sneaky(eval, "1"), Sneaky(getattr, {}, "pop")],
    ids=["function", "partial", "eval", "getattr"],
)
def test_what_is_no_plain_data_is_named_and_nothing_is_imported_for_it(thing: object, tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "hyper_parameters": {"x": thing}}, tmp_path / "c.ckpt")
    with pytest.raises(CheckpointError, match="without running code") as error:
        read_checkpoint(tmp_path / "c.ckpt")
    assert "objects of" in str(error.value)


def test_the_plain_objects_of_real_checkpoints_are_read(tmp_path: Path) -> None:
    hyperparameters = {"folder": tmp_path, "options": argparse.Namespace(seed=1), "widths": np.arange(3), "counts": defaultdict(dict)}
    read = read_checkpoint(film_checkpoint(tmp_path / "film.ckpt", hyper_parameters=hyperparameters))
    assert read["hyper_parameters"]["folder"] == tmp_path and read["hyper_parameters"]["options"].seed == 1


@pytest.mark.parametrize("name", ["_cosine_anneal", "_linear_anneal"])
def test_the_annealing_that_weight_averaging_records_with_an_older_torch_is_read(name: str, tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "callbacks": {"anneal_func": Sneaky(getattr, SWALR, name)}}, tmp_path / "c.ckpt")
    assert read_checkpoint(tmp_path / "c.ckpt")["callbacks"]["anneal_func"] is getattr(SWALR, name)


@pytest.mark.parametrize("asked", [(SWALR, "__init__"), (torch.nn.Linear, "_cosine_anneal"), ({}, "pop")], ids=["init", "another class", "a mapping"])
def test_nothing_else_is_got_by_name(asked: tuple[Any, str], tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "callbacks": Sneaky(getattr, *asked)}, tmp_path / "c.ckpt")
    with pytest.raises(CheckpointError, match="without running code"):
        read_checkpoint(tmp_path / "c.ckpt")


def test_a_score_that_lightning_keeps_of_monais_images_is_read(tmp_path: Path) -> None:
    MetaTensor = pytest.importorskip("monai.data.meta_tensor").MetaTensor
    meta = {"spatial_shape": np.array([8, 8]), "filename_or_obj": "a.png", "n": np.float64(2)}
    score = MetaTensor(torch.tensor(0.5), affine=torch.eye(4), meta=meta)
    states = {"best_model_score": score, "best_k_models": {"a.ckpt": score}}
    read = read_checkpoint(film_checkpoint(tmp_path / "film.ckpt", callbacks={"ModelCheckpoint{'monitor': 'val/dice'}": states}))
    assert float(read["callbacks"]["ModelCheckpoint{'monitor': 'val/dice'}"]["best_model_score"]) == 0.5
    facts = peek(tmp_path / "film.ckpt")
    assert facts is not None and facts.architecture["decoder_stages"] == [1]


def test_the_set_of_safe_objects_is_not_left_widened(tmp_path: Path) -> None:
    path = film_checkpoint(tmp_path / "film.ckpt", hyper_parameters={"folder": tmp_path})
    before = set(torch.serialization.get_safe_globals())
    assert peek(path) is not None
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize(
    "content", [b"", b"junk", b"PK\x03\x04" + bytes(60), b"\x80\x02}q\x00."], ids=["empty", "text", "half a zip", "a bare pickle"]
)
def test_a_file_that_is_no_checkpoint_is_a_named_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "c.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot read the checkpoint"):
        read_checkpoint(tmp_path / "c.ckpt")
    assert peek(tmp_path / "c.ckpt") is None


def part_of(path: Path, name: str) -> tuple[int, int]:
    """Return where the content of a part of an archive begins, and its size."""
    with zipfile.ZipFile(path) as file:
        part = next(part for part in file.infolist() if part.filename.endswith(name))
        with open(path, "rb") as raw:
            raw.seek(part.header_offset + 26)
            names, extra = struct.unpack("<HH", raw.read(4))
    return part.header_offset + 30 + names + extra, part.file_size


def test_a_damaged_description_is_not_believed_and_damaged_weights_are_not_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = film_checkpoint(tmp_path / "film.ckpt", other=torch.ones(300_000))
    whole = path.read_bytes()
    start, size = part_of(path, "/data.pkl")
    for number in range(start, start + size, max(size // 40, 1)):
        path.write_bytes(whole[:number] + bytes([whole[number] ^ 4]) + whole[number + 1 :])
        assert peek(path) is None
        assert "damaged" in capsys.readouterr().out
    # Of large weights only who wants them all reads all.
    with zipfile.ZipFile(tmp_path / "film.ckpt", "r") as file:
        large = max(file.infolist(), key=lambda part: part.file_size).filename
    path.write_bytes(whole)
    middle = sum(part_of(path, large)) - 100
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    assert peek(path) is not None
    with pytest.raises(CheckpointError, match="damaged"):
        export_adapter(path, tmp_path / "film.safetensors")
    assert not (tmp_path / "film.safetensors").exists()


@pytest.mark.skipif(not hasattr(torch.serialization, "set_crc32_options"), reason="this torch always writes checksums")
def test_a_checkpoint_that_was_written_without_checksums_is_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        path = film_checkpoint(tmp_path / "film.ckpt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert peek(path) is not None and export_adapter(path, tmp_path / "film.safetensors")


def test_a_pipe_is_no_checkpoint(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.ckpt")
    for path in (tmp_path / "pipe.ckpt", Path("/dev/zero"), tmp_path):
        with pytest.raises(CheckpointError, match="a pipe"):
            read_checkpoint(path)
