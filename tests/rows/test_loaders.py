"""Rows of real data loaders: every row's file against the one that its pixels are cut from."""

from __future__ import annotations

import gc
import multiprocessing
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import loaded_data as data
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset, WeightedRandomSampler, random_split
from torch.utils.data import dataloader as torch_loader

from vlmfilm_plugin.rows.ledger import Ledger
from vlmfilm_plugin.rows.loaders import watch_loaders


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rows")
    data.make_files(root)
    return root


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    ledger = Ledger()
    undo = watch_loaders(ledger)
    yield ledger
    undo()


def check(ledger: Ledger, folder: Path, image: torch.Tensor, like: torch.Tensor | None = None) -> int:
    """Check that each row has the file its pixels (those of `like`) are cut from; return the number of rows."""
    found = ledger.files_of(image)
    numbers = [data.own_number(folder, row) for row in (image if like is None else like)]
    assert [str(path) for path in found.paths] == [str(folder / "images" / f"{number}.png") for number in numbers], found.reason
    return len(numbers)


@pytest.mark.parametrize(
    "case",
    [
        {"kind": "tuple"},
        {"kind": "list"},
        {"kind": "named"},
        {"kind": "arrays"},
        {"kind": "dict", "num_workers": 2},
        {"kind": "dict", "num_workers": 2, "in_order": False, "persistent_workers": True},
        {"kind": "tuple", "num_workers": 2, "multiprocessing_context": "spawn", "persistent_workers": True},
        {"kind": "tuple", "num_workers": 1, "multiprocessing_context": "forkserver"},
        {"kind": "tuple", "collate_fn": data.sorted_by_mean, "num_workers": 2},
        {"kind": "tuple", "collate_fn": data.drops_one},
        {"kind": "crops", "collate_fn": data.flattens},
        {"kind": "dataclass", "collate_fn": data.as_dataclass},
    ],
    ids=lambda case: "-".join(getattr(value, "__name__", str(value)) for value in case.values()),
)
def test_every_row_has_the_file_it_was_cut_from_over_two_epochs(ledger: Ledger, folder: Path, case: dict[str, Any]) -> None:
    if case.get("in_order") is False and "in_order" not in vars(DataLoader([1])):
        pytest.skip("this torch has no in_order")
    case = dict(case)
    crops = data.Crops(folder, case.pop("kind"))
    loader = DataLoader(crops, batch_size=5, shuffle=True, **case)
    assert loader.dataset is crops
    rows = sum(check(ledger, folder, data.image_of(batch)) for _ in range(2) for batch in loader)
    assert rows >= 20


def test_samplers_subsets_splits_and_threads(ledger: Ledger, folder: Path) -> None:
    crops = data.Crops(folder)
    sets = [Subset(crops, [9, 3, 5]), ConcatDataset([Subset(crops, [4, 8]), crops]), random_split(crops, [6, 7])[1]]
    loaders = [DataLoader(each, batch_size=4, shuffle=True) for each in sets]
    loaders.append(DataLoader(crops, batch_size=4, sampler=WeightedRandomSampler([1.0] * data.COUNT, 9)))
    for loader in loaders:
        for image, _ in loader:
            check(ledger, folder, image)
    batches: list[Any] = []
    thread = threading.Thread(target=lambda: batches.extend(DataLoader(crops, batch_size=4, shuffle=True)))
    thread.start()
    thread.join()
    assert sum(check(ledger, folder, image) for image, _ in batches) == data.COUNT


def test_views_copies_permutations_and_scaled_copies_are_told_apart_and_the_rest_is_unknown(ledger: Ledger, folder: Path) -> None:
    for image, _ in DataLoader(data.Crops(folder), batch_size=6, shuffle=True):
        if len(image) < 6:
            continue
        order = torch.randperm(len(image))
        check(ledger, folder, image[1:4])
        check(ledger, folder, image[:, :, 2:20, 3:17], like=image)
        check(ledger, folder, image.reshape(2, 3, data.CROP, data.CROP)[1].unsqueeze(1))
        check(ledger, folder, image[order])
        check(ledger, folder, image.repeat_interleave(2, 0))
        check(ledger, folder, torch.cat([image, torch.randn_like(image)], 1)[:, :-1])
        for changed in (image.half(), image.bfloat16(), image * 2 - 1, (image * 255).round(), image.double()):
            check(ledger, folder, changed, like=image)
        for unknown in (image.flip(-1), torch.rand_like(image), 0.7 * image + 0.3 * image.roll(1, 0), torch.zeros_like(image)):
            found = ledger.files_of(unknown)
            assert found.paths == (None,) * 6 and found.reason


