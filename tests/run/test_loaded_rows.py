"""Rows without a name in a run: the files that the ledger knows, permuted metadata, one kind of feature."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_unet import SmallUNet
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vlmfilm_plugin.errors import ConditionError
from vlmfilm_plugin.forward.attach import install
from vlmfilm_plugin.rows.ledger import Ledger
from vlmfilm_plugin.rows.loaders import watch_loaders
from vlmfilm_plugin.run.film_state import FilmStates
from vlmfilm_plugin.run.log_lines import Diagnostics
from vlmfilm_plugin.run.running_batch import HostBatch, RunningBatch
from vlmfilm_plugin.settings.layers import resolve


class Files(Dataset):  # type: ignore[type-arg]
    def __init__(self, folder: Path) -> None:
        self.files = sorted(folder.glob("*.png"))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(np.asarray(Image.open(self.files[index])).astype(np.float32) / 255)[None]


class Run:
    """One FiLM module, and the keys that batches were looked up by."""

    def __init__(self, folder: Path, **settings: object) -> None:
        given = {"encoder": "descriptor", "cache_dir": str(folder / "cache"), **settings}
        self.settings = resolve([("argument", given)])
        self.film = install(SmallUNet(), self.settings, "on").film
        self.ledger = Ledger()
        self.states = FilmStates(lambda: self.settings)

    def keys(self, content: Any, phase: str = "train", **given: Any) -> list[str]:
        batch = HostBatch(content, phase, (0.0, 1.0), step=1, **given)
        running = RunningBatch(batch, self.states, Diagnostics(self.settings), {}, self.ledger)
        running._look_up(self.film)
        assert running._facts is not None
        return list(running._facts.keys)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(6):
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (16, 16), dtype=np.uint8)).save(images / f"{number}.png")
    return tmp_path


@pytest.fixture
def run(folder: Path) -> Iterator[Run]:
    run = Run(folder)
    undo = watch_loaders(run.ledger)
    yield run
    undo()


def test_rows_without_a_name_are_keyed_by_their_files_as_a_list_of_files_is(run: Run, folder: Path) -> None:
    order = [4, 1, 3]
    image = next(iter(DataLoader(Files(folder / "images"), batch_size=3, sampler=order)))
    assert run.keys({"image": image}) == [f"unknown:{folder}/images/{number}.png" for number in order]


def test_permuted_images_get_their_own_files_whatever_their_metadata_says(run: Run, folder: Path) -> None:
    data = Files(folder / "images")
    image: Any = next(iter(DataLoader(data, batch_size=6)))
    permuted: Any = image[[5, 0, 3, 1, 4, 2]]
    # As a MetaTensor does: the metadata stays in the old order, spelt as it was.
    permuted.meta = {"filename_or_obj": [os.path.relpath(file) for file in data.files]}
    keys = run.keys({"image": permuted})
    assert [key.rpartition("/")[2] for key in keys] == [f"{number}.png" for number in (5, 0, 3, 1, 4, 2)]
    image.meta = permuted.meta
    assert sorted(keys) == sorted(run.keys({"image": image})), "the spelling of the metadata, which is that of the keys, is kept"


def test_rows_of_a_loader_that_have_no_file_stop_the_run_unless_content_was_asked_for(run: Run, folder: Path) -> None:
    list(DataLoader(Files(folder / "images"), batch_size=3))
    noise = torch.rand(2, 1, 16, 16)
    with pytest.raises(ConditionError, match=r"(?s)which file each row of this train batch is.*no row of a batch that a data loader gave"):
        run.keys({"image": noise})
    assert all(":fp-" in key for key in run.keys({"image": noise}, is_whole=True))
    asked = Run(folder, unnamed_rows="content")
    asked.ledger = run.ledger
    assert all(":fp-" in key for key in asked.keys({"image": noise}))


def test_without_any_loader_pixels_are_keyed_by_content(folder: Path) -> None:
    assert ":fp-" in Run(folder).keys({"image": torch.rand(1, 1, 16, 16)})[0]


@pytest.mark.parametrize("first", ["train", "val"])
@pytest.mark.parametrize("has_file_first", [True, False])
def test_training_and_evaluation_with_features_of_two_kinds_stop(folder: Path, first: str, has_file_first: bool) -> None:
    run = Run(folder)
    second = {"train": "test", "val": "train"}[first]
    with_file = {"image": torch.rand(1, 1, 16, 16), "filepath": [str(folder / "images" / "0.png")]}
    without = {"image": torch.rand(1, 1, 16, 16)}
    batches = (with_file, without) if has_file_first else (without, with_file)
    run.keys(batches[0], first)
    with pytest.raises(ConditionError, match="two kinds"):
        run.keys(batches[1], second)
    run.keys(batches[0], second)


def test_one_batch_or_one_training_of_two_kinds_stops_and_a_checkpoint_remembers(folder: Path) -> None:
    run, files = Run(folder), [str(folder / "images" / "0.png"), "nowhere.png"]
    with pytest.raises(ConditionError, match="two kinds of feature"):
        run.keys({"image": torch.rand(2, 1, 16, 16), "filepath": files})
    run.keys({"image": torch.rand(1, 1, 16, 16), "filepath": files[:1]})
    with pytest.raises(ConditionError, match="two kinds"):
        run.keys({"image": torch.rand(1, 1, 16, 16)})
    assert run.states.kinds.trained_on(run.film.film_id) == "file"
    later = Run(folder)
    later.states.kinds.recorded(later.film.film_id, "file")
    with pytest.raises(ConditionError, match="two kinds"):
        later.keys({"image": torch.rand(1, 1, 16, 16)}, "test")


def test_a_volume_is_no_image(folder: Path) -> None:
    class Volumes(Files):
        def __init__(self) -> None:
            self.files = [folder / f"{number}.npy" for number in range(2)]
            for number, file in enumerate(self.files):
                np.save(file, np.random.default_rng(number).random((16, 16)))

        def __getitem__(self, index: int) -> Tensor:
            return torch.from_numpy(np.load(self.files[index]).astype(np.float32))[None]

    run = Run(folder)
    undo = watch_loaders(run.ledger)
    image = next(iter(DataLoader(Volumes(), batch_size=2)))
    undo()
    with pytest.raises(ConditionError, match=r"0\.npy is a volume or an array"):
        run.keys({"image": image})
    assert ":fp-" in run.keys({"image": image}, is_whole=True)[0]


def test_metadata_that_the_known_rows_contradict_is_refused_where_other_rows_are_unknown(run: Run, folder: Path) -> None:
    data = Files(folder / "images")
    image: Any = next(iter(DataLoader(data, batch_size=6)))
    changed: Any = image[[5, 0, 3, 1, 4, 2]].clone()
    changed[2] = torch.rand(changed[2].shape, generator=torch.Generator().manual_seed(0))
    changed.meta = {"filename_or_obj": [str(file) for file in data.files]}
    with pytest.raises(ConditionError, match=r"(?s)metadata.*5\.png"):
        run.keys({"image": changed})
