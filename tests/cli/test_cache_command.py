"""`vlmfilm cache`: every action on real files, in text and in JSON, and what it says of a store that is missing or damaged."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import python, succeed

from vlmfilm_plugin.cli import main
from vlmfilm_plugin.encoders.base import EncoderIdentity
from vlmfilm_plugin.errors import StoreError
from vlmfilm_plugin.features.store.admin import opened, prune
from vlmfilm_plugin.features.store.protocol import SourceStamp, StoredFeature
from vlmfilm_plugin.features.store.store import FeatureStore

A, B = EncoderIdentity({"encoder": "aa", "model": "x"}), EncoderIdentity({"encoder": "bb", "model": "y"})
STAMP = SourceStamp(3, 1_700_000_000_123_456_789, "ab" * 16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the folder of a store with two namespaces."""
    with FeatureStore(tmp_path / "s") as store:
        store.write(A, [StoredFeature(f"k{i}", np.full(4, i), STAMP, f"note {i}") for i in range(5)])
        store.write(B, [StoredFeature("k1", np.full(6, 9.0))])
    return tmp_path / "s"


def call(capsys: pytest.CaptureFixture[str], *arguments: str | Path, code: int = 0) -> Any:
    capsys.readouterr()
    assert main(["cache", *map(str, arguments)]) == code
    text = capsys.readouterr().out
    return json.loads(text) if "--json" in arguments else text


def change(folder: Path, statement: str, *values: object) -> None:
    with sqlite3.connect(folder / "features.sqlite") as connection:
        connection.execute(statement, values)
    connection.close()


