"""Warm-up: the keys of a training run, odd sources and images, bounded reading, several processes, and the release of the encoder."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import subprocess
import sys
import threading
import warnings
from collections.abc import Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from processes import Fork, environment, forked, forked_code, python, succeed
from stand_in import SETTINGS, StandIn

from vlmfilm_plugin import warmup_vlm_cache
from vlmfilm_plugin.encoders.base import EncoderIdentity
from vlmfilm_plugin.encoders.descriptor import DescriptorEncoder
from vlmfilm_plugin.entry_points import installed
from vlmfilm_plugin.errors import EncoderError, HostError, SettingsError
from vlmfilm_plugin.features.provider import FeatureProvider
from vlmfilm_plugin.features.samples import Sample
from vlmfilm_plugin.features.store.store import FeatureStore
from vlmfilm_plugin.warmup import encode as warmup
from vlmfilm_plugin.warmup import image_list
from vlmfilm_plugin.warmup.encode import warm_up
from vlmfilm_plugin.warmup.image_list import read_plan


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("VLM_F") or name == "WORLD_SIZE"]:
        monkeypatch.delenv(name)


def make_images(folder: Path, count: int, size: int = 24) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{index:04d}.png" for index in range(count)]
    for index, path in enumerate(paths):
        Image.fromarray(np.random.default_rng(index).integers(0, 256, (size, size), dtype=np.uint8)).save(path)
    return paths


def keys_in(folder: Path, identity: EncoderIdentity | None = None) -> list[str]:
    with FeatureStore(folder) as store:
        return store.keys(identity or DescriptorEncoder().identity)


def quiet(source: Any, folder: Path, splits: Sequence[str] = ("train", "val", "test"), **options: Any) -> warmup.WarmupReport:
    settings = {"encoder": "descriptor", "cache_dir": str(folder / "cache"), **options.pop("settings", {})}
    return warm_up(source, splits, settings, show_progress=False, **options)


# Keys


def test_a_warmed_up_host_trains_with_missing_features_forbidden(tmp_path: Path) -> None:
    host = StandIn(tmp_path)
    strict = {"VLM_FILM_ON_MISSING_FEATURE": "error"}
    config = host.config("warm")
    variables = {**SETTINGS, "VLM_FILM_CACHE_DIR": str(host.root / "cache")}
    cold = forked("scripts/train.py", "--config", config, cwd=host.repo, VLM_FILM_MODE="on", **variables, **strict)
    assert cold.returncode != 0 and "MissingFeatureError" in cold.stderr
    done = forked("-m", "vlmfilm_plugin", "warmup", "--config", config, "--json", cwd=host.repo, **variables, **strict)
    report = json.loads(succeed(done))
    assert (report["total"], report["encoded"], report["failures"]) == (8, 8, [])
    assert "8/8" in done.stderr and "image/s" in done.stderr and "hits=0, misses=8" in done.stderr
    host.train("warm", "on", **strict)
    host.evaluate("warm", "on", **strict)
    again = json.loads(succeed(forked("-m", "vlmfilm_plugin", "warmup", "--config", config, "--json", cwd=host.repo, **variables)))
    assert (again["hits"], again["encoded"]) == (8, 0), "the run looked up other keys"


def test_settings_and_splits_come_from_the_configuration(tmp_path: Path) -> None:
    host = StandIn(tmp_path)
    film = {"vlm_film_config": {"encoder": "descriptor", "cache_dir": str(tmp_path / "from_config"), "embedding_dtype": "float32"}}
    config = yaml.safe_load(host.config("c", film).read_text())
    config["data"]["train_extra_dir"] = config["data"].pop("val_dir")
    report = warmup_vlm_cache(config, ("train",), show_progress=False)
    assert (report.total, report.encoded) == (5, 5)
    assert {key.split("/")[0] for key in keys_in(tmp_path / "from_config")} == {"unknown:train", "unknown:val"}
    stronger = warmup_vlm_cache(config, ("test",), show_progress=False, cache_dir=str(tmp_path / "given"))
    assert stronger.stores == [str(tmp_path / "given" / "features.sqlite")]


def test_a_broken_adapter_is_reported_and_another_lists_the_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make_images(tmp_path / "train" / "image", 2)
    broken = EntryPoint(name="other_host", value="no_such_adapter", group="vlmfilm.hosts")
    known = installed("vlmfilm.hosts")
    monkeypatch.setattr("vlmfilm_plugin.warmup.image_list.installed", lambda group: [broken, *known])
    plan = read_plan({"model": {"arch_name": "x"}, "data": {"train_dir": str(tmp_path / "train")}}, ["train"])
    assert len(plan.entries) == 2
    assert "no_such_adapter cannot be loaded: ModuleNotFoundError" in caplog.text


def test_a_configuration_nobody_knows_and_a_missing_folder_are_errors(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="cannot list the images") as caught:
        read_plan({"what": 1}, ["train"])
    assert caught.value.facts["host adapters that know it"] == "none"
    with pytest.raises(HostError, match="train") as missing:
        read_plan({"model": {"arch_name": "x"}, "data": {"train_dir": str(tmp_path / "no")}}, ["train"])
    assert str(tmp_path / "no") in str(missing.value) and missing.value.fix
    with pytest.raises(SettingsError, match="nothing to encode"):
        read_plan({"model": {"arch_name": "x"}, "data": {}}, ["train"])


def test_a_folder_is_keyed_as_a_batch_with_file_paths_would_be(tmp_path: Path) -> None:
    paths = make_images(tmp_path / "data" / "deep" / "er", 2)
    (tmp_path / "data" / "notes.txt").write_text("no image")
    (tmp_path / "data" / "loop").symlink_to(tmp_path / "data")
    assert quiet(tmp_path / "data", tmp_path).encoded == 2
    assert keys_in(tmp_path / "cache") == [f"unknown:{path}" for path in paths]
    source = FeatureProvider(DescriptorEncoder(), FeatureStore(tmp_path / "cache"), on_missing="error")
    batch = {"filepath": [str(path) for path in paths]}
    source.get(source.samples_of(batch, torch.zeros(2, 1, 8, 8), (0.0, 1.0)))
    rooted = quiet(tmp_path / "data", tmp_path, settings={"dataset_root": str(tmp_path / "data")}, as_split="train")
    assert (rooted.encoded, rooted.hits) == (0, 2), "the same files under other keys"
    assert "train:deep/er/0000.png" in keys_in(tmp_path / "cache")


def test_lists_name_keys_names_and_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = make_images(tmp_path / "imgs", 5)
    monkeypatch.chdir(tmp_path)
    table = tmp_path / "list.csv"
    table.write_text(
        f"path,key,name,split\n{paths[0]},my:key,,train\nimgs/0001.png,,train/image/1.png@x,train\n"
        f'{paths[2]},,,val\n{paths[3]},,,other\n{paths[4]},"a\nb",,\n'
    )
    assert quiet(table, tmp_path).encoded == 4
    assert keys_in(tmp_path / "cache") == sorted(["my:key", "train:train/image/1.png", f"val:{paths[2]}", "a\nb"])
    assert quiet(table, tmp_path, ["val"]).total == 2
    (tmp_path / "list.txt").write_text(f"# comment\n\n{paths[0]}\nimgs/0001.png\n")
    assert [str(entry.path) for entry in read_plan(tmp_path / "list.txt", []).entries] == [str(paths[0]), str(paths[1])]


@pytest.mark.parametrize(("text", "said"), [("file,split\na,b\n", "columns file, split"), ("path,key\n,x\n", "no path")])
def test_a_bad_table_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(SettingsError, match=said):
        read_plan(tmp_path / "bad.csv", ["train"])


def test_a_list_that_is_missing_or_no_text_is_refused(tmp_path: Path) -> None:
    (binary,) = make_images(tmp_path, 1)
    for path in (binary, tmp_path / "no.txt", tmp_path / "no.yaml"):
        with pytest.raises(SettingsError, match="cannot read what to encode"):
            read_plan(path, ["train"])


def test_two_files_under_one_key_are_both_stored(tmp_path: Path) -> None:
    paths = make_images(tmp_path / "imgs", 3)
    (tmp_path / "l.csv").write_text(f"path,key\n{paths[0]},same\n{paths[1]},same\n{paths[2]},other\n{paths[2]},other\n")
    report = quiet(tmp_path / "l.csv", tmp_path)
    assert (report.total, report.encoded, report.failures) == (3, 3, [])
    assert keys_in(tmp_path / "cache") == ["other", "same"]
    again = quiet(tmp_path / "l.csv", tmp_path)
    assert (again.hits, again.encoded) == (3, 0)


# Images


def test_a_changed_file_is_encoded_again_and_a_touched_one_is_not(tmp_path: Path) -> None:
    paths = make_images(tmp_path / "imgs", 3)
    quiet(tmp_path / "imgs", tmp_path)
    os.utime(paths[0], ns=(1, 1))
    make_images(tmp_path / "other", 5)[4].replace(paths[1])
    assert (lambda r: (r.hits, r.encoded))(quiet(tmp_path / "imgs", tmp_path)) == (2, 1)


def test_odd_images_are_encoded_or_reported_and_the_huge_one_is_not_decoded(tmp_path: Path) -> None:
    folder = tmp_path / "imgs"
    make_images(folder, 1)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 65536, (9, 9), dtype=np.uint16)).save(folder / "sixteen.png")
    Image.fromarray(rng.integers(0, 256, (9, 9, 4), dtype=np.uint8), "RGBA").save(folder / "rgba.png")
    Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).convert("P").save(folder / "palette.png")
    Image.new("L", (1, 1), 7).save(folder / "one.png")
    Image.new("1", (20000, 20000)).save(folder / "huge.png")
    Image.new("1", (10000, 10000)).save(folder / "large.png")  # PIL only warns of this one
    (folder / "text.png").write_text("this is no image")
    (folder / "cut.png").write_bytes((folder / "rgba.png").read_bytes()[:90])
    (folder / "gone.png").symlink_to(tmp_path / "nowhere")
    code = f"""
    import json, resource
    from vlmfilm_plugin.warmup.encode import warm_up
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report = warm_up({str(folder)!r}, (), {{"encoder": "descriptor", "cache_dir": {str(tmp_path / "cache")!r}}}, show_progress=False)
    print(json.dumps([report.as_dict(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before]))
    """
    report, grown_kib = json.loads(succeed(forked_code(code)).splitlines()[-1])
    assert (report["total"], report["encoded"], report["failed"]) == (10, 5, 5)
    said = {Path(entry["path"]).name: entry["error"] for entry in report["failures"]}
    assert set(said) == {"huge.png", "large.png", "text.png", "cut.png", "gone.png"}
    assert "10000 x 10000 pixels" in said["large.png"] and all("MAX_IMAGE_PIXELS" in said[name] for name in ("huge.png", "large.png"))
    assert grown_kib < 250_000, "1.2 GB would be the decoded image"


def test_the_command_reports_a_bad_image_and_returns_1(tmp_path: Path) -> None:
    make_images(tmp_path / "imgs", 2)
    (tmp_path / "imgs" / "bad.png").write_text("x")
    done = python("-m", "vlmfilm_plugin", "warmup", "imgs", "--set", "encoder=descriptor", "--no-progress", cwd=tmp_path)
    assert done.returncode == 1 and "encoded 2  failed 1" in done.stdout and "bad.png" in done.stdout and done.stderr == ""


def test_a_pipe_and_a_name_of_dots_among_the_images_stop_nothing_and_are_not_passed_over(tmp_path: Path) -> None:
    make_images(tmp_path / "imgs", 2)
    (tmp_path / "imgs" / "0000.png").rename(tmp_path / "imgs" / "...png")
    os.mkfifo(tmp_path / "imgs" / "pipe.png")
    report = quiet(tmp_path / "imgs", tmp_path)
    assert (report.total, report.encoded) == (3, 2) and [Path(path).name for path, _ in report.failures] == ["pipe.png"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "one thing to encode"),
        (["imgs", "--config", "x.yaml"], "one thing to encode"),
        (["imgs", "--set", "encoder"], "NAME=VALUE"),
        (["imgs", "--set", "encodre=descriptor"], "'encoder'"),
        (["imgs", "--set", "splits=a"], "unknown name"),
        (["imgs", "--batch-size", "0"], "1 or more"),
    ],
)
def test_wrong_arguments_exit_2_with_a_fix(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    from vlmfilm_plugin.cli import main

    make_images(tmp_path / "imgs", 1)
    assert main(["warmup", *[str(tmp_path / "imgs") if word == "imgs" else word for word in arguments]]) == 2
    assert said in capsys.readouterr().err


class Odd(DescriptorEncoder):
    """Refuse dark images, one bad image fails its whole call; note what is in flight."""

    calls: list[int]

    def encode(self, images: Sequence[Any]) -> torch.Tensor:
        self.calls.append(len(images))
        if any(np.asarray(image).max() == 0 for image in images):
            raise EncoderError("cannot preprocess an image", {"found": "black"})
        return super().encode(images)

    def encode_annotated(self, images: Sequence[Any]) -> tuple[torch.Tensor, list[str]]:
        return self.encode(images), [f"note of {image.size}" for image in images]

    @property
    def is_loaded(self) -> bool:
        return True


def use(encoder: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("vlmfilm_plugin.features.provider.build_encoder", lambda settings: encoder)
    return encoder


def test_an_image_that_the_encoder_refuses_costs_itself_alone_and_notes_are_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = use(Odd(), monkeypatch)
    encoder.calls = []
    paths = make_images(tmp_path / "imgs", 7)
    Image.new("L", (24, 24)).save(paths[3])
    report = quiet(tmp_path / "imgs", tmp_path, batch_size=4)
    assert (report.encoded, [path for path, _ in report.failures]) == (6, [str(paths[3])]) and "black" in report.failures[0][1]
    with FeatureStore(tmp_path / "cache") as store:
        assert store.read(encoder.identity, [f"unknown:{paths[0]}"])[f"unknown:{paths[0]}"].note == "note of (24, 24)"


def test_an_encoder_that_cannot_be_loaded_stops_the_warm_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Odd):
        is_loaded = False  # type: ignore[assignment]

        def encode(self, images: Sequence[Any]) -> torch.Tensor:
            raise EncoderError("cannot load the weights")

    use(Broken(), monkeypatch)
    make_images(tmp_path / "imgs", 3)
    with pytest.raises(EncoderError, match="weights"):
        quiet(tmp_path / "imgs", tmp_path)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("vlmfilm-read")]


def test_reading_runs_ahead_of_encoding_and_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = use(Odd(), monkeypatch)
    encoder.calls = []
    ahead: list[int] = []
    read, lock = [0], threading.Lock()
    real = image_list.read_image

    def counted(path: Path) -> Any:
        with lock:
            read[0] += 1
        return real(path)

    def encode(images: Sequence[Any]) -> torch.Tensor:
        deadline = threading.Event()
        for _ in range(100):  # the readers get time to run as far ahead as they may
            if read[0] - sum(encoder.calls) >= 8:
                break
            deadline.wait(0.005)
        ahead.append(read[0] - sum(encoder.calls))
        encoder.calls.append(len(images))
        return DescriptorEncoder.encode(encoder, images)

    monkeypatch.setattr(image_list, "read_image", counted)
    monkeypatch.setattr(encoder, "encode", encode, raising=False)
    make_images(tmp_path / "imgs", 40)
    assert quiet(tmp_path / "imgs", tmp_path, batch_size=4, readers=3).encoded == 40
    assert max(encoder.calls) <= 4 and max(ahead) == 8, "one group is encoded while the next is read, and no more"
    monkeypatch.setattr(warmup, "_BYTES_READ_AHEAD", 3 * 24 * 24 * 2)
    encoder.calls.clear()
    assert quiet(tmp_path / "imgs", tmp_path / "again", batch_size=64).encoded == 40 and max(encoder.calls) <= 2


def test_warning_filters_are_left_as_they_were(tmp_path: Path) -> None:
    make_images(tmp_path / "imgs", 30)
    before = list(warnings.filters)
    quiet(tmp_path / "imgs", tmp_path, readers=4)
    assert warnings.filters == before


# Several processes


def torchrun(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "vlmfilm_plugin", "warmup", *arguments]
    process = subprocess.Popen(command, cwd=cwd, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        stdout, stderr = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        # Told to stop, the launcher ends its processes; killed, it would leave them behind.
        process.terminate()
        process.communicate(timeout=60)
        raise
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def test_two_processes_share_the_work_and_one_file_and_a_bad_image_stops_neither(tmp_path: Path) -> None:
    make_images(tmp_path / "imgs", 60)
    (tmp_path / "imgs" / "0001.png").write_text("bad, and in a share that would be done first")
    done = torchrun("imgs", "--set", "encoder=descriptor", "--set", "cache_dir=cache", "--batch-size", "4", "--json", cwd=tmp_path)
    assert done.returncode == 1
    report = json.loads(done.stdout[: done.stdout.rindex("}") + 1])
    assert (report["total"], report["encoded"], report["failed"]) == (60, 59, 1)
    assert "warmup rank 0/2" in done.stderr and "warmup rank 1/2" in done.stderr
    assert len(keys_in(tmp_path / "cache")) == 59


def test_a_report_is_the_same_after_it_was_sent() -> None:
    report = warmup.WarmupReport(3, 1, 1, [("odd \udcff \n.png", 'said "no"')], 1.5, ["a/features.sqlite"])
    assert warmup.WarmupReport.from_json(json.dumps(vars(report)).encode()) == report


def test_shard_files_are_merged_into_one(tmp_path: Path) -> None:
    make_images(tmp_path / "imgs", 21)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    command = ["-m", "vlmfilm_plugin", "warmup", "imgs", "--set", "encoder=descriptor", "--set", "cache_dir=cache", "--shard-files", "--no-progress"]
    ranks = []
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
        ranks.append(Fork(command, tmp_path / rank, tmp_path, RANK=rank, LOCAL_RANK=rank, **variables))
    assert [rank.wait(120) for rank in ranks] == [0, 0], [rank.stderr.read_text() for rank in ranks]
    shards = sorted((tmp_path / "cache").glob("shard-*"))
    assert [len(keys_in(shard)) for shard in shards] == [11, 10]
    succeed(forked("-m", "vlmfilm_plugin", "cache", "merge", *shards, "cache", cwd=tmp_path))
    assert quiet(tmp_path / "imgs", tmp_path).hits == 21


# The store's second schema


def test_a_store_of_the_first_schema_keeps_its_features(tmp_path: Path) -> None:
    from vlmfilm_plugin.features.store import schema
    from vlmfilm_plugin.features.store.rows import checksum_of_first_version

    quiet(make_images(tmp_path / "imgs", 3)[0].parent, tmp_path)
    with sqlite3.connect(tmp_path / "cache" / "features.sqlite") as new:
        new.create_function("old_checksum", 3, checksum_of_first_version)
        columns = "source_digest || '@' || source_place, dtype, width, data, old_checksum(key, data, note), created"
        rows = new.execute(f"SELECT namespace, key, source_size, source_mtime_ns, {columns} FROM features").fetchall()
        namespaces = new.execute("SELECT * FROM namespaces").fetchall()
    old = tmp_path / "old" / "features.sqlite"
    old.parent.mkdir()
    with sqlite3.connect(old) as connection:
        for statement in (*schema.MIGRATIONS[0], "PRAGMA user_version = 1"):
            connection.execute(statement)
        connection.executemany("INSERT INTO namespaces VALUES (?, ?, ?, ?)", namespaces)
        connection.executemany("INSERT INTO features VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
    assert warm_up(tmp_path / "imgs", (), {"encoder": "descriptor", "cache_dir": str(old.parent)}, show_progress=False).hits == 3
    with sqlite3.connect(old) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (len(schema.MIGRATIONS),)


# Release


class Loaded(Odd):
    loaded = True

    @property
    def is_loaded(self) -> bool:
        return self.loaded

    def release(self) -> None:
        self.loaded = False


def sample(index: int) -> Sample:
    return Sample(f"train:{index}", None, lambda: Image.new("RGB", (8, 8), (index, 1, 1)))


def test_the_encoder_is_released_after_an_epoch_without_a_miss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encoder = Loaded()
    encoder.calls = []
    source = FeatureProvider(encoder, FeatureStore(tmp_path))
    for epoch, wanted, is_loaded in [(0, 1, True), (0, 2, True), (1, 2, True), (1, 3, True), (2, 3, True), (3, 3, False), (4, 3, False)]:
        source.enter_epoch(epoch)
        assert encoder.is_loaded is is_loaded, epoch
        source.get([sample(wanted)])
    assert capsys.readouterr().out.count("[VLM] encoder released: descriptor; epoch 2 needed no encoding") == 1
    source.enter_epoch(None)


def test_a_training_run_releases_its_encoder(tmp_path: Path, tiny_qwen: Path) -> None:
    host = StandIn(tmp_path)
    path = host.config("long")
    config = yaml.safe_load(path.read_text())
    config["trainer"] |= {"max_epochs": 3, "check_val_every_n_epoch": 3}
    path.write_text(yaml.safe_dump(config))
    variables = {**SETTINGS, "VLM_FILM_CACHE_DIR": str(tmp_path / "cache"), "VLM_FILM_ENCODER": "qwen2_5_vl", "VLM_FILM_MODEL_NAME": str(tiny_qwen)}
    output = succeed(forked("scripts/train.py", "--config", path, cwd=host.repo, VLM_FILM_MODE="on", **variables))
    assert output.count("[VLM] encoder released: qwen2_5_vl; epoch 1 needed no encoding") == 1
