"""Measure the feature store: writes in batches of 64, reads in batches of 8, of stores of a thousand features to a hundred thousand, or a million.

Run: `python tests/benchmarks/bench_store.py [--full] [--cold] [--json]`. A script, not a test: figures depend on the machine.

A write is that of the last features of a store, up to 10,000. A read goes from keys to one tensor (8, 2048) float32, of a file that is in the
system's memory, as a store is after an epoch or a warm-up. The stores take turns, so that a busy moment of the machine falls on all of them, and
the quietest round has a figure of its own. `--cold` also reads from files that are not in memory: the disk then decides, so beside it stands the
time of eight bare blocks of 4 KiB from the same file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sqlite3
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from vlmfilm_plugin.encoders.base import EncoderIdentity
from vlmfilm_plugin.features.encoding import stack
from vlmfilm_plugin.features.store.protocol import SourceStamp, StoredFeature
from vlmfilm_plugin.features.store.store import FeatureStore

IDENTITY = EncoderIdentity({"encoder": "bench", "width": 2048})
WIDTH, WRITE_BATCH, READ_BATCH, READS, ROUNDS, COLD_READS = 2048, 64, 8, 100, 60, 200
# Of each round the first reads, which find another store's pages in the processor's caches; and the batches whose writes count.
UNTIMED, LAST_WRITES = 20, 10_000 // 64
SIZES = (1_000, 10_000, 100_000)


def fill(store: FeatureStore, keys: list[str]) -> list[float]:
    """Write a feature for each key; return seconds a batch."""
    rows = np.random.default_rng(0).standard_normal((WRITE_BATCH, WIDTH)).astype(np.float32)
    stamp = SourceStamp(12345, 1_700_000_000_000_000_000, "ab" * 16)
    times = []
    for first in range(0, len(keys), WRITE_BATCH):
        batch = [StoredFeature(key, row, stamp) for key, row in zip(keys[first : first + WRITE_BATCH], rows, strict=False)]
        began = time.perf_counter()
        store.write(IDENTITY, batch)
        times.append(time.perf_counter() - began)
    return times


def read(store: FeatureStore, keys: list[str], seed: int, batches: int) -> list[float]:
    """Read random batches, each into one array (8, 2048) float32; return seconds a batch."""
    draw = random.Random(seed)
    times = []
    for _ in range(batches):
        batch = draw.sample(keys, READ_BATCH)
        began = time.perf_counter()
        found = store.read(IDENTITY, batch)
        stack([found[key] for key in batch])
        times.append(time.perf_counter() - began)
    return times


def forget(path: Path) -> None:
    """Put a file out of the system's memory, where the system can."""
    if not hasattr(os, "posix_fadvise"):
        raise SystemExit("--cold needs posix_fadvise, which this system does not have")
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def remember(path: Path) -> None:
    """Read a file once, so that it is in the system's memory."""
    with open(path, "rb") as file:
        while file.read(1 << 24):
            pass


def blocks(path: Path, seed: int) -> list[float]:
    """Read eight random blocks of 4 KiB, as a read of eight features must at the least; return seconds each time."""
    draw = random.Random(seed)
    times = []
    with open(path, "rb", buffering=0) as file:
        count = os.fstat(file.fileno()).st_size // 4096
        for _ in range(COLD_READS):
            began = time.perf_counter()
            for _ in range(READ_BATCH):
                file.seek(draw.randrange(count) * 4096)
                file.read(4096)
            times.append(time.perf_counter() - began)
    return times


def measure(folder: Path, sizes: tuple[int, ...], *, is_cold: bool) -> list[dict[str, float]]:
    """Return one row of figures for each size."""
    keys = [f"train:train/image/{index:07d}.png" for index in range(max(sizes))]
    random.Random(0).shuffle(keys)
    with ExitStack() as opened:
        stores = {size: opened.enter_context(FeatureStore(folder / str(size))) for size in sizes}
        result = {}
        for size, store in stores.items():
            writes = fill(store, keys[:size])[-LAST_WRITES:]
            result[size] = {
                "features": size,
                "writes_per_s": WRITE_BATCH * len(writes) / sum(writes),
                "write_p50_ms": 1e3 * float(np.quantile(writes, 0.5)),
                "write_p99_ms": 1e3 * float(np.quantile(writes, 0.99)),
                "bytes_per_feature": store.path.stat().st_size / size,
            }
        if is_cold:
            for size, store in stores.items():
                forget(store.path)
                result[size]["cold_blocks_p50_us"] = 1e6 * float(np.quantile(blocks(store.path, size), 0.5))
                forget(store.path)
                with FeatureStore(store.path.parent) as fresh:  # the other one's connection remembers pages of its own
                    result[size]["cold_read_p50_us"] = 1e6 * float(np.quantile(read(fresh, keys[:size], 1, COLD_READS), 0.5))
        rounds: dict[int, list[list[float]]] = {size: [] for size in sizes}
        for turn in range(ROUNDS):
            for size, store in stores.items():
                if turn % 10 == 0:
                    remember(store.path)
                rounds[size].append(read(store, keys[:size], turn, READS + UNTIMED)[UNTIMED:])
    for size, turns in rounds.items():
        reads = [seconds for turn in turns for seconds in turn]
        result[size] |= {
            "reads_per_s": READ_BATCH * len(reads) / sum(reads),
            "read_p50_us": 1e6 * float(np.quantile(reads, 0.5)),
            "read_p99_us": 1e6 * float(np.quantile(reads, 0.99)),
            "read_p50_us_best_round": 1e6 * min(float(np.quantile(turn, 0.5)) for turn in turns),
        }
    return list(result.values())


def main() -> None:
    """Run and print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="grow to a million features (about 5 GB of disk)")
    parser.add_argument("--cold", action="store_true", help="also read from a file that is not in the system's memory")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--folder", type=Path, default=None, help="where the store is made (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        rows = measure(Path(folder), (*SIZES, 1_000_000) if args.full else SIZES, is_cold=args.cold)
    growth = rows[-1]["read_p50_us"] / rows[0]["read_p50_us"]
    facts = {"python": platform.python_version(), "sqlite": sqlite3.sqlite_version, "width": WIDTH, "dtype": "float16"}
    if args.json:
        print(json.dumps({**facts, "rows": rows, "read_p50_growth": growth}, indent=2))
        return
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print("".join(f"{name:>{len(name) + 2}}" for name in rows[0]))
    for row in rows:
        print("".join(f"{value:{len(name) + 2}.{2 if name.endswith('_ms') else 0}f}" for name, value in row.items()))
    print(f"median read, largest store / smallest: {growth:.2f}")


if __name__ == "__main__":
    main()
