"""Where a store lies and who else uses it: readers without rights, copies, killed writers, no locks, no shared memory, and its state at rest."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
from denied_locks import deny_locks
from processes import forked_worker
from without_rights import run_without_rights

from vlmfilm_plugin.encoders.base import EncoderIdentity
from vlmfilm_plugin.errors import StoreError
from vlmfilm_plugin.features.store import file_systems
from vlmfilm_plugin.features.store.admin import opened, prune, verify
from vlmfilm_plugin.features.store.protocol import StoredFeature
from vlmfilm_plugin.features.store.store import FeatureStore

A, B = EncoderIdentity({"encoder": "a", "model": "x"}), EncoderIdentity({"encoder": "b", "model": "y"})


def rows(*keys: str, value: float = 1.0) -> list[StoredFeature]:
    return [StoredFeature(key, np.full(64, value, dtype=np.float32)) for key in keys]


def keys(folder: Path, identity: EncoderIdentity = A) -> list[str]:
    with FeatureStore(folder, timeout_s=5.0) as store:
        found = store.keys(identity)
        assert set(store.read(identity, found)) == set(found)
        return found


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Let nobody without the rights of root write in a folder or to its files."""
    for path in folder.iterdir():
        path.chmod(0o400)
    folder.chmod(0o500)
    try:
        yield
    finally:
        folder.chmod(0o700)
        for path in folder.iterdir():
            path.chmod(0o600)


def write_when_told(orders: Connection, folder: Path) -> None:
    """Write a feature for each key that is sent; prune encoder A and write for B when told so."""
    with FeatureStore(folder) as store:
        while (order := orders.recv()) is not None:
            if order == "prune":
                with opened(folder) as file:
                    prune(file, drop=[A.fingerprint])
                store.write(B, rows("k0", value=2.0))
            else:
                store.write(A, rows(order))
            orders.send("done")


def tell(writer: Connection, order: str) -> None:
    writer.send(order)
    assert writer.recv() == "done"


# Readers that cannot write


def read_while_another_writes(folder: Path, writer: Connection) -> list[int]:
    seen = []
    with FeatureStore(folder) as store:
        for number in range(4):
            seen.append(len(store.keys(A)))
            tell(writer, f"k{number}")
        tell(writer, "prune")
        assert store.read(A, ["k0"]) == {}, "another encoder's feature, or one that is gone"
        assert store.read(B, ["k0"])["k0"].feature[0] == 2.0
        with pytest.raises(StoreError, match="cannot write"):
            store.write(A, rows("mine"))
    return seen


