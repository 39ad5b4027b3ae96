"""The feature store under attack: killed writers, flipped bits, truncated files, odd keys, many processes."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import pickle
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from without_rights import run_without_rights

from vlmfilm_plugin.encoders.base import EncoderIdentity
from vlmfilm_plugin.errors import FeatureError, ImageReadError, StoreError
from vlmfilm_plugin.features.store.protocol import SourceStamp, StoredFeature
from vlmfilm_plugin.features.store.store import FeatureStore

A, B = EncoderIdentity({"encoder": "a", "model": "x"}), EncoderIdentity({"encoder": "a", "model": "y"})
FORK = multiprocessing.get_context("fork")


def _rows(*keys: str, width: int = 4, value: float = 1.0) -> list[StoredFeature]:
    return [StoredFeature(key, np.full(width, value, dtype=np.float32)) for key in keys]


def _raw(store: FeatureStore, statement: str, *values: object) -> list[tuple[Any, ...]]:
    with sqlite3.connect(store.path) as connection:
        rows = connection.execute(statement, values).fetchall()
    connection.close()
    return rows


def test_written_features_are_read_back_with_their_stamp(tmp_path: Path) -> None:
    feature = np.random.default_rng(0).standard_normal(64).astype(np.float32)
    stamp = SourceStamp(10, 1_700_000_000_123_456_789, "ab" * 16)
    with FeatureStore(tmp_path, "float32") as store:
        store.write(A, [StoredFeature("k", feature, stamp), *_rows("bare", width=64)])
        found = store.read(A, ["k", "bare", "absent", "k"])
    assert set(found) == {"k", "bare"}
    assert found["k"].stamp == stamp and found["bare"].stamp is None
    np.testing.assert_array_equal(found["k"].feature, feature)


def test_float16_rounds_and_reads_as_it_is_stored(tmp_path: Path) -> None:
    feature = np.random.default_rng(0).standard_normal(64).astype(np.float32)
    with FeatureStore(tmp_path) as store:
        store.write(A, [StoredFeature("k", feature)])
        found = store.read(A, ["k"])["k"].feature
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, feature.astype(np.float16))


def test_a_finer_row_serves_a_coarser_store_and_never_the_other_way_round(tmp_path: Path) -> None:
    with FeatureStore(tmp_path, "float16") as store:
        store.write(A, _rows("a"))
    with FeatureStore(tmp_path, "float32") as store:
        store.write(A, _rows("b"))
        assert set(store.read(A, ["a", "b"])) == {"b"}
    with FeatureStore(tmp_path, "float16") as store:
        assert set(store.read(A, ["a", "b"])) == {"a", "b"}


def test_identities_never_see_each_other(tmp_path: Path) -> None:
    with FeatureStore(tmp_path) as store:
        store.write(A, _rows("k", value=1))
        store.write(B, _rows("k", "l", value=2, width=7))
        assert store.read(A, ["k"])["k"].feature[0] == 1 and store.read(B, ["k"])["k"].feature.shape == (7,)
        assert (store.count(A), store.count(B), store.keys(B)) == (1, 2, ["k", "l"])
        assert store.read(EncoderIdentity({"encoder": "none"}), ["k"]) == {} and store.count(EncoderIdentity({})) == 0
        facts = json.loads(str(_raw(store, "SELECT facts FROM namespaces ORDER BY id")[0][0]))
    assert facts == dict(A.facts)


def test_writing_a_key_again_replaces_it(tmp_path: Path) -> None:
    with FeatureStore(tmp_path) as store:
        store.write(A, _rows("k", value=1))
        store.write(A, _rows("k", value=2))
        assert store.count(A) == 1 and store.read(A, ["k"])["k"].feature[0] == 2


def test_nothing_is_a_fine_thing_to_read_and_write(tmp_path: Path) -> None:
    with FeatureStore(tmp_path) as store:
        store.write(A, [])
        assert store.read(A, []) == {} and store.keys(A) == []


def test_more_keys_than_sqlite_takes_variables(tmp_path: Path) -> None:
    keys = [f"k{i}" for i in range(2500)]
    with FeatureStore(tmp_path) as store:
        store.write(A, _rows(*keys))
        assert set(store.read(A, keys)) == set(keys)
        assert store.keys(A) == sorted(keys)


ODD_KEYS = [
    "../../etc/passwd",
    "/abs",
    "a\nb",
    "nul\0byte",
    "ключ-血管",
    "x" * 10_000,
    " ",
    "'; DROP TABLE features; --",
    "%",
    "a\udcffb",
    "con",
    "é",
    "e\u0301",
]


def test_keys_are_text_of_any_kind_and_never_paths(tmp_path: Path) -> None:
    with FeatureStore(tmp_path / "store") as store:
        store.write(A, [StoredFeature(key, np.full(2, i, dtype=np.float32)) for i, key in enumerate(ODD_KEYS)])
        found = store.read(A, ODD_KEYS)
        assert [found[key].feature[0] for key in ODD_KEYS] == list(range(len(ODD_KEYS)))
        assert store.keys(A) == sorted(ODD_KEYS)
    assert {path.name.split("-")[0] for path in tmp_path.rglob("*")} == {"store", "features.sqlite"}


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(st.characters(), max_size=30), st.floats(-1000, 1000, width=16), max_size=20))
def test_any_text_is_a_key(tmp_path_factory: pytest.TempPathFactory, values: dict[str, float]) -> None:
    with FeatureStore(tmp_path_factory.mktemp("s")) as store:
        store.write(A, [StoredFeature(key, np.array([value])) for key, value in values.items()])
        assert {key: row.feature[0] for key, row in store.read(A, list(values)).items()} == values


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_feature_that_is_not_finite_is_refused_by_key_and_nothing_is_written(tmp_path: Path, bad: float) -> None:
    with FeatureStore(tmp_path) as store:
        with pytest.raises(FeatureError, match="'bad'"):
            store.write(A, [*_rows("good"), *_rows("bad", value=bad)])
        assert store.count(A) == 0


def test_float16_overflow_is_refused_and_float32_holds_it(tmp_path: Path) -> None:
    with FeatureStore(tmp_path) as store, pytest.raises(FeatureError, match="'big'") as caught:
        store.write(A, _rows("big", value=70000))
    assert caught.value.fix and "float32" in caught.value.fix
    with FeatureStore(tmp_path, "float32") as store:
        store.write(A, _rows("big", value=70000))


def test_mixed_widths_are_refused_in_one_write_and_across_writes(tmp_path: Path) -> None:
    with FeatureStore(tmp_path) as store:
        with pytest.raises(FeatureError, match="'b'"):
            store.write(A, [*_rows("a", width=4), *_rows("b", width=5)])
        assert store.count(A) == 0
        store.write(A, _rows("a", width=4))
        with pytest.raises(FeatureError, match=r"'c'[\s\S]*\(5,\)[\s\S]*\(4,\)"):
            store.write(A, _rows("c", width=5))
        assert store.keys(A) == ["a"]


@pytest.mark.parametrize("shape", [(2, 3), (), (0,)])
def test_a_feature_of_another_shape_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with FeatureStore(tmp_path) as store, pytest.raises(FeatureError, match="shape"):
        store.write(A, [StoredFeature("k", np.zeros(shape))])


@pytest.mark.parametrize(
    "damage",
    [
        *("data = zeroblob(8)", "data = x'00'", "data = 'text'", "dtype = 'float99'", "dtype = 'float32'", "dtype = 2"),
        *("width = 3", "width = 'many'", "checksum = checksum + 1", "note = x'00'"),
    ],
)
def test_a_damaged_row_is_left_out_with_a_warning_and_can_be_written_again(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    with FeatureStore(tmp_path) as store:
        store.write(A, _rows("good", "bad"))
        _raw(store, f"UPDATE features SET {damage} WHERE key = ?", b"bad")
        with caplog.at_level(logging.WARNING, "vlmfilm.store"):
            assert set(store.read(A, ["good", "bad"])) == {"good"}
        assert "'bad'" in caplog.text and str(store.path) in caplog.text
        store.write(A, _rows("bad", value=3))
        assert store.read(A, ["bad"])["bad"].feature[0] == 3


def test_every_flipped_bit_of_a_row_is_seen(tmp_path: Path) -> None:
    with FeatureStore(tmp_path) as store:
        store.write(A, _rows("k"))
        data = bytearray(_raw(store, "SELECT data FROM features")[0][0])
        for bit in range(len(data) * 8):
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << bit % 8
            _raw(store, "UPDATE features SET data = ?", bytes(flipped))
            assert store.read(A, ["k"]) == {}


def test_two_rows_with_swapped_data_are_both_left_out(tmp_path: Path) -> None:
    with FeatureStore(tmp_path) as store:
        store.write(A, [*_rows("a", value=1), *_rows("b", value=2)])
        columns = "data, checksum"
        first, second = (_raw(store, f"SELECT {columns} FROM features WHERE key = ?", key)[0] for key in (b"a", b"b"))
        for values, key in ((first, b"b"), (second, b"a")):
            _raw(store, "UPDATE features SET data = ?, checksum = ? WHERE key = ?", *values, key)
        assert store.read(A, ["a", "b"]) == {}


def test_a_parent_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="cannot make the folder") as caught:
        FeatureStore(tmp_path / "file" / "cache")
    assert str(tmp_path / "file") in str(caught.value) and caught.value.fix


def test_a_folder_in_place_of_the_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "features.sqlite").mkdir()
    with pytest.raises(StoreError, match="unable to open") as caught:
        FeatureStore(tmp_path)
    assert caught.value.facts["file"] == tmp_path / "features.sqlite"


def test_a_folder_without_permission_is_named(tmp_path: Path) -> None:
    def refused() -> str:
        with pytest.raises(StoreError, match="unable to open") as caught:
            FeatureStore(tmp_path)
        return str(caught.value.fix)

    tmp_path.chmod(0o500)
    try:
        assert "can write" in run_without_rights(refused)
    finally:
        tmp_path.chmod(0o700)


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "features.sqlite").write_text("not a database at all " * 100)
    with pytest.raises(StoreError, match="not a database") as caught:
        FeatureStore(tmp_path)
    assert caught.value.fix and "delete" in caught.value.fix
    assert (tmp_path / "features.sqlite").read_text().startswith("not a"), "somebody's file was overwritten"


@pytest.mark.parametrize("keep", [0.5, 0.9, 0.02])
def test_a_truncated_file_is_a_store_error_or_reads_only_what_is_whole(tmp_path: Path, keep: float) -> None:
    with FeatureStore(tmp_path, "float32") as store:
        store.write(A, [StoredFeature(f"k{i}", np.full(256, i, dtype=np.float32)) for i in range(200)])
    size = store.path.stat().st_size
    os.truncate(store.path, int(size * keep))
    with pytest.raises(StoreError) as caught, FeatureStore(tmp_path) as again:
        again.read(A, [f"k{i}" for i in range(200)])
    assert str(store.path) in str(caught.value) and "SQLite said" in caught.value.facts


def test_a_newer_schema_is_refused_and_left_alone(tmp_path: Path) -> None:
    with FeatureStore(tmp_path) as store:
        _raw(store, "PRAGMA user_version = 99")
    with pytest.raises(StoreError, match="version 99") as caught:
        FeatureStore(tmp_path)
    assert caught.value.fix and "upgrade" in caught.value.fix
    assert _raw(store, "PRAGMA user_version") == [(99,)]


def test_a_migration_that_fails_leaves_no_half_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlmfilm_plugin.features.store import schema

    monkeypatch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, ("CREATE TABLE extra (x)", "CREATE TABLE broken (")))
    monkeypatch.setattr(schema, "VERSION", schema.VERSION + 1)
    with pytest.raises(StoreError):
        FeatureStore(tmp_path)
    monkeypatch.undo()
    with FeatureStore(tmp_path) as store:
        assert _raw(store, "PRAGMA user_version") == [(5,)]
        assert _raw(store, "SELECT count(*) FROM sqlite_master WHERE name = 'extra'") == [(0,)]


def test_a_full_disk_is_an_error_and_the_transaction_leaves_nothing(tmp_path: Path) -> None:
    with FeatureStore(tmp_path, "float32") as store:
        store.write(A, _rows("before", width=2000))
        with store._file.use("read") as connection:
            connection.execute("PRAGMA max_page_count = 8")
        with pytest.raises(StoreError, match="full") as caught:
            store.write(A, _rows(*(f"k{i}" for i in range(100)), width=2000))
        assert caught.value.fix and "space" in caught.value.fix
        assert store.keys(A) == ["before"]


def test_a_lock_held_too_long_is_an_error(tmp_path: Path) -> None:
    with FeatureStore(tmp_path, timeout_s=0.2) as store:
        blocker = sqlite3.connect(store.path, isolation_level=None)
        blocker.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="locked") as caught:
            store.write(A, _rows("k"))
        assert caught.value.fix and "process" in caught.value.fix
        assert store.read(A, ["k"]) == {}, "a writer blocks no reader"
        blocker.execute("ROLLBACK")
        blocker.close()
        store.write(A, _rows("k"))


def test_a_closed_store_says_so_and_closes_twice(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    store.close()
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.read(A, ["k"])


def test_unknown_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="int8"):
        FeatureStore(tmp_path, "int8")


WRITER = """
import sys, numpy as np
from vlmfilm_plugin.encoders.base import EncoderIdentity
from vlmfilm_plugin.features.store.protocol import StoredFeature
from vlmfilm_plugin.features.store.store import FeatureStore
store, identity = FeatureStore(sys.argv[1], "float32"), EncoderIdentity({"encoder": "a", "model": "x"})
for batch in range(int(sys.argv[3])):
    store.write(identity, [StoredFeature(f"{sys.argv[2]}-{batch:05d}-{i}", np.full(512, batch, np.float32)) for i in range(16)])
    print(batch, flush=True)
