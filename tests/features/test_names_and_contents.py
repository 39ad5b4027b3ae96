"""Which stored feature belongs to which file: shared names, one file under many spellings, and stores of the first version."""

from __future__ import annotations

import os
import sqlite3
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from without_rights import run_without_rights

from vlmfilm_plugin.encoders.descriptor import DescriptorEncoder
from vlmfilm_plugin.errors import MissingFeatureError
from vlmfilm_plugin.features.images import read_image
from vlmfilm_plugin.features.provider import FeatureProvider
from vlmfilm_plugin.features.store.protocol import SourceStamp, StoredFeature
from vlmfilm_plugin.features.store.store import FeatureStore
from vlmfilm_plugin.warmup.encode import warm_up

UNIT = (0.0, 1.0)


def picture(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Bitmaps: all of one size, so that only their content tells them apart.
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 12), dtype=np.uint8)).save(path, "BMP")
    return path


def provider(cache: Path, root: Path | str | None = None, on_missing: str = "encode", dtype: str = "float32") -> FeatureProvider:
    settings: dict[str, Any] = {"on_missing": on_missing, "dataset_root": None if root is None else str(root)}
    return FeatureProvider(DescriptorEncoder(), FeatureStore(cache, dtype), **settings)


def features(source: FeatureProvider, **batch: Any) -> torch.Tensor:
    rows = len(next(iter(batch.values())))
    return source.get(source.samples_of(batch, torch.zeros(rows, 1, 4, 4), UNIT))


def truth(*paths: Path) -> torch.Tensor:
    return DescriptorEncoder().encode([read_image(path) for path in paths])


def warm(cache: Path, source: Path, **settings: object) -> tuple[int, int]:
    report = warm_up(source, ["train"], {"encoder": "descriptor", "cache_dir": str(cache), **settings}, show_progress=False)
    assert report.failures == []
    return report.encoded, report.hits


def test_two_data_sets_of_one_host_with_the_same_names_are_both_kept(tmp_path: Path) -> None:
    files = {name: [picture(tmp_path / name / "train" / f"{i}.bmp", 10 * set_ + i) for i in range(3)] for set_, name in enumerate("ab")}
    turns = [warm(tmp_path / "cache", tmp_path / name, dataset_root=str(tmp_path / name)) for name in "abab"]
    assert turns == [(3, 0), (3, 0), (0, 3), (0, 3)]
    for name in "ab":
        strict = provider(tmp_path / "cache", tmp_path / name, "error", "float16")
        for _ in range(2):
            found = features(strict, name=[f"train/{i}.bmp" for i in range(3)])
            torch.testing.assert_close(found, truth(*files[name]), rtol=1e-3, atol=1e-3)


def test_both_are_kept_in_memory_too(tmp_path: Path) -> None:
    for name in "ab":
        picture(tmp_path / name / "1.bmp", ord(name))
    one = provider(tmp_path / "cache")
    for _ in range(3):
        for name in "ab":
            found = one.get(one.samples_of({"filepath": [f"{tmp_path}/{name}/1.bmp#x"], "name": ["1.bmp"]}, torch.zeros(1, 1, 4, 4), UNIT))
            torch.testing.assert_close(found, truth(tmp_path / name / "1.bmp"))
    assert (one.stats.miss, one.stats.mem_hit) == (2, 4)


def test_warm_up_and_training_agree_on_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "data" / "0.png", 0)
    monkeypatch.chdir(tmp_path)
    assert warm(tmp_path / "cache", tmp_path / "data", dataset_root="data") == (1, 0)
    strict = provider(tmp_path / "cache", tmp_path / "data", "error", "float16")
    (sample,) = strict.samples_of({"filepath": ["data/0.png"]}, torch.zeros(1, 1, 4, 4), UNIT)
    assert sample.key == "unknown:0.png" == strict.store.keys(strict.encoder.identity)[0]
    strict.get([sample])


