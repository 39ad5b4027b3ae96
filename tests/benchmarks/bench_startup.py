"""Start-up: `import torch` with the plugin dormant and activated against without it, in fresh processes, in changing order.

python tests/benchmarks/bench_startup.py [--rounds 15]

The gate's own share is timed inside each process as well: what `torch.backends` calls, without the noise of importing torch.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys

CODE = """
import time, os, sys
import importlib.metadata as m
real = m.entry_points
real(group='torch.backends')  # torch scans the distributions either way: not part of the difference
if {hidden}:
    m.entry_points = lambda **k: type(real(**k))(e for e in real(**k) if not (k.get('group') == 'torch.backends' and e.name == 'vlmfilm_plugin'))
a = time.process_time()
import torch
b = time.process_time()
gate = 0.0
if not {hidden}:
    for name in [n for n in sys.modules if 'vlmfilm' in n]:
        del sys.modules[name]
    c = time.process_time()
    import vlmfilm_startup
    vlmfilm_startup.torch_backend()
    gate = time.process_time() - c
print(b - a, gate)
"""
CASES = {"without": (True, None), "dormant": (False, None), "activated": (False, "on")}


def run(case: str) -> tuple[float, float]:
    hidden, mode = CASES[case]
    env = {name: value for name, value in os.environ.items() if not name.startswith("VLM_F")} | ({"VLM_FILM_MODE": mode} if mode else {})
    done = subprocess.run([sys.executable, "-c", CODE.format(hidden=hidden)], capture_output=True, text=True, env=env, check=True)
    total, gate = map(float, done.stdout.split())
    return total * 1e3, gate * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    found: dict[str, list[tuple[float, float]]] = {case: [] for case in CASES}
    for case in CASES:
        run(case)
    for _ in range(rounds):
        for case in random.sample(list(CASES), len(CASES)):
            found[case].append(run(case))
    base = statistics.median(total for total, _ in found["without"])
    print(f"import torch without the plugin: {base:.0f} ms of CPU time (median of {rounds})")
    for case in ("dormant", "activated"):
        total, gate = (statistics.median(values) for values in zip(*found[case], strict=True))
        print(f"{case:<10} {total - base:+7.1f} ms in the medians of whole processes; the gate alone {gate:.2f} ms")


if __name__ == "__main__":
    main()