def test_a_reader_without_rights_sees_what_another_process_commits_and_never_another_encoders_rows(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    with FeatureStore(folder) as store:
        store.write(A, rows("old"))
    with forked_worker(write_when_told, folder) as (_, writer), locked_folder(folder):
        assert run_without_rights(read_while_another_writes, folder, writer) == [1, 2, 3, 4]


def killed(folder: Path, count: int) -> None:
    """Leave the files of a writer that was killed: everything is in its log."""
    with forked_worker(write_when_told, folder) as (child, writer):
        for number in range(count):
            tell(writer, f"k{number}")
        os.kill(child.pid, signal.SIGKILL)
        child.join()
    assert (folder / "features.sqlite-wal").stat().st_size > 0


@pytest.mark.parametrize("suffixes", [("", "-wal"), ("", "-wal", "-shm")])
def test_a_copy_with_its_log_is_read_whole_with_and_without_rights(tmp_path: Path, suffixes: tuple[str, ...]) -> None:
    folder, copied = tmp_path / "s", tmp_path / "copy"
    killed(folder, 20)
    copied.mkdir()
    for suffix in suffixes:
        shutil.copy(folder / f"features.sqlite{suffix}", copied)
    before = {path.name: path.read_bytes() for path in copied.iterdir() if not path.name.endswith("-shm")}
    with locked_folder(copied):
        assert len(run_without_rights(keys, copied)) == 20
    assert {path.name: path.read_bytes() for path in copied.iterdir() if not path.name.endswith("-shm")} == before
    assert len(keys(copied)) == 20 and [path.name for path in copied.iterdir()] == ["features.sqlite"]


def read_twice(folder: Path, writer: Connection) -> list[int]:
    with FeatureStore(folder) as store:
        before = len(store.keys(A))
        tell(writer, "later")
        return [before, len(store.keys(A))]


def test_a_reader_of_a_private_copy_sees_later_rows(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    killed(folder, 3)
    (folder / "features.sqlite-shm").unlink()

    def write_late(orders: Connection, folder: Path) -> None:
        order = orders.recv()
        with FeatureStore(folder) as store:
            store.write(A, rows(order))
        orders.send("done")

    with forked_worker(write_late, folder) as (_, writer), locked_folder(folder):
        assert run_without_rights(read_twice, folder, writer) == [3, 4]


def test_a_log_without_its_file_is_refused_and_kept(tmp_path: Path) -> None:
    killed(tmp_path / "s", 3)
    (tmp_path / "alone").mkdir()
    log = Path(shutil.copy(tmp_path / "s" / "features.sqlite-wal", tmp_path / "alone"))
    before = log.read_bytes()
    with pytest.raises(StoreError, match="main file is gone"):
        FeatureStore(tmp_path / "alone")
    assert log.read_bytes() == before and os.listdir(log.parent) == [log.name]


# Somebody else's files

FOREIGN = {
    "plain": ("CREATE TABLE patients (name TEXT)",),
    "its own id": ("PRAGMA application_id = 77", "CREATE TABLE patients (name TEXT)"),
    "an id and no table": ("PRAGMA application_id = 77",),
    "a version and no table": ("PRAGMA user_version = 5",),
    "our version": ("CREATE TABLE patients (name TEXT)", "PRAGMA user_version = 5"),
    "our names": ("CREATE TABLE namespaces (id)", "CREATE TABLE features (namespace)", "PRAGMA user_version = 2"),
    "our id": ("CREATE TABLE patients (name TEXT)", "PRAGMA user_version = 5", f"PRAGMA application_id = {0x564C_4D46}"),
}


@pytest.mark.parametrize("mode", ["DELETE", "WAL", "WAL with a log", "in use"])
@pytest.mark.parametrize("statements", FOREIGN.values(), ids=FOREIGN)
def test_not_a_byte_of_somebodys_database_changes(tmp_path: Path, statements: tuple[str, ...], mode: str) -> None:
    folder, made = tmp_path / "s", tmp_path / "made"
    folder.mkdir()
    made.mkdir()
    connection = sqlite3.connect((folder if mode == "in use" else made) / "features.sqlite", isolation_level=None)
    if mode != "DELETE":
        connection.execute("PRAGMA journal_mode = WAL")
    for statement in statements:
        connection.execute(statement)
    if mode in ("WAL with a log", "in use"):
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.execute("CREATE TABLE later (x)")
    if mode == "WAL with a log":
        for path in made.iterdir():
            if not path.name.endswith("-shm"):
                shutil.copy(path, folder)
    if mode != "in use":
        connection.close()
    if mode in ("DELETE", "WAL"):
        shutil.copy(made / "features.sqlite", folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for _ in range(2):
        with pytest.raises(StoreError) as caught:
            FeatureStore(folder, timeout_s=1.0)
        assert str(folder / "features.sqlite") in str(caught.value)
    is_ours = "our id" in statements or any(str(0x564C_4D46) in statement for statement in statements)
    if not (is_ours and "log" in mode) and not (is_ours and mode == "in use"):
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    connection.close()


def test_a_trigger_that_is_added_while_a_process_has_the_store_open_does_not_run(tmp_path: Path) -> None:
    with FeatureStore(tmp_path) as store:
        store.write(A, rows("k0"))
        with sqlite3.connect(store.path) as other:
            other.execute("CREATE TRIGGER evil AFTER INSERT ON features BEGIN UPDATE features SET data = zeroblob(128); END")
        with pytest.raises(StoreError, match="was changed"):
            store.write(A, rows("k1"))
        with sqlite3.connect(store.path) as other:
            other.execute("DROP TRIGGER evil")
        store.write(A, rows("k1"))
        assert store.read(A, ["k0", "k1"])["k0"].feature[0] == 1.0


def test_pages_that_lead_in_circles_end_in_an_error(tmp_path: Path) -> None:
    with FeatureStore(tmp_path) as store:
        store.write(A, rows(*(f"k{number}" for number in range(4000))))
    with sqlite3.connect(store.path) as connection:
        ((root,),) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'features' AND type = 'table'").fetchall()
        ((size,),) = connection.execute("PRAGMA page_size").fetchall()
    connection.close()
    content = bytearray(store.path.read_bytes())
    page = (root - 1) * size
    assert content[page] == 5, "an interior page of a table"
    cells = int.from_bytes(content[page + 3 : page + 5], "big")
    first = content[page + 12 : page + 14]
    for cell in range(cells):  # every child is the first one
        content[page + 12 + 2 * cell : page + 14 + 2 * cell] = first
    store.path.write_bytes(content)
    started = time.monotonic()
    with opened(tmp_path) as file:
        assert not verify(file).is_sound
    assert time.monotonic() - started < 30


# At rest: one file

SCRIPT = """
import os, sys
import numpy as np
from vlmfilm_plugin.encoders.base import EncoderIdentity
from vlmfilm_plugin.features.store.protocol import StoredFeature
from vlmfilm_plugin.features.store.store import FeatureStore

def write(folder):
    store = FeatureStore(folder)
    store.write(EncoderIdentity({"encoder": "a", "model": "x"}), [StoredFeature(f"k{i}", np.ones(64)) for i in range(30)])
    assert os.path.getsize(store.path.with_name("features.sqlite-wal")) > 0
    return store

folder, how = sys.argv[1:]
if how == "child":
    import multiprocessing
    child = multiprocessing.get_context("fork").Process(target=write, args=(folder,))
    child.start()
    child.join()
    sys.exit(child.exitcode)
kept = write(folder)
if how == "error":
    raise RuntimeError("after the write")
if how == "exit":
    sys.exit(3)
"""


@pytest.mark.parametrize(("how", "code"), [("end", 0), ("error", 1), ("exit", 3), ("child", 0)])
def test_every_end_of_a_process_that_wrote_leaves_one_file(tmp_path: Path, how: str, code: int) -> None:
    ended = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path / "s"), how], capture_output=True, text=True, check=False)
    assert ended.returncode == code, ended.stderr
    assert os.listdir(tmp_path / "s") == ["features.sqlite"]
    (tmp_path / "copy").mkdir()
    shutil.copy(tmp_path / "s" / "features.sqlite", tmp_path / "copy")
    assert len(keys(tmp_path / "copy")) == 30