def test_stats_name_every_namespace(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = call(capsys, "stats", "--cache-dir", folder, "--json")
    assert [(space["fingerprint"], space["count"], space["bytes"], space["width"], space["notes"]) for space in found["namespaces"]] == [
        (A.fingerprint, 5, 40, 4, 5),
        (B.fingerprint, 1, 12, 6, 0),
    ]
    assert found["features"] == 6 and found["namespaces"][0]["facts"] == dict(A.facts)
    text = call(capsys, "stats", "--cache-dir", folder)
    assert B.fingerprint in text and "5 features of width 4" in text


def test_the_store_of_the_settings_is_the_default(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM_FILM_CACHE_DIR", str(folder))
    assert call(capsys, "stats", "--json")["features"] == 6


@pytest.mark.parametrize("action", [["stats"], ["verify"], ["prune", "--keep", "x"], ["export", "f"], ["show", "k"]])
def test_a_store_that_is_missing_is_an_error_and_is_not_made(tmp_path: Path, capsys: pytest.CaptureFixture[str], action: list[str]) -> None:
    assert main(["cache", *action, "--cache-dir", str(tmp_path / "no")]) == 2
    assert "there is none" in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_verify_finds_damage_and_exits_1(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "verify", "--cache-dir", folder, "--json") | {"store": ""} == {
        "store": "",
        "is_sound": True,
        "checked": 6,
        "damaged": [],
        "problems": [],
    }
    change(folder, "UPDATE features SET note = 'other' WHERE key = ?", b"k2")
    change(folder, "UPDATE features SET data = zeroblob(8) WHERE key = ?", b"k3")
    change(folder, "UPDATE namespaces SET facts = '{}' WHERE fingerprint = ?", B.fingerprint)
    columns = "key, source_digest, dtype, width, data, checksum, created"
    change(folder, f"INSERT INTO features (namespace, {columns}) SELECT 77, {columns} FROM features WHERE key = ?", b"k0")
    found = call(capsys, "verify", "--cache-dir", folder, "--json", code=1)
    assert found["damaged"] == [[A.fingerprint, "k2"], [A.fingerprint, "k3"]] and len(found["problems"]) == 2
    text = call(capsys, "verify", "--cache-dir", folder, code=1)
    assert "DAMAGED 'k2'" in text and "1 features belong to no namespace" in text


def test_merge_takes_the_newer_of_two_and_leaves_damage_behind(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FeatureStore(tmp_path / "old") as old:
        old.write(A, [StoredFeature("k1", np.full(4, -1), STAMP), StoredFeature("only old", np.full(4, 5)), StoredFeature("bad", np.full(4, 5))])
    change(tmp_path / "old", "UPDATE features SET created = 1.0")
    change(tmp_path / "old", "UPDATE features SET checksum = 0 WHERE key = ?", b"bad")
    found = call(capsys, "merge", tmp_path / "old", folder, tmp_path / "new", "--json", code=1)
    assert (found["added"], found["replaced"], found["kept"], found["damaged"]) == (7, 1, 0, 1)
    assert "0 added, 0 replaced by newer ones, 6 kept" in call(capsys, "merge", folder / "features.sqlite", tmp_path / "new")
    with FeatureStore(tmp_path / "new") as store:
        k1 = store.read(A, ["k1"])["k1"]
        assert (k1.feature[0], k1.stamp, k1.note) == (1, STAMP, "note 1")
        assert store.keys(A) == ["k0", "k1", "k2", "k3", "k4", "only old"] and store.read(B, ["k1"])["k1"].feature[0] == 9


def test_merge_refuses_itself_and_another_width(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(capsys, "merge", folder, folder, code=2)
    with FeatureStore(tmp_path / "wide") as wide:
        wide.write(A, [StoredFeature("k9", np.zeros(5))])
    call(capsys, "merge", tmp_path / "wide", folder, code=2)


def test_prune_deletes_what_is_named_and_shrinks_the_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FeatureStore(folder, "float32") as store:
        store.write(A, [StoredFeature(f"w{i}", np.zeros(4)) for i in range(3000)])
    before = (folder / "features.sqlite").stat().st_size
    dry = call(capsys, "prune", "--namespace", "aa", "--dry-run", "--cache-dir", folder, "--json")
    assert dry["is_dry_run"] and [space["count"] for space in dry["namespaces"]] == [3005]
    assert call(capsys, "stats", "--cache-dir", folder, "--json")["features"] == 3006
    assert "deleted aa-" in call(capsys, "prune", "--keep", "bb", "--cache-dir", folder)
    assert [space["fingerprint"] for space in call(capsys, "stats", "--cache-dir", folder, "--json")["namespaces"]] == [B.fingerprint]
    assert (folder / "features.sqlite").stat().st_size < before / 2
    assert "nothing to delete" in call(capsys, "prune", "--keep", "bb", "--cache-dir", folder)


@pytest.mark.parametrize("choice", [["--keep", "zz"], ["--namespace", ""]])
def test_prune_deletes_nothing_for_a_name_that_is_not_one_namespace(folder: Path, capsys: pytest.CaptureFixture[str], choice: list[str]) -> None:
    call(capsys, "prune", *choice, "--cache-dir", folder, code=2)
    assert call(capsys, "stats", "--cache-dir", folder, "--json")["features"] == 6


def test_an_open_store_never_reads_another_encoder_after_a_prune_and_ids_are_never_used_again(folder: Path) -> None:
    c = EncoderIdentity({"encoder": "cc"})
    with FeatureStore(folder) as store, opened(folder) as file:
        assert store.read(B, ["k1"])
        prune(file, drop=["bb"])
        store.write(c, [StoredFeature("k1", np.zeros(6))])
        assert store.read(B, ["k1"]) == {} and store.count(B) == 0
    with sqlite3.connect(folder / "features.sqlite") as connection:
        assert [number for (number,) in connection.execute("SELECT id FROM namespaces ORDER BY id")] == [1, 3]
    connection.close()


def test_export_and_import_carry_everything(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = ["a\nb", "a\udcffb", "血管", "x" * 10_000]
    with FeatureStore(folder) as store:
        store.write(A, [StoredFeature(key, np.full(4, 0.1), None, "ü") for key in odd])
        before = store.read(A, [*odd, "k3"])
    call(capsys, "export", tmp_path / "f.safetensors", "--cache-dir", folder, code=2)
    found = call(capsys, "export", tmp_path / "f.safetensors", "--namespace", A.fingerprint, "--cache-dir", folder, "--json")
    assert found["features"] == 9
    assert call(capsys, "import", tmp_path / "f.safetensors", "--cache-dir", tmp_path / "n", "--json")["added"] == 9
    with FeatureStore(tmp_path / "n") as store:
        after = store.read(A, list(before))
    for key, row in before.items():
        assert (after[key].stamp, after[key].note) == (row.stamp, row.note)
        np.testing.assert_array_equal(after[key].feature, row.feature)
    assert "0 added, 0 replaced by newer ones, 9 kept" in call(capsys, "import", tmp_path / "f.safetensors", "--cache-dir", tmp_path / "n")


def test_an_exported_file_is_readable_without_this_package(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors import safe_open

    call(capsys, "export", tmp_path / "f", "--namespace", "aa", "--cache-dir", folder)
    with safe_open(str(tmp_path / "f"), framework="np") as content:
        rows = json.loads(content.get_tensor("rows").tobytes())
        assert content.get_tensor("features").shape == (5, 4) and [row["key"] for row in rows] == ["k0", "k1", "k2", "k3", "k4"]
        assert json.loads(content.metadata()["facts"]) == dict(A.facts)


def test_import_refuses_what_export_did_not_write_and_leaves_out_damage(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.numpy import save_file

    file = tmp_path / "f"
    for make in (lambda: file.write_text("x"), lambda: save_file({"features": np.zeros((1, 2))}, str(file)), lambda: file.unlink()):
        make()
        assert main(["cache", "import", str(file), "--cache-dir", str(folder)]) == 2
        assert "cannot import features from this file" in capsys.readouterr().err
    call(capsys, "export", file, "--namespace", "aa", "--cache-dir", folder)
    content = bytearray(file.read_bytes())
    header = int.from_bytes(content[:8], "little")
    content[8 + header] ^= 1  # features come first or second: one bit of one row either way
    file.write_bytes(content)
    code = main(["cache", "import", str(file), "--cache-dir", str(tmp_path / "n"), "--json"])
    text = capsys.readouterr()
    assert code == 2 or (code == 1 and json.loads(text.out)["damaged"] == 1)


def test_export_to_a_place_that_cannot_be_written_leaves_nothing(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(capsys, "export", tmp_path / "no" / "f", "--namespace", "aa", "--cache-dir", folder, code=2)
    (tmp_path / "dir").mkdir()
    call(capsys, "export", tmp_path / "dir", "--namespace", "aa", "--cache-dir", folder, code=2)
    assert not list(tmp_path.glob("*.partial"))


def test_show_prints_facts_stamp_note_and_norm(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (entry,) = call(capsys, "show", "k2", "--cache-dir", folder, "--json")["entries"]
    assert (entry["norm"], entry["note"], entry["facts"], entry["stamp"]) == (4.0, "note 2", dict(A.facts), STAMP._asdict())
    assert len(call(capsys, "show", "k1", "--cache-dir", folder, "--json")["entries"]) == 2
    assert len(call(capsys, "show", "k1", "--namespace", "bb", "--cache-dir", folder, "--json")["entries"]) == 1
    assert "note 2" in call(capsys, "show", "k2", "--cache-dir", folder)
    assert main(["cache", "show", "k", "--cache-dir", str(folder)]) == 1
    assert "'k0'" in capsys.readouterr().err
    change(folder, "UPDATE features SET checksum = 1 WHERE key = ?", b"k2")
    (entry,) = call(capsys, "show", "k2", "--cache-dir", folder, "--json")["entries"]
    assert entry["is_damaged"] and entry["norm"] is None
    with FeatureStore(folder) as store:
        store.write(A, [StoredFeature("large", np.full(4, 40_000.0))])
    (entry,) = call(capsys, "show", "large", "--cache-dir", folder, "--json")["entries"]
    assert (entry["norm"], entry["dtype"]) == (80_000.0, "float16"), "more than a float16 can hold"


def test_looking_at_a_store_imports_no_torch(folder: Path) -> None:
    code = f"import sys; from vlmfilm_plugin.cli import main; main(['cache', 'stats', '--cache-dir', {str(folder)!r}]); print('torch' in sys.modules)"
    assert succeed(python("-c", code)).splitlines()[-1] == "False"


def test_every_action_has_help() -> None:
    for action in ("stats", "verify", "merge", "prune", "export", "import", "show"):
        with pytest.raises(SystemExit) as caught:
            main(["cache", action, "--help"])
        assert caught.value.code == 0


def test_a_text_file_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "features.sqlite").write_text("text " * 1000)
    with pytest.raises(StoreError, match="not a database"), opened(tmp_path):
        pass