SPELLINGS = {
    "absolute": "{here}/data/s/0.bmp",
    "relative": "data/s/0.bmp",
    "dot": "./data/./s/0.bmp",
    "parent": "data/s/../s/0.bmp",
    "doubled separator": "{here}//data//s/0.bmp",
    "linked file": "data/s/link.bmp",
    "linked folder": "linked/s/0.bmp",
    "hard link": "data/s/hard.bmp",
    "suffix": "data/s/0.bmp::3",
    "fragment": "{here}/data/s/0.bmp#1",
    "a copy": "copy/0.bmp",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("root", [None, "data", "{here}/data", "data/", "./data", "linked", "elsewhere"])
def test_a_warmed_file_is_found_however_it_is_spelt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelling: str, root: str | None) -> None:
    path = picture(tmp_path / "data" / "s" / "0.bmp", 3)
    monkeypatch.chdir(tmp_path)
    os.symlink(path, tmp_path / "data" / "s" / "link.bmp")
    os.symlink(tmp_path / "data", tmp_path / "linked")
    os.link(path, tmp_path / "data" / "s" / "hard.bmp")
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "0.bmp").write_bytes(path.read_bytes())
    (tmp_path / "list.txt").write_text("data/s/0.bmp\n")
    warm(tmp_path / "cache", tmp_path / "list.txt", embedding_dtype="float32")
    given = None if root is None else root.format(here=tmp_path)
    text = SPELLINGS[spelling].format(here=tmp_path)
    torch.testing.assert_close(features(provider(tmp_path / "cache", given, "error"), filepath=[text]), truth(path))
    again = provider(tmp_path / "cache", given, "error")
    features(again, filepath=[text])
    assert again.stats.disk_hit == 1


@pytest.mark.parametrize("mark", ["@", "#", "?", "|", "::"])
@pytest.mark.parametrize("field", ["name", "filepath"])
def test_names_that_differ_only_after_a_mark_are_encoded_once(tmp_path: Path, mark: str, field: str) -> None:
    paths = [picture(tmp_path / f"x{mark}{i}.bmp", i) for i in range(4)]
    encoded = 0
    for epoch in range(6):
        source = provider(tmp_path / "cache", tmp_path)
        for rows in ([0, 1], [2, 3]) if epoch % 2 else ([3, 0], [1, 2]):
            found = features(source, **{field: [paths[i].name if field == "name" else str(paths[i]) for i in rows]})
            torch.testing.assert_close(found, truth(*(paths[i] for i in rows)))
        encoded += source.stats.miss
    assert encoded == 4
    assert warm(tmp_path / "cache", tmp_path, dataset_root=str(tmp_path), embedding_dtype="float32") == (0, 4)


def test_two_unicode_forms_of_a_name_are_two_files_or_one_content(tmp_path: Path) -> None:
    names = [unicodedata.normalize(form, "gef\u00e4\u00df.bmp") for form in ("NFC", "NFD")]
    path = picture(tmp_path / names[0], 1)
    (tmp_path / names[1]).write_bytes(path.read_bytes())
    source = provider(tmp_path / "cache", tmp_path)
    features(source, name=[names[0]])
    features(source, name=[names[1]])
    assert source.stats.miss == 1


def test_a_file_of_another_content_is_not_found_by_its_old_name_or_size(tmp_path: Path) -> None:
    path = picture(tmp_path / "1.bmp", 1)
    features(provider(tmp_path / "cache"), filepath=[str(path)])
    picture(path, 2)
    with pytest.raises(MissingFeatureError):
        features(provider(tmp_path / "cache", on_missing="error"), filepath=[str(path)])
    torch.testing.assert_close(features(provider(tmp_path / "cache"), filepath=[str(path)]), truth(path))
    picture(path, 1)
    torch.testing.assert_close(features(provider(tmp_path / "cache", on_missing="error"), filepath=[str(path)]), truth(path))


def test_a_file_of_a_new_size_is_not_read_to_learn_that_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = picture(tmp_path / "1.bmp", 1)
    source = provider(tmp_path / "cache")

    def refuse(path: Any) -> SourceStamp:
        raise AssertionError(f"{path} was read")

    monkeypatch.setattr(SourceStamp, "of", refuse)
    assert source.find(source.samples_of({"filepath": [str(path)]}, torch.zeros(1, 1, 4, 4), UNIT)) == set()


def test_a_half_precision_run_gets_the_same_numbers_whatever_dtype_the_row_has(tmp_path: Path) -> None:
    path = picture(tmp_path / "1.bmp", 1)
    fresh = features(provider(tmp_path / "half", dtype="float16"), filepath=[str(path)])
    full = features(provider(tmp_path / "full", dtype="float32"), filepath=[str(path)])
    mixed = features(provider(tmp_path / "full", on_missing="error", dtype="float16"), filepath=[str(path)])
    assert torch.equal(mixed, fresh) and not torch.equal(full, fresh)
    assert torch.equal(features(provider(tmp_path / "full", on_missing="error"), filepath=[str(path)]), full)


