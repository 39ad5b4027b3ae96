"""A MetaTensor keeps its metadata in the old order when its rows are put into another one: it is refused, never believed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vlmfilm_plugin.errors import ConditionError
from vlmfilm_plugin.features.batch_names import RowNames
from vlmfilm_plugin.features.reordered import watch_order

data = pytest.importorskip("monai.data")
watch_order()
ROWS = 4


def batch_of(folder: Path) -> Any:
    items = []
    for number in range(ROWS):
        path = folder / f"{number}.png"
        Image.fromarray(np.full((4, 4), number * 40, dtype=np.uint8)).save(path)
        items.append({"image": data.MetaTensor(torch.full((1, 4, 4), float(number)), meta={"filename_or_obj": str(path)})})
    return data.list_data_collate(items)["image"]


def paths_of(image: Any) -> list[str]:
    return [path.name if path else "" for path in RowNames.find({"image": image}, image.shape[0]).paths]


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[torch.tensor([2, 0, 3, 1])],
        lambda x: x[[2, 0, 3, 1]],
        lambda x: x[torch.tensor([2, 0, 3, 1]), :, :2],
        lambda x: x[torch.tensor([2, 0, 3, 1])] * 2 + 1,
        lambda x: x.index_select(0, torch.tensor([2, 0, 3, 1])).float().contiguous(),
        lambda x: torch.flip(x, [0]),
        lambda x: x.flip(0).clone(),
        lambda x: x.roll(1, 0),
        lambda x: torch.cat([x[2:], x[:2]]),
        lambda x: torch.stack([x[3], x[1], x[2], x[0]]),
        lambda x: x.sort(0, descending=True).values,
    ],
)
def test_rows_in_another_order_are_refused(tmp_path: Path, change: Callable[[Any], Any]) -> None:
    image = change(batch_of(tmp_path))
    if not hasattr(image, "meta"):
        pytest.skip("this version of MONAI gives a plain tensor here, without metadata to believe")
    try:
        found = paths_of(image)
    except ConditionError as error:
        assert "another order" in str(error)
        return
    # Not refused: then it names none, or the right ones.
    right = [f"{round(float(row.as_subclass(torch.Tensor).max()))}.png" for row in image]
    assert found in ([""] * len(found), right)


@pytest.mark.parametrize(
    "change", [lambda x: x, lambda x: x * 2, lambda x: x.to(torch.float64), lambda x: x[:, :, :2], lambda x: x[...], lambda x: x.clone().contiguous()]
)
def test_rows_in_their_order_are_found(tmp_path: Path, change: Callable[[Any], Any]) -> None:
    assert paths_of(change(batch_of(tmp_path))) == [f"{number}.png" for number in range(ROWS)]


def test_a_slice_takes_its_metadata_along(tmp_path: Path) -> None:
    assert paths_of(batch_of(tmp_path)[1:3]) in (["1.png", "2.png"], ["", ""])


def test_files_named_in_the_order_of_the_rows_are_believed(tmp_path: Path) -> None:
    image = batch_of(tmp_path)[torch.tensor([2, 0, 3, 1])]
    names = [str(tmp_path / f"{number}.png") for number in (2, 0, 3, 1)]
    found = RowNames.find({"image": image.as_tensor(), "filepath": names}, ROWS)
    assert [str(path) for path in found.paths] == names
