"""The description of FiLM in a checkpoint: its table of settings, older and later formats, and what no version writes."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from vlmfilm_plugin.errors import CheckpointError
from vlmfilm_plugin.film import architecture
from vlmfilm_plugin.film.architecture import (
    FORMAT,
    Architecture,
    Stage,
    as_settings,
    check_architecture,
    decided_by,
    read_description,
    read_extra_state,
)
from vlmfilm_plugin.settings.layers import resolve
from vlmfilm_plugin.settings.record import FIELDS

# What the first version wrote, to the letter.
FORMAT_1: dict[str, Any] = {
    "format": 1,
    "stages": [{"index": 1, "path": "ups.1.1", "channels": 4}],
    "apply_point": "post_block2",
    "feature_dim": 5,
    "cond_dim": 4,
    "hidden_dim": 6,
    "gamma_scale": 0.1,
    "beta_scale": None,
    "use_layernorm": True,
    "is_text": False,
    "fingerprint": "abc",
    "encoder": {"mode": "image"},
}
HERE = Architecture(**{**{k: v for k, v in FORMAT_1.items() if k != "format"}, "stages": (Stage(1, "ups.1.1", 4),)})


def extra_state(description: object) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(description).encode()), dtype=torch.uint8)


def test_every_setting_of_the_table_exists_and_both_directions_use_it() -> None:
    named = {item.metadata["setting"]: item.name for item in fields(Architecture) if item.metadata["setting"]}
    assert named.keys() <= FIELDS.keys()
    settings = resolve([("argument", {"decoder_stages": [1], "cond_dim": 7, "gamma_scale": None, "apply_point": "post_block1"})])
    values = decided_by(settings)
    assert set(values) == set(named.values()) - {"stages"}
    again = as_settings({**values, "stages": [{"index": 1, "path": "p", "channels": 3}]})
    # The kind of feature belongs to the encoder, whose settings are recorded apart.
    assert set(again) == set(named) - {"use_text_prompt_cond"}
    assert resolve([("checkpoint", again)]).as_dict() == settings.as_dict()


def test_a_description_of_the_first_format_means_what_it_meant() -> None:
    read = read_extra_state(extra_state(FORMAT_1))
    check_architecture(read, HERE)
    assert read["format"] == FORMAT
    assert {name: read[name] for name in FORMAT_1 if name != "format"} == {name: value for name, value in FORMAT_1.items() if name != "format"}


def test_what_this_version_writes_it_reads() -> None:
    check_architecture(read_extra_state(extra_state(HERE.as_dict())), HERE)


BLOCKS = (Stage(0, "ups.0.0", 4, 0), Stage(0, "ups.0.1", 4, 1), Stage(2, "ups.2.0", 4))


def test_blocks_of_a_stage_are_recorded_and_one_alone_is_written_as_every_format_had_it() -> None:
    written = replace(HERE, stages=BLOCKS).as_dict()
    assert written["stages"][1] == {"index": 0, "path": "ups.0.1", "channels": 4, "block": 1}
    assert set(written["stages"][2]) == set(HERE.as_dict()["stages"][0]) == {"index", "path", "channels"}
    check_architecture(read_extra_state(extra_state(written)), replace(HERE, stages=BLOCKS))
    assert as_settings(read_description(written))["decoder_stages"] == [0, 2]
    with pytest.raises(CheckpointError, match=r"0\.1 \(ups\.0\.1"):
        check_architecture(read_extra_state(extra_state(written)), HERE)


def test_readers_of_older_formats_are_let_read_what_means_the_same_to_them() -> None:
    assert HERE.as_dict()["readable_by"] == 2
    assert replace(HERE, feature_transform=("center",)).as_dict()["readable_by"] == 3
    for changed in (replace(HERE, stages=BLOCKS), replace(HERE, blocks="last")):
        assert changed.as_dict()["readable_by"] == FORMAT


@pytest.mark.parametrize(
    "blocks",
    [[0], [1, 0], [0, 2], [0, None], [None, None], [0, 0], [0, True], [0, -1], [0, "1"]],
    ids=str,
)
def test_blocks_that_no_version_writes_are_refused(blocks: list[Any]) -> None:
    stages = [{"index": 0, "path": f"p{i}", "channels": 4, **({} if block is None else {"block": block})} for i, block in enumerate(blocks)]
    with pytest.raises(CheckpointError, match="description"):
        read_description({**HERE.as_dict(), "stages": stages})


def test_every_older_format_has_its_migration() -> None:
    assert set(architecture._MIGRATIONS) == set(range(1, FORMAT))


def test_a_later_field_that_an_older_format_lacks_is_filled_in_by_its_migration(monkeypatch: pytest.MonkeyPatch) -> None:
    # As a version would that gives `beta_scale` a new name and adds `is_text`: what an old checkpoint meant is said by the migration.
    def migrate(description: dict[str, Any]) -> dict[str, Any]:
        moved = {**description, "is_text": False, "beta_scale": description["shift_bound"]}
        del moved["shift_bound"]
        return moved

    monkeypatch.setattr(architecture, "FORMAT", FORMAT + 1)
    monkeypatch.setattr(architecture, "_MIGRATIONS", {**architecture._MIGRATIONS, FORMAT: migrate})
    old = {name: value for name, value in FORMAT_1.items() if name not in {"is_text", "beta_scale"}} | {"shift_bound": 0.3}
    assert read_description(old)["beta_scale"] == 0.3


def test_a_later_format_is_read_where_its_writer_says_so_and_its_fields_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    later = {**FORMAT_1, "head": "film", "feature_transform": [], "feature_control": "none", "blocks": "all", "format": FORMAT + 3}
    later |= {"readable_by": FORMAT, "note": "x"}
    check_architecture(read_extra_state(extra_state(later)), HERE)
    assert "note" in capsys.readouterr().out


@pytest.mark.parametrize("promise", [{}, {"readable_by": FORMAT + 1}, {"readable_by": "2"}, {"readable_by": True}, {"readable_by": 0}])
def test_a_later_format_without_that_promise_is_refused(promise: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="description") as error:
        read_description({**FORMAT_1, "format": FORMAT + 1, **promise})
    assert f"format {FORMAT + 1}" in str(error.value) and "update vlmfilm-plugin" in str(error.value)


@pytest.mark.parametrize("number", [1, FORMAT])
def test_an_unknown_field_of_a_known_format_is_refused_by_name(number: int) -> None:
    with pytest.raises(CheckpointError, match="head_kind"):
        read_description({**FORMAT_1, "format": number, "head_kind": "adaln"})


@pytest.mark.parametrize(
    "change",
    [
        {"format": None},
        {"format": True},
        {"format": 0},
        {"format": "1"},
        {"stages": []},
        {"stages": None},
        {"stages": [{"index": -1, "path": "p", "channels": 4}]},
        {"stages": [{"index": 0, "path": "p"}]},
        {"stages": [{"index": False, "path": "p", "channels": 4}]},
        {"stages": {"0": "p"}},
        {"cond_dim": 0},
        {"cond_dim": "4"},
        {"cond_dim": True},
        {"gamma_scale": -0.1},
        {"gamma_scale": "0.1"},
        {"is_text": 1},
        {"apply_point": None},
        {"fingerprint": 3},
        {"encoder": []},
    ],
    ids=str,
)
def test_values_that_no_version_writes_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="description"):
        read_description({**FORMAT_1, **change})


@pytest.mark.parametrize("name", [name for name in FORMAT_1 if name not in {"format", "fingerprint", "encoder"}])
def test_a_missing_field_is_refused_by_name(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"no field '{name}'"):
        read_description({key: value for key, value in FORMAT_1.items() if key != name})


def test_a_description_without_its_encoder_is_read() -> None:
    read = read_description({key: value for key, value in FORMAT_1.items() if key not in {"fingerprint", "encoder"}})
    assert read["fingerprint"] is None
    check_architecture(read, HERE)
