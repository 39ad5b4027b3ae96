"""The feature store and warm-up under faults, with real processes: kills at random moments, a full disk, damage, crowds, odd keys."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from processes import forked_worker

from vlmfilm_plugin.encoders.base import EncoderIdentity
from vlmfilm_plugin.encoders.descriptor import DescriptorEncoder
from vlmfilm_plugin.errors import StoreError
from vlmfilm_plugin.features import encoding
from vlmfilm_plugin.features.store.admin import opened, verify
from vlmfilm_plugin.features.store.protocol import StoredFeature
from vlmfilm_plugin.features.store.store import FeatureStore
from vlmfilm_plugin.warmup.encode import warm_up

IDENTITY = EncoderIdentity({"encoder": "faults", "model": "x"})
FORK = multiprocessing.get_context("fork")
BATCH = 16
KILLS = 10  # of each kind


def feature_of(number: int, width: int = 64) -> np.ndarray[Any, Any]:
    return np.random.default_rng(number).standard_normal(width).astype(np.float16).astype(np.float32)


def assert_whole(folder: Path) -> None:
    with opened(folder) as file:
        found = verify(file)
    assert found.is_sound, (found.damaged[:3], found.problems)


def kill_after(process: Any, reports: Any, moments: random.Random) -> list[Any]:
    """Wait for a few reports, then for a part of the time that lay between two; kill -9; return every report that was sent.

    So the moment falls anywhere in the work, however fast the machine is.
    """
    said, came = [reports.recv()], [time.monotonic()]
    for _ in range(moments.randrange(1, 5)):
        try:
            said.append(reports.recv())
        except EOFError:  # it has done all it had to
            return said
        came.append(time.monotonic())
    time.sleep(moments.uniform(0, 1.5) * (came[-1] - came[0]) / (len(came) - 1))
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    try:
        while True:
            said.append(reports.recv())
    except EOFError:
        return said


def write_as_training_does(reports: Any, folder: str, run: int) -> None:
    with FeatureStore(folder) as store:
        for step in range(100_000):
            keys = [f"{run}/{step}/{row}" for row in range(1 + step % 8)]
            store.write(IDENTITY, [StoredFeature(key, feature_of(step), None, "a note") for key in keys])
            reports.send(keys)
            store.read(IDENTITY, keys)


def test_a_training_killed_at_random_moments_loses_nothing_that_was_committed(tmp_path: Path) -> None:
    moments = random.Random(0)
    committed: list[str] = []
    for run in range(KILLS):
        with forked_worker(write_as_training_does, str(tmp_path), run) as (process, reports):
            said = kill_after(process, reports, moments)
        committed += [key for keys in said for key in keys]
        with FeatureStore(tmp_path) as store:
            assert set(committed) <= set(store.keys(IDENTITY))
            # The step that was being written is there as a whole, or not at all.
            last = len([key for key in store.keys(IDENTITY) if key.startswith(f"{run}/{len(said)}/")])
            assert last in (0, 1 + len(said) % 8)
        assert_whole(tmp_path)
    with FeatureStore(tmp_path) as store:
        for key, row in store.read(IDENTITY, committed).items():
            np.testing.assert_array_equal(row.feature, feature_of(int(key.split("/")[1])))


def warm_up_and_report(reports: Any, images: str, folder: str) -> None:
    encode = DescriptorEncoder.encode

    def reported(self: DescriptorEncoder, pictures: Sequence[Any]) -> Any:
        reports.send(len(pictures))  # everything before this call is committed
        return encode(self, pictures)

    DescriptorEncoder.encode = reported  # type: ignore[method-assign]
    encoding.prove_deterministic = lambda *_: None  # its calls are of no batch
    warm_up(images, (), {"encoder": "descriptor", "cache_dir": folder}, batch_size=BATCH, readers=2, show_progress=False)


def test_a_warm_up_killed_at_random_moments_loses_one_batch_and_goes_on(tmp_path: Path) -> None:
    images, folder, moments = tmp_path / "imgs", tmp_path / "cache", random.Random(1)
    images.mkdir()
    for number in range(800):
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 8), dtype=np.uint8)).save(images / f"{number}.png")
    identity, stored = DescriptorEncoder().identity, 0
    for _ in range(KILLS):
        with forked_worker(warm_up_and_report, str(images), str(folder)) as (process, reports):
            said = kill_after(process, reports, moments)
        with FeatureStore(folder) as store:
            now = store.count(identity)
        assert now - stored >= sum(said[:-1]), "more than the batch in hand was lost"
        assert (now - stored) % BATCH == 0 or now == 800
        stored = now
        assert_whole(folder)
    report = warm_up(images, (), {"encoder": "descriptor", "cache_dir": str(folder)}, show_progress=False)
    assert (report.hits, report.encoded) == (stored, 800 - stored) and stored > 0
    fresh = warm_up(images, (), {"encoder": "descriptor", "cache_dir": str(tmp_path / "fresh")}, show_progress=False)
    assert fresh.encoded == 800
    with FeatureStore(folder) as one, FeatureStore(tmp_path / "fresh") as other:
        keys = other.keys(identity)
        mine, theirs = one.read(identity, keys), other.read(identity, keys)
        assert all((mine[key].feature == theirs[key].feature).all() for key in keys)


def fill_the_disk(reports: Any, folder: str) -> None:
    with FeatureStore(folder) as store:
        store.write(IDENTITY, [StoredFeature("before", feature_of(0, 2048))])
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))
        try:
            for step in range(1000):
                store.write(IDENTITY, [StoredFeature(f"{step}/{row}", feature_of(row, 2048)) for row in range(BATCH)])
                reports.send(step)
        except StoreError as error:
            reports.send([str(error), error.fix])


def test_a_full_disk_is_a_store_error_and_keeps_what_was_committed(tmp_path: Path) -> None:
    with forked_worker(fill_the_disk, str(tmp_path)) as (process, reports):
        said = [reports.recv()]
        while not isinstance(said[-1], list):
            said.append(reports.recv())
        process.join(20)
        assert process.exitcode == 0
    text, fix = said.pop()
    assert "cannot write the feature store" in text and str(tmp_path) in text and "space" in fix and len(said) > 3
    with FeatureStore(tmp_path) as store:
        assert store.count(IDENTITY) == 1 + len(said) * BATCH
        store.write(IDENTITY, [StoredFeature("after", feature_of(1, 2048))])
    assert_whole(tmp_path)


def fill_the_disk_in_warm_up(reports: Any, images: str, folder: str) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
    try:
        warm_up(images, (), {"encoder": "descriptor", "cache_dir": folder}, batch_size=BATCH, show_progress=False)
    except StoreError as error:
        reports.send(str(error))


def test_a_full_disk_stops_a_warm_up(tmp_path: Path) -> None:
    (tmp_path / "imgs").mkdir()
    for number in range(200):
        Image.new("L", (8, 8), 37 * number % 256).save(tmp_path / "imgs" / f"{number}.png")
    with forked_worker(fill_the_disk_in_warm_up, str(tmp_path / "imgs"), str(tmp_path / "cache")) as (_, reports):
        assert reports.poll(30) and "cannot" in reports.recv()


def write_many(reports: Any, folder: str, name: str) -> None:
    with FeatureStore(folder) as store:
        for step in range(40):
            store.write(IDENTITY, [StoredFeature(f"{name}/{step}/{row}", feature_of(step)) for row in range(BATCH)])
    reports.send("done")


def read_many(reports: Any, folder: str, stop: Any) -> None:
    seen = 0
    with FeatureStore(folder) as store:
        while not (is_last := stop.is_set()) or seen == 0:
            keys = [f"{name}/{step}/{row}" for name in "pq" for step in range(40) for row in (0, BATCH - 1)]
            found = store.read(IDENTITY, keys)
            if len(found) < seen:
                raise AssertionError("a feature that was there is gone")
            for key, row in found.items():
                np.testing.assert_array_equal(row.feature, feature_of(int(key.split("/")[1])))
            seen = len(found)
            if is_last and seen == 0:
                break
    reports.send(seen)


def test_two_writers_and_eight_readers_at_once(tmp_path: Path) -> None:
    stop = FORK.Event()
    pipes, processes = [], []
    for work, arguments in [(write_many, (name,)) for name in "pq"] + [(read_many, (stop,)) for _ in range(8)]:  # type: ignore[misc]
        here, there = FORK.Pipe(duplex=False)
        processes.append(FORK.Process(target=work, args=(there, str(tmp_path), *arguments)))
        processes[-1].start()
        there.close()
        pipes.append(here)
    try:
        for process in processes[:2]:
            process.join(60)
        stop.set()
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0] * 10
        assert all(pipe.poll() for pipe in pipes)
    finally:
        for process in processes:
            process.kill()
    with FeatureStore(tmp_path) as store:
        assert store.count(IDENTITY) == 2 * 40 * BATCH


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file of a sound store of 60 features in two namespaces; copy it."""
    folder = tmp_path_factory.mktemp("sound")
    with FeatureStore(folder) as store:
        store.write(EncoderIdentity({"encoder": "other"}), [StoredFeature(f"k{i}", np.full(64, 77.0), None, "another encoder's") for i in range(30)])
        store.write(IDENTITY, [StoredFeature(f"k{i}", feature_of(i), None, f"note {i}") for i in range(30)])
    return store.path


