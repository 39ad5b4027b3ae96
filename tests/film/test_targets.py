"""Matching decoder blocks by path, and stage selection."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmfilm_plugin.errors import TargetMatchError
from vlmfilm_plugin.film.targets import Target, match_targets, select_stages

NAMES = ["", "ups", *(f"ups.{i}" for i in range(12)), *(f"ups.{i}.{j}" for i in (11, 10, 9, 1, 0, 2, 3, 4, 5, 6, 7, 8) for j in (1, 0)), "downs.0.1"]


def test_stage_ten_follows_stage_nine() -> None:
    found = match_targets(NAMES, "ups.*.1", owner="Net")
    assert [target.path for target in found] == [f"ups.{i}.1" for i in range(12)]
    assert [target.index for target in found] == list(range(12))


def test_star_is_one_component_only() -> None:
    assert [t.path for t in match_targets(["ups.0.1", "ups.0.1.block.1", "ups.1", "unet.ups.0.1"], "ups.*.1", owner="Net")] == ["ups.0.1"]


def test_matching_is_case_sensitive() -> None:
    with pytest.raises(TargetMatchError):
        match_targets(["Ups.0.1"], "ups.*.1", owner="Net")


def test_no_match_shows_pattern_origin_count_and_closest() -> None:
    with pytest.raises(TargetMatchError) as caught:
        match_targets(NAMES, "up.*.1", owner="Net", origin="film.yaml")
    error = caught.value
    assert "Net" in error.headline
    assert error.facts["targets"] == "'up.*.1'   (from film.yaml)"
    assert error.facts["searched"] == f"{len(NAMES) - 1} modules, matched 0"
    assert "ups." in str(error.facts["closest"])


def test_no_match_in_an_empty_model_is_the_same_error() -> None:
    with pytest.raises(TargetMatchError, match="searched: 0 modules"):
        match_targets([""], "ups.*.1", owner="Net")


def test_the_root_is_never_a_target() -> None:
    with pytest.raises(TargetMatchError):
        match_targets([""], "*", owner="Net")


TARGETS = [Target(i, f"ups.{i}.1") for i in range(3)]


def test_stages_are_selected_ascending_and_once_whatever_the_order_given() -> None:
    assert select_stages(TARGETS, [2, 0, 2], owner="Net") == [TARGETS[0], TARGETS[2]]
    assert select_stages(TARGETS, None, owner="Net") == TARGETS


@pytest.mark.parametrize("stages", [[3], [-1], [0, 7, 9]])
def test_unknown_stage_is_named_with_the_legal_range_and_origin(stages: list[int]) -> None:
    with pytest.raises(TargetMatchError) as caught:
        select_stages(TARGETS, stages, owner="Net", origin="host config")
    assert caught.value.facts["unknown"] == [stage for stage in stages if stage not in (0, 1, 2)]
    assert "host config" in str(caught.value)
    assert "to 2 (full resolution)" in str(caught.value)


@settings(deadline=None)
@given(st.lists(st.text(max_size=12), max_size=6), st.text(max_size=8))
def test_odd_names_and_patterns_match_or_raise_our_error(names: list[str], pattern: str) -> None:
    try:
        found = match_targets(names, pattern, owner="Net")
    except TargetMatchError:
        return
    assert [target.index for target in found] == list(range(len(found)))


def test_a_digit_that_is_no_number_does_not_break_the_order() -> None:
    assert [t.path for t in match_targets(["ups.\u00b2.1", "ups.1.1"], "ups.*.1", owner="Net")] == ["ups.1.1", "ups.\u00b2.1"]
