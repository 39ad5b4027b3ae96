"""What the attempts work on: checkpoints, weights, stores and images that are known to the bit."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from referee import Wrong
from small_unet import SmallUNet, randomise

from vlmfilm_plugin import attach
from vlmfilm_plugin.checkpoints.metadata import write_metadata
from vlmfilm_plugin.cli import main
from vlmfilm_plugin.encoders.base import EncoderIdentity
from vlmfilm_plugin.encoders.descriptor import DescriptorEncoder
from vlmfilm_plugin.features.images import read_image
from vlmfilm_plugin.features.store.protocol import SourceStamp, StoredFeature
from vlmfilm_plugin.features.store.store import FeatureStore

IDENTITY, OTHER = EncoderIdentity({"encoder": "campaign"}), EncoderIdentity({"encoder": "other"})


def feature_of(number: int, width: int = 64) -> np.ndarray[Any, Any]:
    """Return the one feature that key number has."""
    return np.random.default_rng(number).standard_normal(width).astype(np.float16).astype(np.float32)


def make_store(folder: Path, count: int = 30) -> Path:
    """Make a store of two namespaces with the same keys and other features; return its file, whole by itself."""
    with FeatureStore(folder) as store:
        stamps = [SourceStamp(1000 + i, 5, f"{i:032x}", "place") for i in range(count)]
        store.write(OTHER, [StoredFeature(f"k{i}", np.full(64, 77.0), stamps[i], "another encoder's") for i in range(count)])
        store.write(IDENTITY, [StoredFeature(f"k{i}", feature_of(i), stamps[i], f"note {i}") for i in range(count)])
    return store.path


def check_store(folder: Path, count: int = 30) -> int:
    """Read a store; return how many features it gave, all of them right ones."""
    with FeatureStore(folder) as store:
        rows = store.rows(IDENTITY, [f"k{i}" for i in range(count)])
        rows += store.rows_of_content(IDENTITY, [SourceStamp(1000 + i, 5, f"{i:032x}", "place") for i in range(count)])
    for row in rows:
        if not (row.feature == feature_of(int(row.key[1:]))).all() or row.note != f"note {row.key[1:]}":
            raise Wrong(f"a wrong feature under {row.key!r}")
    return len({row.key for row in rows})


def command(*arguments: object) -> int:
    """Run a command of ours; its exit code, which is 0, 1 or 2."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = main([str(argument) for argument in arguments])
    if code not in (0, 1, 2):
        raise Wrong(f"exit code {code} of {arguments[:2]}")
    return code


def film_checkpoint(path: Path, seed: int = 0, *, widths: tuple[int, ...] = (6, 4), with_film: bool = True, **content: Any) -> Path:
    """Save a checkpoint as a host does."""
    torch.manual_seed(seed)
    unet = SmallUNet(widths)
    checkpoint: dict[str, Any] = {"state_dict": unet.state_dict(), **content}
    if with_film:
        handle = attach(unet, encoder="descriptor", cond_dim=8, text_mlp_hidden_dim=8)
        randomise(handle.film, seed)
        checkpoint["state_dict"] = handle.unet.state_dict()
        write_metadata(handle.unet, handle.settings, checkpoint)
    torch.save(checkpoint, path)
    return path


def same(found: Mapping[str, Any], truth: Mapping[str, Any]) -> bool:
    """Tell whether two state dicts are equal to the bit."""
    return list(found) == list(truth) and all(torch.equal(found[name], truth[name]) for name in truth)


def images(folder: Path, count: int, size: int = 8) -> list[Path]:
    """Make images of noise."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number}.png" for number in range(count)]
    for number, path in enumerate(paths):
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (size, size), dtype=np.uint8)).save(path)
    return paths


def described(path: Path) -> np.ndarray[Any, Any]:
    """Return the descriptor of an image as a store of ours keeps it."""
    return DescriptorEncoder().encode([read_image(path)]).numpy()[0].astype(np.float16).astype(np.float32)
