"""Cost of the alarm in a training step: a run that is watched against the same run that is not; the ratio in one process.

python tests/benchmarks/bench_alarm.py [--rounds 200]

Each round makes one step of either, in changing order, on one and the same UNet; none of them is a step in which the heads are asked.
The figure is the median of the rounds' ratios of CPU time (one thread), with its quartiles; then what one reading costs, in steps.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "vlmfilm_plugin" / "demo" / "host"))
from src.archs.components.diffusion_unet import MedSegDiffUNet

from vlmfilm_plugin.film.alarm import Advice, ConditionAlarm
from vlmfilm_plugin.host_spec import UNet
from vlmfilm_plugin.run.runtime import Runtime


class Owner:
    global_step = 1000
    current_epoch = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        environ = {"VLM_FILM_ENCODER": "descriptor", "VLM_FILM_FILM_LOG_EVERY_N_STEPS_TRAIN": "1000000", "VLM_FILM_FEATURE_TRANSFORM": "none"}
        runtime, owner = Runtime("on", environ, folder), Owner()
        unet = MedSegDiffUNet(16, 64, dim_mult=(1, 2, 2, 2), full_self_attn=(False,) * 4)
        handle = runtime.attach(unet, UNet(cls=MedSegDiffUNet, targets={"post_block2": "ups.*.1"}))
        assert handle is not None
        alarm = runtime.diagnostics.alarm(handle.film.film_id, runtime.settings)
        alarm._steps = 1000
        x, t = torch.rand(8, 1, 64, 64), torch.rand(8)

        def step(is_watched: bool) -> float:
            owner.global_step += 1
            handle.film.mode, batch = "on", {"image": x, "name": [f"{i}.png" for i in range(8)]}
            collect, is_due = (ConditionAlarm.collect, ConditionAlarm.is_due)
            if not is_watched:
                ConditionAlarm.collect = lambda *_: None  # type: ignore[method-assign]
                ConditionAlarm.is_due = lambda *_: False  # type: ignore[method-assign]
            start = time.process_time()
            with runtime.batch(batch, phase="train", value_range=(0.0, 1.0), owner=owner):
                unet(x, t, x).square().mean().backward()
            unet.zero_grad()
            seconds = time.process_time() - start
            ConditionAlarm.collect, ConditionAlarm.is_due = collect, is_due  # type: ignore[method-assign]
            return seconds

        for _ in range(10):
            step(True)
        ratios, plain = [], []
        for _ in range(rounds):
            order = [True, False]
            random.shuffle(order)
            times = {is_watched: step(is_watched) for is_watched in order}
            ratios.append(times[True] / times[False])
            plain.append(times[False])
        low, median, high = statistics.quantiles(ratios, n=4)
        print(f"training step, watched / not watched: {median:.4f}  (quartiles {low:.4f} to {high:.4f})")
        reads = []
        for _ in range(20):
            start = time.process_time()
            alarm._steps = 100
            alarm.read(handle.film, Advice(None))
            reads.append(time.process_time() - start)
        print(f"one reading: {1000 * statistics.median(reads):.2f} ms, {statistics.median(reads) / statistics.median(plain):.3f} of a step")


if __name__ == "__main__":
    main()