def test_a_store_that_is_only_read_is_not_written(tmp_path: Path) -> None:
    with FeatureStore(tmp_path) as store:
        store.write(A, rows("k"))
    before, times = store.path.read_bytes(), store.path.stat().st_mtime_ns
    for _ in range(2):
        assert keys(tmp_path) == ["k"]
    assert store.path.read_bytes() == before and store.path.stat().st_mtime_ns == times


def test_the_last_of_several_processes_leaves_one_file(tmp_path: Path) -> None:
    with forked_worker(write_when_told, tmp_path) as (child, writer):
        tell(writer, "theirs")
        with FeatureStore(tmp_path) as store:
            store.write(A, rows("mine"))
        tell(writer, "more")
        writer.send(None)
        child.join(30)
    assert keys(tmp_path) == ["mine", "more", "theirs"] and os.listdir(tmp_path) == ["features.sqlite"]


def test_a_second_store_of_one_process_ends_no_lock_of_the_first(tmp_path: Path) -> None:
    def try_to_write(orders: Connection, folder: Path) -> None:
        try:
            with FeatureStore(folder, timeout_s=0.3) as store:
                store.write(A, rows("theirs"))
            orders.send("wrote")
        except StoreError as error:
            orders.send(str(error))

    with FeatureStore(tmp_path) as store:
        store.write(A, rows("mine"))
        with store._file.writing("write"):
            with FeatureStore(tmp_path) as other:  # opening and closing another handle of a file ends all POSIX locks of a process
                assert other.keys(A) == ["mine"]
            with forked_worker(try_to_write, tmp_path) as (_, said):
                assert "locked" in said.recv()


