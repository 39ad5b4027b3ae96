"""Measure the feature store: writes in batches of 64, reads in batches of 8, as it grows from a thousand features to a hundred thousand.

Run: `python tests/benchmarks/bench_store.py [--full] [--json]`. A script, not a test: figures depend on the disk.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sqlite3
import tempfile
import time
from pathlib import Path

import numpy as np

from vlmfilm_plugin.encoders.base import Identity
from vlmfilm_plugin.feature_store import FeatureStore, SourceStamp, StoredFeature

IDENTITY = Identity({"encoder": "bench", "width": 2048})
WIDTH, WRITE_BATCH, READ_BATCH, READS = 2048, 64, 8, 2000
SIZES = (1_000, 10_000, 100_000)


def grow(store: FeatureStore, keys: list[str], start: int, stop: int) -> tuple[float, list[float]]:
    """Write features [start, stop); return seconds in all and seconds a batch."""
    rows = np.random.default_rng(start).standard_normal((WRITE_BATCH, WIDTH)).astype(np.float32)
    stamp = SourceStamp(12345, 1_700_000_000_000_000_000, "ab" * 16)
    times = []
    for first in range(start, stop, WRITE_BATCH):
        batch = [StoredFeature(key, row, stamp) for key, row in zip(keys[first : min(first + WRITE_BATCH, stop)], rows, strict=False)]
        began = time.perf_counter()
        store.write(IDENTITY, batch)
        times.append(time.perf_counter() - began)
    return sum(times), times


def read(store: FeatureStore, keys: list[str], seed: int) -> list[float]:
    """Read random batches; return seconds a batch."""
    draw = random.Random(seed)
    times = []
    for _ in range(READS):
        batch = draw.sample(keys, READ_BATCH)
        began = time.perf_counter()
        found = store.read(IDENTITY, batch)
        times.append(time.perf_counter() - began)
        if len(found) != READ_BATCH:
            raise SystemExit(f"read {len(found)} of {READ_BATCH} features")
    return times


def measure(folder: Path, sizes: tuple[int, ...]) -> list[dict[str, float]]:
    """Return one row of figures for each size."""
    keys = [f"train:train/image/{index:07d}.png" for index in range(max(sizes))]
    random.Random(0).shuffle(keys)
    result, start = [], 0
    with FeatureStore(folder) as store:
        for size in sizes:
            seconds, writes = grow(store, keys, start, size)
            reads = read(store, keys[:size], size)
            result.append(
                {
                    "features": size,
                    "writes_per_s": (size - start) / seconds,
                    "write_p50_ms": 1e3 * float(np.quantile(writes, 0.5)),
                    "write_p99_ms": 1e3 * float(np.quantile(writes, 0.99)),
                    "reads_per_s": READ_BATCH * len(reads) / sum(reads),
                    "read_p50_us": 1e6 * float(np.quantile(reads, 0.5)),
                    "read_p99_us": 1e6 * float(np.quantile(reads, 0.99)),
                    "bytes_per_feature": store.path.stat().st_size / size,
                }
            )
            start = size
    return result


def main() -> None:
    """Run and print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="grow to a million features (about 5 GB of disk)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--folder", type=Path, default=None, help="where the store is made (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        rows = measure(Path(folder), (*SIZES, 1_000_000) if args.full else SIZES)
    growth = rows[-1]["read_p50_us"] / rows[0]["read_p50_us"]
    facts = {"python": platform.python_version(), "sqlite": sqlite3.sqlite_version, "width": WIDTH, "dtype": "float16"}
    if args.json:
        print(json.dumps({**facts, "rows": rows, "read_p50_growth": growth}, indent=2))
        return
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print(f"{'features':>9} {'writes/s':>9} {'p50 ms':>7} {'p99 ms':>7} {'reads/s':>9} {'p50 us':>7} {'p99 us':>7} {'bytes':>6}")
    for row in rows:
        print("{:9.0f} {:9.0f} {:7.2f} {:7.2f} {:9.0f} {:7.0f} {:7.0f} {:6.0f}".format(*row.values()))
    print(f"median read of {READ_BATCH}, largest store / smallest: {growth:.2f}")


if __name__ == "__main__":
    main()
