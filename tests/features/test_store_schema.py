"""Whose file it is: a store of ours with exactly its tables, or nothing; and whose rows: right under their own encoder's name alone."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from without_rights import run_without_rights

from vlmfilm_plugin.cli import main
from vlmfilm_plugin.encoders.base import EncoderIdentity
from vlmfilm_plugin.errors import StoreError
from vlmfilm_plugin.features.store import schema
from vlmfilm_plugin.features.store.admin import opened, verify
from vlmfilm_plugin.features.store.protocol import StoredFeature
from vlmfilm_plugin.features.store.rows import bound, checksum_of_first_version
from vlmfilm_plugin.features.store.sqlite_file import StoreFile
from vlmfilm_plugin.features.store.store import FeatureStore

A, B = EncoderIdentity({"encoder": "a", "model": "x"}), EncoderIdentity({"encoder": "a", "model": "y"})


def rows(*keys: str, value: float = 1.0) -> list[StoredFeature]:
    return [StoredFeature(key, np.full(4, value, dtype=np.float32)) for key in keys]


def change(path: Path, *statements: str) -> None:
    with sqlite3.connect(path) as connection:
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


def older(folder: Path, version: int) -> Path:
    """Make a store of an older schema with rows of two encoders, as that version wrote them."""
    folder.mkdir()
    path = folder / "features.sqlite"
    connection = sqlite3.connect(path, isolation_level=None)
    connection.create_function("vlmfilm_bound", 2, bound)
    for statement in (statement for statements in schema.MIGRATIONS[:version] for statement in statements):
        connection.execute(statement)
    columns = "namespace, key, dtype, width, data, checksum, created" + (", source_digest" if version >= 3 else "")
    for number, (identity, key) in enumerate([(A, "a"), (A, "b"), (B, "a")]):
        facts = json.dumps(dict(identity.facts), sort_keys=True)
        connection.execute("INSERT OR IGNORE INTO namespaces (fingerprint, facts, created) VALUES (?, ?, 1.0)", (identity.fingerprint, facts))
        ((owner,),) = connection.execute("SELECT id FROM namespaces WHERE fingerprint = ?", (identity.fingerprint,)).fetchall()
        data = np.full(4, number, np.float16).tobytes()
        old = checksum_of_first_version(key.encode(), data, None)
        values = [owner, key.encode(), "float16", 4, data, bound(old, identity.fingerprint) if version >= 4 else old, 1.0]
        values += [""] if version >= 3 else []
        connection.execute(f"INSERT INTO features ({columns}) VALUES ({', '.join('?' * len(values))})", values)
    connection.execute(f"PRAGMA user_version = {version}")
    connection.close()
    return path


def read_all(folder: Path) -> dict[str, float]:
    with FeatureStore(folder) as store:
        return {f"{name}/{key}": float(row.feature[0]) for name, x in (("A", A), ("B", B)) for key, row in store.read(x, ["a", "b"]).items()}


@pytest.mark.parametrize("version", [1, 2, 3, 4])
@pytest.mark.parametrize("mode", ["DELETE", "WAL"])
def test_a_store_of_every_older_schema_is_brought_up_to_date_and_read_where_nothing_can_be_written(tmp_path: Path, version: int, mode: str) -> None:
    path, expected = older(tmp_path / "s", version), {"A/a": 0.0, "A/b": 1.0, "B/a": 2.0}
    change(path, f"PRAGMA journal_mode = {mode}")
    before = path.read_bytes()
    path.chmod(0o400)
    path.parent.chmod(0o500)
    try:
        assert run_without_rights(read_all, path.parent) == expected
    finally:
        path.parent.chmod(0o700)
        path.chmod(0o600)
    assert path.read_bytes() == before and [file.name for file in path.parent.iterdir()] == [path.name]
    for _ in range(2):
        assert read_all(path.parent) == expected
    with opened(path.parent) as file:
        assert verify(file).is_sound
        with file.use("read") as connection:
            assert connection.execute("PRAGMA application_id").fetchone() == (schema.APPLICATION_ID,)


def test_the_way_to_todays_schema_makes_no_difference() -> None:
    found = []
    for start in range(schema.VERSION + 1):
        connection = sqlite3.connect(":memory:", isolation_level=None)
        connection.create_function("vlmfilm_bound", 2, bound)
        connection.create_function("vlmfilm_checksum", -1, lambda *values: 0)
        for statement in (statement for statements in schema.MIGRATIONS[:start] for statement in statements):
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {start}")
        schema.migrate(connection, start)
        assert schema.look(connection) == (schema.VERSION, "")
        found.append([connection.execute(f"SELECT * FROM pragma_{table}('features')").fetchall() for table in ("table_info", "index_list")])
        connection.close()
    assert all(columns == found[0] for columns in found)


def test_a_row_that_was_damaged_before_stays_damaged(tmp_path: Path) -> None:
    path = older(tmp_path / "s", 2)
    change(path, "UPDATE features SET data = zeroblob(8) WHERE namespace = 1 AND key = x'62'")
    assert read_all(path.parent) == {"A/a": 0.0, "B/a": 2.0}


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
    assert main(["cache", "verify", *cache]) == 1
    assert main(["cache", "export", str(tmp_path / "out"), *cache]) in (0, 2)
    assert main(["cache", "merge", str(tmp_path), str(tmp_path / "other")]) in (0, 1)
