"""Whose file it is: a store of ours with exactly its tables, or nothing; and whose rows: right under their own encoder's name alone."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import numpy as np
import pytest

from vlmfilm_plugin.cli import main
from vlmfilm_plugin.encoders.base import EncoderIdentity
from vlmfilm_plugin.errors import StoreError
from vlmfilm_plugin.features.store.admin import opened, verify
from vlmfilm_plugin.features.store.protocol import StoredFeature
from vlmfilm_plugin.features.store.rows import COLUMNS, Row, bound, decode
from vlmfilm_plugin.features.store.sqlite_file import StoreFile
from vlmfilm_plugin.features.store.store import FeatureStore

A, B = EncoderIdentity({"encoder": "a", "model": "x"}), EncoderIdentity({"encoder": "a", "model": "y"})


def rows(*keys: str, value: float = 1.0) -> list[StoredFeature]:
    return [StoredFeature(key, np.full(4, value, dtype=np.float32)) for key in keys]


def change(path: Path, *statements: str) -> None:
    with sqlite3.connect(path) as connection:
        connection.create_function("unbound", 2, bound)
        for statement in statements:
            connection.execute(statement)
    connection.close()


CHANGES = (
    "CREATE TRIGGER evil AFTER INSERT ON features BEGIN UPDATE features SET data = zeroblob(8); END",
    "CREATE VIEW more AS SELECT * FROM features",
    "ALTER TABLE features ADD COLUMN evil AS (abs(-9223372036854775807 - 1))",
    "ALTER TABLE features RENAME COLUMN note TO other",
    "CREATE INDEX evil ON features (hex(data))",
    "DROP INDEX features_by_content",
    "DROP TABLE namespaces",
    "CREATE TABLE more (x)",
)


@pytest.mark.parametrize("statement", CHANGES)
def test_a_store_with_anything_more_or_less_in_it_is_refused_and_left_alone(tmp_path: Path, statement: str) -> None:
    with FeatureStore(tmp_path) as store:
        store.write(A, rows("k"))
    change(store.path, statement)
    before = store.path.read_bytes()
    with pytest.raises(StoreError, match="was changed") as caught:
        FeatureStore(tmp_path)
    assert str(store.path) in str(caught.value) and store.path.read_bytes() == before
    with pytest.raises(StoreError, match="was changed"):
        StoreFile(store.path, 1.0)


def test_somebodys_database_is_no_store_and_not_a_byte_of_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "features.sqlite"
    change(path, "CREATE TABLE patients (name TEXT)")
    before = path.read_bytes()
    for open_it in (lambda: FeatureStore(tmp_path), lambda: StoreFile(path, 1.0)):
        with pytest.raises(StoreError, match="this database is none") as caught:
            open_it()
        assert "patients" in str(caught.value)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == [path.name]


def test_rows_under_another_encoders_name_are_never_served(tmp_path: Path) -> None:
    with FeatureStore(tmp_path) as store:
        store.write(A, rows("k", value=1))
        store.write(B, rows("k", value=2))
        change(store.path, *(f"UPDATE namespaces SET id = {new} WHERE id = {old}" for new, old in ((-1, 1), (1, 2), (2, -1))))
        assert store.read(A, ["k"]) == store.read(B, ["k"]) == {}
    with opened(tmp_path) as file:
        assert len(verify(file).damaged) == 2


def test_checksums_of_the_third_schema_are_bound_once_and_read_where_nothing_can_be_written(tmp_path: Path) -> None:
    with FeatureStore(tmp_path) as store:
        store.write(A, rows("a", "b"))
        store.write(B, rows("a", value=2))
    unbind = "UPDATE features SET checksum = unbound(checksum, (SELECT fingerprint FROM namespaces WHERE id = namespace))"
    change(store.path, unbind, "PRAGMA user_version = 3")
    file = StoreFile.__new__(StoreFile)
    file.path, file._timeout_s = store.path, 1.0
    reading = file._open_read_only()
    (names,) = zip(*reading.execute("SELECT fingerprint FROM namespaces ORDER BY id"), strict=True)
    read = reading.execute(f"SELECT namespace, {COLUMNS} FROM features").fetchall()
    assert len(read) == 3 and all(decode(Row._make(row[1:]), names[row[0] - 1]) is not None for row in read)
    reading.close()
    for _ in range(2):
        with FeatureStore(tmp_path) as again:
            assert set(again.read(A, ["a", "b"])) == {"a", "b"} and set(again.read(B, ["a"])) == {"a"}


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE features SET created = 1e300",
        "UPDATE features SET created = 'never'",
        "UPDATE features SET source_digest = x'ff'",
        "UPDATE features SET source_size = 'many'",
        "UPDATE features SET source_place = x'00'",
        "UPDATE features SET dtype = x'00'",
        "UPDATE namespaces SET facts = x'00'",
        "UPDATE namespaces SET fingerprint = x'00'",
        "UPDATE namespaces SET facts = '{}', created = 'never'",
        "UPDATE namespaces SET fingerprint = 'b' || substr(fingerprint, 2)",
    ],
)
def test_absurd_values_are_damage_and_every_command_ends(tmp_path: Path, statement: str, capsys: pytest.CaptureFixture[str]) -> None:
    with FeatureStore(tmp_path) as store:
        store.write(A, rows("k"))
    change(store.path, statement)
    cache = ["--cache-dir", str(tmp_path)]
    codes = [main(["cache", *words, *cache]) for words in (["stats"], ["stats", "--json"], ["show", "k"], ["show", "k", "--json"])]
    assert codes == [0] * 4, capsys.readouterr().err
    assert main(["cache", "verify", *cache]) == (0 if "1e300" in statement else 1)
    assert main(["cache", "export", str(tmp_path / "out"), *cache]) in (0, 2)
    assert main(["cache", "merge", str(tmp_path), str(tmp_path / "other")]) in (0, 1)
