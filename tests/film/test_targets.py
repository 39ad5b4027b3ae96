"""Matching decoder blocks by path."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmfilm_plugin.errors import TargetMatchError
from vlmfilm_plugin.film.targets import is_number, match_targets, texts_of

NAMES = ["", "ups", *(f"ups.{i}" for i in range(12)), *(f"ups.{i}.{j}" for i in (11, 10, 9, 1, 0, 2, 3, 4, 5, 6, 7, 8) for j in (1, 0)), "downs.0.1"]


def test_star_is_one_component_only() -> None:
    assert match_targets(["ups.0.1", "ups.0.1.block.1", "ups.1", "unet.ups.0.1"], "ups.*.1", owner="Net") == ["ups.0.1"]


def test_a_star_may_be_part_of_a_component() -> None:
    assert match_targets(["up1", "up2", "upsample.1", "down1"], "up*", owner="Net") == ["up1", "up2"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("**.conv", ["conv", "up.conv", "up.0.conv"]),
        ("up.**", ["up", "up.conv", "up.0", "up.0.conv"]),
        ("up.**.conv", ["up.conv", "up.0.conv"]),
        ("**.0.**", ["up.0", "up.0.conv"]),
    ],
)
def test_two_stars_are_any_number_of_components(pattern: str, expected: list[str]) -> None:
    names = ["conv", "up", "up.conv", "up.0", "up.0.conv", "down"]
    # Blocks inside one another are refused, which stages that name modules around blocks are not.
    assert match_targets(names, pattern, owner="Net", what="stages") == expected


def test_a_regular_expression_is_of_the_whole_path() -> None:
    assert match_targets(["up_1", "up_2", "up_2.conv", "xup_1"], r"re:up_\d", owner="Net") == ["up_1", "up_2"]


def test_several_patterns_are_added_and_each_must_match() -> None:
    assert match_targets(["a.0", "b.0", "a.1"], ["b.*", "a.*"], owner="Net") == ["a.0", "b.0", "a.1"]
    with pytest.raises(TargetMatchError) as caught:
        match_targets(["a.0", "b.0"], ["b.*", "c.*"], owner="Net")
    assert "'c.*'" in str(caught.value)


def test_matching_is_case_sensitive() -> None:
    with pytest.raises(TargetMatchError):
        match_targets(["Ups.0.1"], "ups.*.1", owner="Net")


@pytest.mark.parametrize("pattern", ["up.*.1", r"re:up\.\d+\.1"])
def test_no_match_shows_pattern_origin_count_and_closest(pattern: str) -> None:
    with pytest.raises(TargetMatchError) as caught:
        match_targets(NAMES, pattern, owner="Net", origin="film.yaml")
    error = caught.value
    assert "Net" in error.headline
    assert error.facts["targets"] == f"{pattern!r}   (from film.yaml)"
    assert error.facts["searched"] == f"{len(NAMES) - 1} modules, matched 0"
    assert "ups." in str(error.facts["closest"])


def test_no_match_in_an_empty_model_is_the_same_error() -> None:
    with pytest.raises(TargetMatchError, match="searched: 0 modules"):
        match_targets([""], "ups.*.1", owner="Net")


def test_the_root_is_never_a_target() -> None:
    for pattern in ("*", "**", "re:.*"):
        with pytest.raises(TargetMatchError):
            match_targets([""], pattern, owner="Net")


@pytest.mark.parametrize("patterns", ["up.**", ["up.0", "up.0.conv"], "re:up.*"])
def test_parents_and_children_together_are_refused(patterns: str | list[str]) -> None:
    with pytest.raises(TargetMatchError, match="inside one another") as caught:
        match_targets(["up", "up.0", "up.0.conv", "up.1"], patterns, owner="Net")
    assert "up.0.conv" in str(caught.value)


@pytest.mark.parametrize("wrong", [[], "", [""], [3], None, {"a": "b"}, lambda unet: None, lambda unet: [unet]])
def test_what_is_no_pattern_is_refused(wrong: object) -> None:
    with pytest.raises(TargetMatchError, match="cannot use the targets of Net"):
        texts_of(wrong, object(), what="targets", owner="Net", origin="argument")


def test_a_broken_regular_expression_is_named() -> None:
    with pytest.raises(TargetMatchError, match="no regular expression"):
        texts_of("re:(", object(), what="targets", owner="Net", origin="argument")


@pytest.mark.parametrize(
    ("part", "expected"), [("0", True), ("10", True), ("-1", False), ("01", False), ("\u00b2", False), ("\u0663", False), ("", False)]
)
def test_numbers_are_places_in_a_list(part: str, expected: bool) -> None:
    assert is_number(part) is expected


@settings(deadline=None)
@given(st.lists(st.text(max_size=12), max_size=6), st.text(max_size=8))
def test_odd_names_and_patterns_match_or_raise_our_error(names: list[str], pattern: str) -> None:
    try:
        texts_of(pattern, None, what="targets", owner="Net", origin="argument")
        found = match_targets(names, pattern, owner="Net")
    except TargetMatchError:
        return
    assert found and set(found) <= set(names)
