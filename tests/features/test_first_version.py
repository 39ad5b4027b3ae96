"""Stores that the first version (commit 25f05ac) really wrote: its own code, taken from the history where there is one, makes them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vlmfilm_plugin.features.provider import FeatureProvider
from vlmfilm_plugin.features.store.admin import opened, verify
from vlmfilm_plugin.settings.layers import resolve

ROOT = Path(__file__).parents[2]
COMMIT = "25f05ac"
UNIT = (0.0, 1.0)

OLD_RUN = """
import os, sys, torch
from pathlib import Path
import vlmfilm_plugin
assert Path(vlmfilm_plugin.__file__).is_relative_to(sys.argv[1])
from vlmfilm_plugin.features import FeatureSource
from vlmfilm_plugin.settings import resolve
sys.path.insert(0, sys.argv[2])
from batches import batches
data, cache = Path(sys.argv[3]), sys.argv[4]
source = FeatureSource.from_settings(resolve([("arguments", {"encoder": "descriptor", "cache_dir": cache})]))
found = [source.get(source.samples_of(batch, batch["image"], (0.0, 1.0), files)) for batch, files in batches(data)]
torch.save(found, cache + "/found.pt")
os._exit(0) if sys.argv[5] == "killed" else None
"""

BATCHES = '''
import torch


def batches(data):
    """Return batches, and the files behind their names: by name, by file, by the metadata, by content, by crop."""
    names = [f"train/image/{number}.png" for number in range(4)]
    paths = [str(data / name) for name in names]
    image = torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    named = {name: data / name for name in names}
    return [
        ({"name": names, "image": image}, named),
        ({"name": names, "image": image, "split": "train"}, named),
        ({"filepath": paths, "image": image}, None),
        ({"image_meta_dict": {"filename_or_obj": paths}, "image": image}, None),
        ({"image": image}, None),
        ({"image": image[:, :, :8], "split": "val"}, None),
        ({"image": image, "patch_index": [0, 1, 2, 3]}, None),
    ]
'''


@pytest.fixture(scope="module")
def first_version(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the first version's package."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("no history here")
    packed = subprocess.run(["git", "-C", str(ROOT), "archive", COMMIT, "vlmfilm_plugin"], capture_output=True, check=False)
    if packed.returncode != 0:
        pytest.skip(f"the history does not reach {COMMIT}")
    folder = tmp_path_factory.mktemp("first")
    with tarfile.open(fileobj=BytesIO(packed.stdout)) as archive:
        archive.extractall(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("end", ["closed", "killed"])
def test_what_the_first_version_stored_is_found_and_nothing_is_encoded(first_version: Path, tmp_path: Path, end: str) -> None:
    data, cache = tmp_path / "data", tmp_path / "cache"
    for number in range(4):
        path = data / "train" / "image" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (16, 16), dtype=np.uint8)).save(path)
    (tmp_path / "batches.py").write_text(BATCHES)
    arguments = [str(first_version), str(tmp_path), str(data), str(cache), end]
    environment = {**os.environ, "PYTHONPATH": str(first_version)}
    subprocess.run([sys.executable, "-c", OLD_RUN, *arguments], env=environment, cwd=tmp_path, check=True)
    log = cache / "features.sqlite-wal"
    assert log.exists() == (end == "killed")
    held: dict[str, Any] = {}
    exec(BATCHES, held)
    expected = torch.load(cache / "found.pt", weights_only=True)
    values = {"encoder": "descriptor", "cache_dir": str(cache), "on_missing_feature": "error"}
    for _ in range(2):
        provider = FeatureProvider.from_settings(resolve([("arguments", values)]))
        for (batch, files), old in zip(held["batches"](data), expected, strict=True):
            assert torch.equal(provider.get(provider.samples_of(batch, batch["image"], UNIT, files)), old)
        assert provider.stats.miss == 0
        provider.store.close()
    with opened(cache) as file:
        assert verify(file).is_sound
    assert not log.exists()