def read_damaged(folder: Path) -> str:
    """Read everything; fail where anything but the truth is returned; say what was seen."""
    try:
        with FeatureStore(folder) as store:
            found = store.read(IDENTITY, [f"k{i}" for i in range(30)])
    except StoreError:
        return "error"
    for key, row in found.items():
        assert (row.feature == feature_of(int(key[1:]))).all() and row.note == f"note {key[1:]}", key
    return "all" if len(found) == 30 else "some"


def test_flipped_bits_never_become_a_feature(sound: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "vlmfilm.store")
    content, flips = sound.read_bytes(), random.Random(2)
    seen: dict[str, int] = {}
    unnoticed = 0
    for _ in range(300):
        damaged = bytearray(content)
        damaged[flips.randrange(len(damaged))] ^= 1 << flips.randrange(8)
        folder = tmp_path / "d"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / sound.name).write_bytes(damaged)
        fate = read_damaged(folder)
        seen[fate] = seen.get(fate, 0) + 1
        if fate == "some":
            with opened(folder) as file:
                unnoticed += verify(file).is_sound
    assert seen["some"] + seen["error"] > 50 and unnoticed == 0, (seen, unnoticed)


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
def test_a_truncated_file_never_gives_a_wrong_feature(sound: Path, tmp_path: Path, keep: float) -> None:
    shutil.copy(sound, tmp_path / sound.name)
    os.truncate(tmp_path / sound.name, int(sound.stat().st_size * keep))
    assert read_damaged(tmp_path) == ("some" if keep == 0.0 else "error")