# File systems


def without_locks(reports: Connection, folder: Path) -> None:
    if not deny_locks():
        reports.send(None)
        return
    said: list[object] = []
    started = time.monotonic()
    for work in (lambda: keys(folder), lambda: FeatureStore(folder).write(A, rows("new")), lambda: FeatureStore(folder / "new")):
        try:
            said.append(work())  # type: ignore[no-untyped-call]
        except StoreError as error:
            said.append(str(error))
    reports.send((said, time.monotonic() - started))


def test_a_file_system_without_locks_is_named_at_once_and_can_be_read(tmp_path: Path) -> None:
    with FeatureStore(tmp_path) as store:
        store.write(A, rows("k"))
    with forked_worker(without_locks, tmp_path) as (_, reports):
        result = reports.recv()
    if result is None:
        pytest.skip("locks cannot be denied here")
    (found, written, made), seconds = result
    assert found == ["k"] and seconds < 10
    assert "grants no locks" in written and "local" not in found
    assert "grants no locks" in made and os.strerror(37) in made and "another process" not in written + made and "cache_dir" in made


def lose_locks(reports: Connection, folder: Path) -> None:
    store = FeatureStore(folder, timeout_s=0.5)
    store.write(A, rows("before"))
    if not deny_locks():
        reports.send(None)
        return
    try:
        store.write(A, rows("after"))
        reports.send("wrote")
    except StoreError as error:
        reports.send(str(error))


def test_locks_that_are_gone_while_a_process_runs_are_named(tmp_path: Path) -> None:
    with forked_worker(lose_locks, tmp_path) as (_, reports):
        said = reports.recv()
    if said is None:
        pytest.skip("locks cannot be denied here")
    assert "grants no locks" in said and "other process" not in said


@pytest.fixture
def on_nfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have the system say that a folder is on NFS: there is none here to test on; everything after that word is real."""
    mounts = tmp_path / "mountinfo"
    folder = tmp_path / "s"
    mounts.write_text(
        f"21 1 8:1 / / rw - ext4 /dev/sda rw\n35 21 0:40 / {folder} rw shared:1 - nfs4 server:/x rw\n36 21 0:41 / {folder}er rw - tmpfs x rw\n"
    )
    monkeypatch.setattr(file_systems, "_MOUNTS", mounts)
    assert (file_systems.type_of(folder), file_systems.type_of(tmp_path)) == ("nfs4", "ext4")
    assert file_systems.type_of(Path(f"{folder}er")) == "tmpfs"
    return folder


def test_a_network_file_system_has_no_log_that_other_machines_do_not_see(on_nfs: Path) -> None:
    with FeatureStore(on_nfs) as store:
        store.write(A, rows("k"))
        assert os.listdir(on_nfs) == ["features.sqlite"]
        with forked_worker(write_when_told, on_nfs) as (_, writer):
            tell(writer, "theirs")
        assert store.keys(A) == ["k", "theirs"]


def test_a_store_that_was_left_in_wal_mode_is_brought_back_on_a_network_file_system(on_nfs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as local:
        local.setattr(file_systems, "_MOUNTS", Path("/no such file"))
        killed(on_nfs, 5)
    (on_nfs / "features.sqlite-shm").unlink()
    assert len(keys(on_nfs)) == 5 and os.listdir(on_nfs) == ["features.sqlite"]


def test_two_machines_at_once_are_refused_where_one_has_a_log_open(on_nfs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as local:
        local.setattr(file_systems, "_MOUNTS", Path("/no such file"))
        writer = forked_worker(write_when_told, on_nfs)
        _, orders = writer.__enter__()
        tell(orders, "k")
    with pytest.raises(StoreError, match="two machines at once"):
        FeatureStore(on_nfs, timeout_s=0.5)
    tell(orders, "more")
    writer.__exit__(None, None, None)


def test_without_shared_memory_there_is_no_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(19, "No such device")  # what mmap answers there; no such file system can be mounted by a test

    monkeypatch.setattr(file_systems.mmap, "mmap", refuse)
    with FeatureStore(tmp_path) as store:
        store.write(A, rows("k"))
        assert os.listdir(tmp_path) == ["features.sqlite"]
