"""Checkpoint files are read without running anything of them; what cannot be read that way counts as absent, and is said."""

from __future__ import annotations

import argparse
import functools
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