def test_a_damaged_feature_is_encoded_again_by_the_next_warm_up(tmp_path: Path) -> None:
    (tmp_path / "imgs").mkdir()
    for number in range(5):
        Image.new("L", (8, 8), 37 * number % 256).save(tmp_path / "imgs" / f"{number}.png")
    settings = {"encoder": "descriptor", "cache_dir": str(tmp_path)}
    warm_up(tmp_path / "imgs", (), settings, show_progress=False)
    with sqlite3.connect(tmp_path / "features.sqlite") as connection:
        connection.execute("UPDATE features SET data = zeroblob(length(data)) WHERE CAST(key AS TEXT) LIKE '%3.png'")
    connection.close()
    report = warm_up(tmp_path / "imgs", (), settings, show_progress=False)
    assert (report.hits, report.encoded) == (4, 1)
    assert_whole(tmp_path)


def test_odd_keys_and_notes_survive_the_whole_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from vlmfilm_plugin.cli import main

    keys = ["../../etc/passwd", "a\nb", "x" * 10_000, "血管/ключ/é", "a\udcffb", "nul\0"]
    with FeatureStore(tmp_path / "s") as store:
        store.write(IDENTITY, [StoredFeature(key, feature_of(i), None, key) for i, key in enumerate(keys)])
        assert {key: row.note for key, row in store.read(IDENTITY, keys).items()} == {key: key.replace("\udcff", "?") for key in keys}
    assert_whole(tmp_path / "s")
    assert main(["cache", "merge", str(tmp_path / "s"), str(tmp_path / "t")]) == 0
    for key in keys:
        capsys.readouterr()
        assert main(["cache", "show", key, "--cache-dir", str(tmp_path / "t"), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["entries"][0]["key"] == key
    assert {path.name.split("-")[0] for path in tmp_path.rglob("*")} == {"s", "t", "features.sqlite"}