def test_a_wide_row_that_half_precision_cannot_hold_counts_as_missing(tmp_path: Path) -> None:
    identity = DescriptorEncoder().identity
    with FeatureStore(tmp_path, "float32") as wide:
        wide.write(identity, [StoredFeature("k", np.array([1e6, 1.0]))])
        assert list(wide.read(identity, ["k"])) == ["k"]
    with FeatureStore(tmp_path, "float16") as half:
        assert half.read(identity, ["k"]) == {}


# Stores of the first version: schema 2, digest and place in one text, one row a key.
FIRST_VERSION = (
    "CREATE TABLE namespaces (id INTEGER PRIMARY KEY, fingerprint TEXT NOT NULL UNIQUE, facts TEXT NOT NULL, created REAL NOT NULL)",
    "CREATE TABLE features (namespace INTEGER NOT NULL REFERENCES namespaces(id), key BLOB NOT NULL, source_size INTEGER,"
    " source_mtime_ns INTEGER, source_digest TEXT, dtype TEXT NOT NULL, width INTEGER NOT NULL, data BLOB NOT NULL,"
    " checksum INTEGER NOT NULL, created REAL NOT NULL, note TEXT, PRIMARY KEY (namespace, key))",
)


def first_version(cache: Path, paths: list[Path], key: str) -> None:
    """Write a store as the first version did: rows of this one, in that one's schema."""
    import json
    import time
    import zlib

    cache.mkdir()
    identity = DescriptorEncoder().identity
    connection = sqlite3.connect(cache / "features.sqlite", isolation_level=None)
    for statement in FIRST_VERSION:
        connection.execute(statement)
    facts = json.dumps(dict(identity.facts), sort_keys=True, default=str)
    connection.execute("INSERT INTO namespaces VALUES (1, ?, ?, 0.0)", (identity.fingerprint, facts))
    items: list[tuple[str, np.ndarray[Any, Any], SourceStamp | None]] = [
        (key.format(path=path, name=path.name), truth(path)[0].numpy().astype("<f2"), SourceStamp.of(path)) for path in paths
    ]
    items.append(("unknown:fp-" + "0" * 32, np.ones(identity_width(), dtype="<f2"), None))
    for name, feature, stamp in items:
        data, raw = feature.tobytes(), name.encode()
        stamped = (None, None, None) if stamp is None else (stamp.size, stamp.mtime_ns, f"{stamp.digest}@{stamp.place}")
        row = (1, raw, *stamped, "float16", feature.size, data, zlib.crc32(data, zlib.crc32(raw)), time.time(), None)
        connection.execute("INSERT INTO features VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
    connection.execute("PRAGMA user_version = 2")
    connection.close()


def identity_width() -> int:
    return DescriptorEncoder().feature_dim


@pytest.mark.parametrize("key", ["unknown:{name}", "unknown:{path}", "unknown:data/{name}"])
def test_a_store_of_the_first_version_serves_a_run_that_may_encode_nothing(tmp_path: Path, key: str) -> None:
    paths = [picture(tmp_path / "data" / f"{i}.bmp", i) for i in range(3)]
    first_version(tmp_path / "cache", paths, key)
    strict = provider(tmp_path / "cache", tmp_path / "data", "error", dtype="float16")
    torch.testing.assert_close(features(strict, name=[path.name for path in paths]), truth(*paths), rtol=1e-3, atol=1e-3)
    with FeatureStore(tmp_path / "cache") as store:
        identity = strict.encoder.identity
        assert store.read(identity, ["unknown:fp-" + "0" * 32])["unknown:fp-" + "0" * 32].stamp is None
        assert len(set(store.keys(identity))) == (4 if key == "unknown:{name}" else 7)


def read_twice(folder: Path, paths: list[Path]) -> tuple[int, int]:
    strict = provider(folder / "cache", folder / "data", "error", dtype="float16")
    for _ in range(2):
        torch.testing.assert_close(features(strict, name=[path.name for path in paths]), truth(*paths), rtol=1e-3, atol=1e-3)
    return strict.stats.disk_hit, strict.stats.mem_hit


def test_a_store_of_the_first_version_that_cannot_be_written_is_read(tmp_path: Path) -> None:
    paths = [picture(tmp_path / "data" / f"{i}.bmp", i) for i in range(3)]
    first_version(tmp_path / "cache", paths, "unknown:elsewhere/{name}")
    file = tmp_path / "cache" / "features.sqlite"
    before = file.read_bytes()
    file.chmod(0o400)
    file.parent.chmod(0o500)
    try:
        assert run_without_rights(read_twice, tmp_path, paths) == (3, 3)
    finally:
        file.parent.chmod(0o700)
    assert file.read_bytes() == before and os.listdir(file.parent) == [file.name]
