"""Which stage a block is of, and in which order blocks run: stated, or plainly numbered, never by name."""

from __future__ import annotations

import pytest

from vlmfilm_plugin.errors import TargetMatchError
from vlmfilm_plugin.film.stage_order import Target, grouped, numbered, plainly_numbered, select_stages, stated_groups


def test_stage_ten_follows_stage_nine() -> None:
    paths = [f"ups.{i}.1" for i in (11, 10, 9, 1, 0, 2, 3, 4, 5, 6, 7, 8)]
    assert plainly_numbered(paths, owner="Net", origin="test") == [[f"ups.{i}.1"] for i in range(12)]


def test_one_block_is_one_stage_whatever_its_name() -> None:
    assert plainly_numbered(["mid"], owner="Net", origin="test") == [["mid"]]


@pytest.mark.parametrize(
    "paths",
    [
        ["upcat_4", "upcat_3", "upcat_2", "upcat_1"],
        ["decoder5", "decoder4", "decoder3"],
        ["ups.1", "ups.2", "ups.3"],
        ["ups.0", "ups.2"],
        ["ups.-1", "ups.0"],
        ["ups.00", "ups.01"],
        ["ups.0.a", "ups.1.b"],
        ["ups.0.0", "ups.0.1", "ups.1.0"],
        ["ups.0", "ups.1.conv"],
        ["up.\u0660", "up.\u0661"],
        ["left.0", "right.0"],
    ],
    ids=str,
)
def test_what_is_not_plainly_numbered_from_the_bottleneck_is_refused_with_the_fix(paths: list[str]) -> None:
    with pytest.raises(TargetMatchError, match="cannot tell the order") as caught:
        plainly_numbered(paths, owner="Net", origin="argument")
    assert "stages" in str(caught.value.fix) and "example=" in str(caught.value.fix)


def test_a_pattern_of_one_numbered_module_beside_others_is_of_one_resolution() -> None:
    names = ["ups", "ups.0", "ups.0.0", "ups.0.1", "ups.1", "ups.1.0", "ups.1.1"]
    with pytest.raises(TargetMatchError, match="one resolution only") as caught:
        plainly_numbered(["ups.0.0", "ups.0.1"], names, owner="Net", origin="argument")
    assert "ups.1.0" in str(caught.value)
    assert plainly_numbered(["ups.0.1", "ups.1.1"], names, owner="Net", origin="argument") == [["ups.0.1"], ["ups.1.1"]]


PATHS = [f"out.{i}.0" for i in range(6)]
NAMES = ["out", *(f"out.{i}" for i in range(6)), *PATHS, "out.5.1"]


def stages(groups: object) -> list[list[str]]:
    return grouped(PATHS, stated_groups(groups, None, owner="Net", origin="test"), NAMES, owner="Net", origin="test")


def test_stages_name_blocks_or_the_modules_around_them_in_order_of_execution() -> None:
    expected = [["out.0.0", "out.1.0"], ["out.2.0"], ["out.5.0", "out.3.0", "out.4.0"]]
    assert stages([["out.0.0", "out.1.0"], "out.2.0", ["out.5.0", "out.3.0", "out.4.0"]]) == expected
    assert stages([["out.0", "out.1"], "out.2", ["out.5", "re:out.[34]"]]) == expected
    assert stages(lambda unet: [["out.0", "out.1"], ["out.2"], ["out.5", "out.3", "out.4"]]) == expected


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ([["out.0", "out.1"], ["out.2"]], "no stated stage"),
        ([["out.*"], ["out.5"]], "two stages"),
        ([["out.*"], ["out.7"]], "matched the FiLM stages"),
        ([["out.*"], ["out.5.1"]], "holds no FiLM target"),
        ("out.*", "cannot use the stages"),
        ([], "cannot use the stages"),
        ([[]], "cannot use the stages"),
        ({"0": ["out.*"]}, "cannot use the stages"),
        (None, "cannot use the stages"),
    ],
)
def test_stages_that_do_not_cover_each_block_once_are_refused(groups: object, words: str) -> None:
    with pytest.raises(TargetMatchError, match=words):
        stages(groups)


def test_the_order_within_a_stage_is_never_by_name() -> None:
    with pytest.raises(TargetMatchError, match="order of blocks in a stage"):
        grouped(["up.a", "up.b"], [["up.*"]], ["up", "up.a", "up.b"], owner="Net", origin="test")
    assert grouped(["up.a", "up.b"], [["up.b", "up.a"]], ["up", "up.a", "up.b"], owner="Net", origin="test") == [["up.b", "up.a"]]


def test_blocks_are_all_or_the_last_of_a_stage() -> None:
    groups = [["a", "b"], ["c"], ["d", "e", "f"]]
    every = [Target(0, "a", 0), Target(0, "b", 1), Target(1, "c"), Target(2, "d", 0), Target(2, "e", 1), Target(2, "f", 2)]
    assert numbered(groups, "all") == every
    assert numbered(groups, "last") == [Target(0, "b"), Target(1, "c"), Target(2, "f")]


TARGETS = numbered([["ups.0.1"], ["ups.1.1", "ups.1.2"], ["ups.2.1"]], "all")


def test_stages_are_selected_ascending_and_once_with_all_their_blocks() -> None:
    assert select_stages(TARGETS, [2, 0, 2], owner="Net") == [TARGETS[0], TARGETS[3]]
    assert select_stages(TARGETS, [1], owner="Net") == TARGETS[1:3]
    assert select_stages(TARGETS, None, owner="Net") == TARGETS


@pytest.mark.parametrize("asked", [[3], [-1], [0, 7, 9]])
def test_unknown_stage_is_named_with_the_legal_range_and_origin(asked: list[int]) -> None:
    with pytest.raises(TargetMatchError) as caught:
        select_stages(TARGETS, asked, owner="Net", origin="host config")
    assert caught.value.facts["unknown"] == [stage for stage in asked if stage not in (0, 1, 2)]
    assert "host config" in str(caught.value)
    assert "to 2 (full resolution)" in str(caught.value)
