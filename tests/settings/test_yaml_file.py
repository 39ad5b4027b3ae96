"""The one reader of YAML: what a few bytes can do to a reader, and what this one says."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from vlmfilm_plugin.errors import SettingsError
from vlmfilm_plugin.settings import yaml_file
from vlmfilm_plugin.settings.layers import layers_of, resolve
from vlmfilm_plugin.settings.yaml_file import BadYaml, loads, read_mapping

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True)
)
MERGES = "a: &a {k: 1}\n" + "".join(f"{b}: &{b}\n  <<: [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (BOMB, "aliases expanded"),
        (MERGES, "aliases expanded"),
        ("[" * 100_000, "levels"),
        ("a: " + "[" * 5000 + "]" * 5000, "levels"),
        ("".join(f"{' ' * depth}k:\n" for depth in range(500)), "levels"),
        ("a: &a [*a]", "alias of what it stands in"),
        ("a: &a {b: *a}", "alias of what it stands in"),
        ("cond_dim: 8\ncond_dim: 16\n", "'cond_dim' twice"),
        ("a: {b: 1, b: 2}", "'b' twice"),
        ("a: &x {b: 1}\nc:\n  <<: *x\n  <<: *x\n", "'<<' twice"),
        ("a: *nowhere", "undefined alias"),
        ("a: 1\n---\nb: 2\n", "document"),
        ("a: !!python/object/apply:os.system [id]", "could not determine a constructor"),
        ("a: 2020-13-45", "month"),
        ("a: 0x_", "invalid literal"),
        ("a: !!bool x", "x"),
        ("a: !!timestamp x", "group"),
        ("a: !!int ''", "index"),
    ],
)
def test_what_would_hang_overflow_or_lose_something_is_refused_at_once(text: str, found: str) -> None:
    start = time.monotonic()
    with pytest.raises(BadYaml, match=found) as caught:
        loads(text)
    assert time.monotonic() - start < 5 and caught.value.place and caught.value.expected


def test_ordinary_aliases_merges_and_depth_are_read() -> None:
    read = loads("base: &b {x: 1, y: 2}\nrun:\n  <<: *b\n  y: 3\nagain: *b\n")
    assert read == {"base": {"x": 1, "y": 2}, "run": {"x": 1, "y": 3}, "again": {"x": 1, "y": 2}}
    assert loads("[" * 60 + "]" * 60) is not None and loads("") is None and loads("1: a\n'1': b\n") == {1: "a", "1": "b"}


@given(st.text(max_size=200))
@hypothesis_settings(max_examples=200, deadline=None)
def test_any_text_is_read_or_is_bad_yaml(text: str) -> None:
    try:
        loads(text)
    except BadYaml as error:
        assert error.place and error.found


def test_a_file_is_bounded_in_bytes_and_must_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yaml_file, "MOST_BYTES", 1000)
    (tmp_path / "huge.yaml").write_text("# " + "x" * 2000, encoding="utf-8")
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00\x81")
    for name, found in (("huge.yaml", "more than"), ("pipe.yaml", "pipe"), ("bytes.yaml", "UTF-8"), (".", "folder")):
        with pytest.raises(SettingsError, match="cannot read the file") as caught:
            read_mapping(tmp_path / name, "the file", "")
        assert found in str(caught.value.facts["found"])
    with pytest.raises(SettingsError, match="No such file"):
        read_mapping(tmp_path / "missing.yaml", "the file", "")
    with pytest.raises(SettingsError, match="regular file"):
        read_mapping(Path("/dev/zero"), "the file", "")


def test_every_reader_of_a_user_refuses_a_bomb_by_the_files_name(tmp_path: Path) -> None:
    from vlmfilm_plugin.encoders._questions import read_questionnaire
    from vlmfilm_plugin.warmup.image_list import read_plan

    bomb = tmp_path / "bomb.yaml"
    bomb.write_text(BOMB, encoding="utf-8")
    for read in (
        lambda: layers_of({"VLM_FILM_CONFIG": str(bomb)}),
        lambda: read_plan(bomb, ["train"]),
        lambda: read_questionnaire(resolve([("a", {"questionnaire": str(bomb)})])),
    ):
        with pytest.raises(SettingsError, match=r"bomb\.yaml") as caught:
            read()
        assert "aliases expanded" in str(caught.value.facts["found"])
