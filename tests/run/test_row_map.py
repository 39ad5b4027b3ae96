"""Which sample each row of a UNet forward belongs to, without a run: asked once where that is safe, refused where it is not known."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from vlmfilm_plugin.errors import ConditionError
from vlmfilm_plugin.host_spec import RowView, same_rows
from vlmfilm_plugin.run.row_map import RowIndex

IMAGE = torch.zeros(2, 1, 4, 4)


class Counted:
    """A host adapter's map that repeats each sample in order, and counts how often it was asked."""

    def __init__(self) -> None:
        self.views: list[RowView] = []

    def __call__(self, view: RowView) -> Sequence[int]:
        self.views.append(view)
        return [row * view.samples // view.rows for row in range(view.rows)]


def test_rows_that_are_the_samples_need_no_index() -> None:
    assert RowIndex(same_rows, "train", IMAGE).of(torch.zeros(2, 3), None) is None


def test_a_map_is_asked_once_for_a_number_of_rows_and_a_condition() -> None:
    counted = Counted()
    index, condition = RowIndex(counted, "train", IMAGE), torch.zeros(4, 1, 4, 4)
    for rows in (4, 4, 6, 4):
        found = index.of(torch.zeros(rows, 1), condition)
        assert found is not None and found.tolist() == [row * 2 // rows for row in range(rows)]
    index.of(torch.zeros(4, 1), condition.clone())
    assert [view.rows for view in counted.views] == [4, 6, 4], "another condition may hold other rows"
    assert counted.views[0].image is IMAGE


def test_in_evaluation_of_several_images_another_condition_is_asked_anew_and_one_image_is_not() -> None:
    condition = torch.zeros(4, 1, 4, 4)
    for image, asked in ((IMAGE, 2), (IMAGE[:1], 1)):
        counted = Counted()
        index = RowIndex(counted, "test", image)
        for given in (condition, condition, condition.clone()):
            index.of(torch.zeros(4, 1), given)
        assert len(counted.views) == asked


@pytest.mark.parametrize("wrong", [None, [0, 1], [0, 1, 1, 2], [0, 1, 1, -1]])
def test_a_map_that_cannot_tell_stops_with_the_numbers(wrong: Sequence[int] | None) -> None:
    with pytest.raises(ConditionError, match="which sample each row") as caught:
        RowIndex(lambda view: wrong, "val", IMAGE).of(torch.zeros(4, 1), None)
    assert (caught.value.facts["rows"], caught.value.facts["samples"], caught.value.facts["phase"]) == (4, 2, "val")