def test_a_batch_mixed_in_place_is_no_longer_its_rows(ledger: Ledger, folder: Path) -> None:
    image, _ = next(iter(DataLoader(data.Crops(folder), batch_size=4)))
    image.mul_(2).sub_(1)
    check(ledger, folder, image, like=(image + 1) / 2)
    image.mul_(0.6).add_(0.4 * image.roll(1, 0))
    assert ledger.files_of(image).paths == (None,) * 4


def test_batches_of_inference_mode_are_known(ledger: Ledger, folder: Path) -> None:
    with torch.inference_mode():
        for image, _ in DataLoader(data.Crops(folder), batch_size=4):
            check(ledger, folder, image)
            image.mul_(0.5).add_(0.5 * torch.rand_like(image))
            assert set(ledger.files_of(image).paths) == {None}


def test_a_cache_is_remembered_and_what_opens_nothing_says_so(ledger: Ledger, folder: Path) -> None:
    loader = DataLoader(data.Cached(folder), batch_size=4)
    for _ in range(2):
        for image, _mask in loader:
            check(ledger, folder, image)
    image, _ = next(iter(DataLoader(data.InMemory(folder), batch_size=4)))
    found = ledger.files_of(image)
    assert found.paths == (None,) * 4 and "InMemory opened no file for item" in found.reason


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[torch.Tensor]:
        yield from torch.rand(4, 1, 8, 8)


class OwnIterator(torch_loader._SingleProcessDataLoaderIter):
    pass


def test_what_cannot_be_observed_is_named_and_loads_as_before(ledger: Ledger, folder: Path) -> None:
    image = next(iter(DataLoader(Stream(), batch_size=4)))
    assert image.shape == (4, 1, 8, 8)
    assert "Stream is iterated" in ledger.files_of(image).reason
    own, _ = next(OwnIterator(DataLoader(data.Crops(folder), batch_size=2)))
    assert "OwnIterator, which is no iterator of torch's own" in ledger.files_of(own).reason
    changed, _ = next(iter(DataLoader(data.Crops(folder), batch_size=4, collate_fn=data.shifts_values)))
    assert ledger.files_of(changed).paths == (None,) * 4


def test_a_loader_without_batches_is_unknown(ledger: Ledger, folder: Path) -> None:
    image, _ = next(iter(DataLoader(data.Crops(folder), batch_size=None)))
    found = ledger.files_of(image[None])
    assert found.paths == (None,) and "batch_size=None" in found.reason


def test_random_streams_types_and_life_times_are_the_hosts(folder: Path) -> None:
    def run() -> list[torch.Tensor]:
        torch.manual_seed(4)
        images = [image for workers in (0, 2) for image, _ in DataLoader(data.Crops(folder), batch_size=5, shuffle=True, num_workers=workers)]
        return [*images, torch.rand(3)]

    plain = run()
    ledger = Ledger()
    undo = watch_loaders(ledger)
    observed = run()
    assert all(torch.equal(a, b) for a, b in zip(plain, observed, strict=True)) and {type(each) for each in observed} == {torch.Tensor}
    loader = DataLoader(data.Crops(folder), batch_size=5, num_workers=2, persistent_workers=True)
    for _ in loader:
        pass
    iterator = weakref.ref(loader._iterator)
    assert len(multiprocessing.active_children()) == 2
    del loader
    gc.collect()
    assert iterator() is None and not multiprocessing.active_children()
    undo()
    assert torch_loader._BaseDataLoaderIter.__next__.__qualname__ == "_BaseDataLoaderIter.__next__"


def test_an_unknown_torch_is_said_once_and_loudly(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delattr(torch_loader, "_BaseDataLoaderIter")
    ledger = Ledger()
    watch_loaders(ledger)()
    assert ledger.is_used and "_BaseDataLoaderIter" in ledger.files_of(torch.rand(1, 1, 4, 4)).reason


def test_the_ledger_is_bounded(ledger: Ledger, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import vlmfilm_plugin.rows.ledger as module

    monkeypatch.setattr(module, "MOST_ROWS", 12)
    images = [image for _ in range(3) for image, _ in DataLoader(data.Crops(folder), batch_size=4)]
    assert ledger._row_count <= 12 and len(ledger._by_id) <= 12
    assert ledger.files_of(images[0]).paths == (None,) * 4
    check(ledger, folder, images[-1])
