"""Another backend is one file: a store kept in memory, added from outside by an entry point, chosen by its setting."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vlmfilm_plugin.errors import StoreError
from vlmfilm_plugin.features.provider import FeatureProvider
from vlmfilm_plugin.features.store.protocol import Store
from vlmfilm_plugin.features.store.registry import open_store
from vlmfilm_plugin.features.store.store import FeatureStore
from vlmfilm_plugin.settings.layers import resolve

BACKEND = '''
"""A store that keeps everything in this process."""

ROWS = {}


class Memory:
    path = "memory"

    def __init__(self, embedding_dtype):
        self.embedding_dtype = embedding_dtype

    def _all(self, identity):
        return ROWS.setdefault(identity.fingerprint, {})

    def rows(self, identity, keys):
        return [row for (key, _), row in self._all(identity).items() if key in keys]

    def rows_of_content(self, identity, stamps):
        wanted = {(stamp.size, stamp.digest) for stamp in stamps}
        return [row for row in self._all(identity).values() if row.stamp and (row.stamp.size, row.stamp.digest) in wanted]

    def known_sizes(self, identity, sizes):
        return {row.stamp.size for row in self._all(identity).values() if row.stamp} & set(sizes)

    def write(self, identity, rows):
        for row in rows:
            kept = row._replace(feature=row.feature.astype(self.embedding_dtype))
            self._all(identity)[row.key, row.stamp and row.stamp.digest] = kept

    def keys(self, identity):
        return sorted({key for key, _ in self._all(identity)})

    def close(self):
        pass


def build(settings):
    return Memory(settings.embedding_dtype)


def broken(settings):
    raise OSError("no server")


def no_store(settings):
    return object()
'''
ENTRIES = "[vlmfilm.stores]\nmemory = other_store:build\nbroken = other_store:broken\nwrong = other_store:no_store\nsqlite_2 = other_store:absent\n"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install a package with a backend, as pip would lay it out."""
    site = tmp_path / "site"
    (site / "other_store-1.dist-info").mkdir(parents=True)
    (site / "other_store-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: other-store\nVersion: 1\n")
    (site / "other_store-1.dist-info" / "entry_points.txt").write_text(ENTRIES)
    (site / "other_store.py").write_text(BACKEND)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.delitem(sys.modules, "other_store", raising=False)
    return tmp_path


def settings(folder: Path, **given: Any) -> Any:
    return resolve([("argument", {"encoder": "descriptor", "cache_dir": str(folder / "cache"), **given})])


def features(provider: FeatureProvider, *paths: str) -> torch.Tensor:
    return provider.get(provider.samples_of({"filepath": list(paths)}, torch.zeros(len(paths), 1, 4, 4), (0.0, 1.0)))


def test_a_backend_from_outside_serves_a_run_and_nothing_else_is_written(installed: Path) -> None:
    paths = [installed / f"{i}.png" for i in range(2)]
    for seed, path in enumerate(paths):
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 9), dtype=np.uint8)).save(path)
    first = FeatureProvider.from_settings(settings(installed, store="memory"))
    given = features(first, *map(str, paths))
    strict = FeatureProvider.from_settings(settings(installed, store="memory", on_missing_feature="error"))
    assert torch.equal(features(strict, f"{paths[1]}#other", str(paths[0])), given[[1, 0]])
    assert (strict.stats.disk_hit, strict.stats.miss) == (2, 0) and not (installed / "cache").exists()
    assert isinstance(first.store, Store)


def test_the_default_is_sqlite_and_satisfies_the_protocol(tmp_path: Path) -> None:
    store = open_store(settings(tmp_path))
    assert isinstance(store, FeatureStore) and isinstance(store, Store)


@pytest.mark.parametrize(
    ("name", "said"),
    [("broken", "OSError: no server"), ("wrong", "object without close"), ("memry", "set `store` to 'memory'"), ("sqlite_2", "AttributeError")],
)
def test_a_backend_that_cannot_be_used_is_named(installed: Path, name: str, said: str) -> None:
    with pytest.raises(StoreError) as caught:
        open_store(settings(installed, store=name))
    assert said in str(caught.value)


def test_a_name_claimed_twice_is_refused(installed: Path) -> None:
    entries = installed / "site" / "other_store-1.dist-info" / "entry_points.txt"
    entries.write_text(ENTRIES + "sqlite = other_store:build\n")
    with pytest.raises(StoreError, match="claimed twice"):
        open_store(settings(installed))
