"""Cost of FiLM in a UNet forward and a training step: `on` with ready features, and `off`, against the plain UNet; ratios in one run.

python tests/benchmarks/bench_step.py [--rounds 60] [--large] [--json]

Each round times plain, on and off once, in changing order, on one and the same UNet: handle attached or removed in between. The figure
is the median of the rounds' ratios of CPU time (one thread), with its quartiles.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "vlmfilm_plugin" / "demo" / "host"))
import os

from src.archs.components.diffusion_unet import MedSegDiffUNet

import vlmfilm_plugin

SIZES: dict[str, dict[str, Any]] = {
    "small": {"rows": 4, "size": 64, "dim": 16, "dim_mult": (1, 2, 2, 2)},
    "large": {"rows": 1, "size": 320, "dim": 32, "dim_mult": (1, 2, 3, 4)},
}


def timed(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def measure(name: str, kind: str, rounds: int) -> dict[str, dict[str, float]]:
    """Return for each mode the median and quartiles of its time over the plain UNet's."""
    spec = SIZES[name]
    torch.manual_seed(0)
    unet = MedSegDiffUNet(spec["dim"], spec["size"], dim_mult=spec["dim_mult"], full_self_attn=(False,) * len(spec["dim_mult"]))
    rows, size = spec["rows"], spec["size"]
    x, t, cond = torch.randn(rows, 1, size, size), torch.rand(rows), torch.randn(rows, 1, size, size)
    features = torch.randn(rows, 2048)

    def forward() -> None:
        with torch.no_grad():
            unet(x, t, cond)

    def train() -> None:
        unet.zero_grad(set_to_none=True)
        unet(x, t, cond).square().mean().backward()

    def run(mode: str) -> float:
        if mode == "plain":
            return timed(train if kind == "train" else forward)
        os.environ["VLM_FILM_MODE"] = mode
        with vlmfilm_plugin.attach(unet, feature_dim=2048) as handle, handle.condition(features) if mode == "on" else nullcontext():
            return timed(train if kind == "train" else forward)

    unet.train(kind == "train")
    for mode in ("plain", "on", "off"):
        run(mode)
    ratios: dict[str, list[float]] = {"on": [], "off": []}
    for _ in range(rounds):
        order = ["plain", "on", "off"]
        random.shuffle(order)
        times = {mode: run(mode) for mode in order}
        for mode, found in ratios.items():
            found.append(times[mode] / times["plain"])
    return {mode: dict(zip(("q1", "median", "q3"), statistics.quantiles(found, n=4), strict=True)) for mode, found in ratios.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, dict[str, dict[str, float]]] = {}
    for name in ["small", *(["large"] if arguments.large else [])]:
        for kind in ("forward", "train"):
            results[f"{name} {kind}"] = measure(name, kind, arguments.rounds if name == "small" else max(4, arguments.rounds // 10))
    if arguments.json:
        print(json.dumps(results))
        return
    for case, modes in results.items():
        for mode, q in modes.items():
            print(f"{case:<14} {mode:<4} {q['median']:.4f}  (quartiles {q['q1']:.4f} to {q['q3']:.4f})")


if __name__ == "__main__":
    main()
