"""A file that was replaced never keeps its old feature, whatever its name, size and times say; one that was only touched is not encoded again."""

from __future__ import annotations

import os
import shutil
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vlmfilm_plugin.encoders.descriptor import DescriptorEncoder
from vlmfilm_plugin.features.provider import FeatureProvider
from vlmfilm_plugin.features.samples import Sample
from vlmfilm_plugin.features.store import protocol
from vlmfilm_plugin.features.store.protocol import SourceStamp
from vlmfilm_plugin.features.store.store import FeatureStore

SETTLED_S = 0.1


def picture(path: Path, seed: int) -> Path:
    # Bitmaps: all of one size, so that only their content tells them apart.
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 12), dtype=np.uint8)).save(path, "BMP")
    return path


def provider(folder: Path, **given: Any) -> FeatureProvider:
    return FeatureProvider(DescriptorEncoder(), FeatureStore(folder, "float32"), **given)


def feature(held: FeatureProvider, path: Path) -> torch.Tensor:
    return held.get([Sample("train:a", path, lambda: Image.open(path))])[0]


def truth(path: Path) -> torch.Tensor:
    return DescriptorEncoder().encode([Image.open(path)])[0]


def rewrite(path: Path, other: Path) -> None:
    content = other.read_bytes()
    with path.open("r+b") as file:
        file.write(content)


def exchange(path: Path, other: Path) -> None:
    shutil.copy(other, path.with_name("new"))
    os.replace(path.with_name("new"), path)


@pytest.mark.parametrize("replace", [rewrite, exchange])
@pytest.mark.parametrize("is_same_process", [True, False])
def test_a_file_replaced_with_its_size_path_and_time_is_encoded_again(
    tmp_path: Path, replace: Callable[[Path, Path], None], is_same_process: bool
) -> None:
    path, other = picture(tmp_path / "a.bmp", 0), picture(tmp_path / "b.bmp", 1)
    time.sleep(SETTLED_S)
    held = provider(tmp_path / "cache")
    first, status = feature(held, path), path.stat()
    replace(path, other)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    now = feature(held if is_same_process else provider(tmp_path / "cache"), path)
    assert torch.equal(now, truth(path)) and not torch.equal(now, first)


def test_a_file_rewritten_within_one_tick_of_the_clock_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, other = picture(tmp_path / "a.bmp", 0), picture(tmp_path / "b.bmp", 1)
    held, status = provider(tmp_path / "cache"), path.stat()
    # Two writes within one tick leave the same status; so does a clock that stands still.
    monkeypatch.setattr(protocol.time, "time_ns", lambda: status.st_ctime_ns + 1)
    first = feature(held, path)
    rewrite(path, other)
    monkeypatch.setattr("os.stat", lambda *a, stat=os.stat, **k: status if a and str(a[0]) == str(path) else stat(*a, **k))
    assert not torch.equal(feature(held, path), first)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    read: list[str] = []
    of = SourceStamp.of.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(SourceStamp, "of", classmethod(lambda cls, path: (read.append(str(path)), of(cls, path))[1]))
    return read


def test_a_file_that_was_only_touched_is_read_once_and_noted_in_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = picture(tmp_path / "a.bmp", 0)
    first = feature(provider(tmp_path / "cache"), path)
    os.utime(path, ns=(1, 1))
    path.chmod(0o644)
    time.sleep(SETTLED_S)
    read = counted(monkeypatch)
    strict = provider(tmp_path / "cache", on_missing="error")
    for _ in range(3):
        assert torch.equal(feature(strict, path), first)
    assert len(read) == 1
    for _ in range(2):  # other processes
        assert torch.equal(feature(provider(tmp_path / "cache", on_missing="error"), path), first)
    assert len(read) == 1


def test_two_copies_of_a_data_set_take_no_turns_in_the_store(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.bmp", 0)
    (tmp_path / "other").mkdir()
    copy = Path(shutil.copy(path, tmp_path / "other"))
    time.sleep(SETTLED_S)
    feature(provider(tmp_path / "cache"), path)
    store = tmp_path / "cache" / "features.sqlite"

    def stamped() -> object:
        with sqlite3.connect(store) as connection:
            return connection.execute("SELECT source_place, source_ctime_ns, source_inode FROM features").fetchall()

    before = stamped()
    for each in (copy, path, copy):
        feature(provider(tmp_path / "cache", on_missing="error"), each)
    assert stamped() == before


def test_noting_a_stamp_leaves_the_feature_as_it_is(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.bmp", 0)
    first = feature(provider(tmp_path / "cache"), path)
    path.chmod(0o644)
    time.sleep(SETTLED_S)
    coarse = FeatureProvider(DescriptorEncoder(), FeatureStore(tmp_path / "cache", "float16"), on_missing="error")
    assert torch.equal(feature(coarse, path), first.half().float())
    assert torch.equal(feature(provider(tmp_path / "cache", on_missing="error"), path), first), "a run in float16 rounded a stored float32 feature"
