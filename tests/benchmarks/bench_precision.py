"""What storing features as float16 loses against float32: the tiny Qwen2.5-VL's vision tower, through the real store.

python tests/benchmarks/bench_precision.py

The weights are random: the relative error is float16's rounding and carries over, the magnitude says nothing of a trained model.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_qwen import build

from vlmfilm_plugin.encoders.registry import build_encoder
from vlmfilm_plugin.features.store.protocol import StoredFeature
from vlmfilm_plugin.features.store.store import FeatureStore
from vlmfilm_plugin.settings.layers import resolve


def main() -> None:
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in rng.integers(30, 200, (256, 2))]
    encoder = build_encoder(resolve([("arguments", {"model_name": str(build(tempfile.mkdtemp())), "dtype": "float32"})]))
    full = encoder.encode(images).numpy()
    store = FeatureStore(tempfile.mkdtemp(), "float16")
    keys = [str(index) for index in range(len(full))]
    store.write(encoder.identity, [StoredFeature(key, row) for key, row in zip(keys, full, strict=True)])
    found = store.read(encoder.identity, keys)
    error = np.abs(np.stack([found[key].feature for key in keys]) - full)
    rows = np.linalg.norm(error, axis=1) / np.linalg.norm(full, axis=1)
    print(f"{full.shape[0]} features of width {full.shape[1]}, largest magnitude {np.abs(full).max():.2f}")
    relative = error / np.maximum(np.abs(full), 6.2e-5)
    print(f"max abs {error.max():.2e}, max relative {relative.max():.2e}, relative L2 of a row at most {rows.max():.2e}")


if __name__ == "__main__":
    main()