"""


def _writer(folder: Path, name: str, batches: int) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", WRITER, str(folder), name, str(batches)], stdout=subprocess.PIPE, text=True)


def test_a_killed_writer_leaves_whole_transactions_only(tmp_path: Path) -> None:
    for attempt in range(3):
        process = _writer(tmp_path, f"w{attempt}", 100_000)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.1 + 0.07 * attempt)
        process.send_signal(signal.SIGKILL)
        reported = process.stdout.read().split()
        process.wait()
        with FeatureStore(tmp_path) as store:
            mine = [key for key in store.keys(A) if key.startswith(f"w{attempt}")]
            assert len(mine) % 16 == 0 and len(mine) >= 16 * len(reported[:-1])
            assert len(store.read(A, mine)) == len(mine)
            store.write(A, [StoredFeature("after", np.zeros(512))])


def test_two_writing_processes_lose_nothing(tmp_path: Path) -> None:
    processes = [_writer(tmp_path, name, 60) for name in ("p", "q")]
    for process in processes:
        process.communicate(timeout=120)
    assert [process.returncode for process in processes] == [0, 0]
    with FeatureStore(tmp_path) as store:
        assert store.count(A) == 2 * 60 * 16


def _open_and_write(folder: str, name: str) -> None:
    with FeatureStore(folder) as store:
        store.write(A, _rows(name))


def test_many_processes_may_make_the_file_at_once(tmp_path: Path) -> None:
    processes = [FORK.Process(target=_open_and_write, args=(str(tmp_path / "new"), f"p{i}")) for i in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 6
    with FeatureStore(tmp_path / "new") as store:
        assert store.count(A) == 6


def _use_inherited(store: FeatureStore, name: str) -> None:
    assert store.read(A, ["parent"])
    store.write(A, _rows(name))
    store.close()


def test_a_store_opened_before_fork_works_in_child_and_parent(tmp_path: Path) -> None:
    with FeatureStore(tmp_path) as store:
        store.write(A, _rows("parent"))
        children = [FORK.Process(target=_use_inherited, args=(store, f"c{i}")) for i in range(3)]
        for child in children:
            child.start()
        store.write(A, _rows("meanwhile"))
        for child in children:
            child.join(60)
        assert [child.exitcode for child in children] == [0, 0, 0]
        assert store.keys(A) == ["c0", "c1", "c2", "meanwhile", "parent"]
        assert _raw(store, "PRAGMA integrity_check") == [("ok",)]


def test_threads_share_a_store(tmp_path: Path) -> None:
    failures: list[BaseException] = []

    def work(name: str) -> None:
        try:
            for i in range(30):
                store.write(A, _rows(f"{name}{i}"))
                assert store.read(A, [f"{name}{i}"])
        except BaseException as error:
            failures.append(error)

    with FeatureStore(tmp_path) as store:
        threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures and store.count(A) == 120


def test_a_pickled_store_opens_the_same_file(tmp_path: Path) -> None:
    with FeatureStore(tmp_path, "float32") as store:
        store.write(A, _rows("k"))
        with pickle.loads(pickle.dumps(store)) as other:
            assert other.keys(A) == ["k"] and other.embedding_dtype == "float32"


def test_stamp_follows_content_and_time(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"one")
    first = SourceStamp.of(path)
    assert first == SourceStamp.of(str(path)) and first.size == 3
    path.write_bytes(b"two")
    os.utime(path, ns=(first.mtime_ns, first.mtime_ns))
    assert SourceStamp.of(path).digest != first.digest and SourceStamp.of(path).mtime_ns == first.mtime_ns
    with pytest.raises(ImageReadError, match=r"no\.png"):
        SourceStamp.of(tmp_path / "no.png")


def test_reading_a_batch_is_fast(tmp_path: Path) -> None:
    keys = [f"train:images/{i:04d}.png" for i in range(500)]
    rng = np.random.default_rng(0)
    with FeatureStore(tmp_path) as store:
        store.write(A, [StoredFeature(key, rng.standard_normal(2048)) for key in keys])
        times = []
        for i in range(200):
            start = time.perf_counter()
            store.read(A, keys[i : i + 8])
            times.append(time.perf_counter() - start)
    # Generous for a busy machine; about 0.1 ms when it is idle.
    assert np.median(times) < 1e-3


def test_importing_it_imports_no_torch() -> None:
    code = "import sys, vlmfilm_plugin.features.store.store; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
