"""Encoding: batched against one by one on a mid-size random vision tower; and the way to the first training step with a full store.

python tests/benchmarks/bench_encode.py [--rounds 3]

The tower has the real class with random weights (depth 8, width 512: 26 M parameters); ratios of wall time within one process. The first
training step is that of the demo's host in processes of its own, plain and with every feature of a tiny Qwen2.5-VL stored; a process that
read a weight would fail.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny_qwen
from processes import python
from stand_in import StandIn
from transformers import Qwen2_5_VLForConditionalGeneration

from vlmfilm_plugin.encoders.registry import build_encoder
from vlmfilm_plugin.settings.layers import resolve

MID = {"depth": 8, "hidden_size": 512, "intermediate_size": 1408, "num_heads": 8, "out_hidden_size": 512, "fullatt_block_indexes": [3, 7]}
FIRST_STEP = """
import runpy, sys, time
start = time.perf_counter()
import torch
if {is_film}:
    import transformers
    def refuse(*a, **k):
        raise AssertionError("weights were read")
    transformers.modeling_utils.PreTrainedModel.from_pretrained = classmethod(refuse)
sys.argv = ["scripts/train.py", "--config", sys.argv[1]]
sys.path.insert(0, ".")
from src.archs.flow_model import FlowModel
step = FlowModel.training_step
def first(self, batch, batch_idx):
    step(self, batch, batch_idx)
    print("FIRST", time.perf_counter() - start, flush=True)
    raise SystemExit(0)
FlowModel.training_step = first
runpy.run_path("scripts/train.py", run_name="__main__")
"""


def mid_size_tower() -> Path:
    """Save a Qwen2.5-VL with a vision tower of middling size and the tiny language model."""
    folder = Path(tempfile.mkdtemp())
    tiny_qwen.build(folder)
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    for name, value in MID.items():
        setattr(config.vision_config, name, value)
    config.text_config.hidden_size = 512
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    return folder


def batching(rounds: int) -> None:
    # A batch beyond one pack would only be cut again.
    settings = {"model_name": str(mid_size_tower()), "dtype": "float32", "max_pixels": 112 * 112}
    encoder = build_encoder(resolve([("arguments", settings)]))
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (112, 112, 3), dtype=np.uint8)) for _ in range(32)]
    encoder.encode(images[:1])
    for count in (8, 32):
        ratios = []
        for _ in range(rounds):
            start = time.perf_counter()
            together = encoder.encode(images[:count])
            middle = time.perf_counter()
            alone = torch.cat([encoder.encode([image]) for image in images[:count]])
            ratios.append((time.perf_counter() - middle) / (middle - start))
            assert torch.allclose(together, alone, atol=1e-4)
        print(f"{count} images of 112 x 112 in one call: {statistics.median(ratios):.2f} times the throughput of one by one")


def first_step(rounds: int) -> None:
    host = StandIn(Path(tempfile.mkdtemp()))
    model = tiny_qwen.build(tempfile.mkdtemp())
    variables = {"VLM_FILM_ENCODER": "qwen2_5_vl", "VLM_FILM_MODEL_NAME": str(model)}
    host.train("warm", "on", **variables)
    found: dict[str, list[float]] = {"plain": [], "film": []}
    for _ in range(rounds):
        for name in found:
            film = {"VLM_FILM_MODE": "on", "VLM_FILM_CACHE_DIR": str(host.root / "cache"), "VLM_FILM_ON_MISSING_FEATURE": "error", **variables}
            code = FIRST_STEP.format(is_film=name == "film")
            done = python("-c", code, host.config(name), cwd=host.repo, **(film if name == "film" else {}))
            lines = [line for line in done.stdout.splitlines() if line.startswith("FIRST")]
            assert lines, done.stderr[-2000:]
            found[name].append(float(lines[0].split()[1]))
    plain, on = (statistics.median(values) for values in found.values())
    print(f"seconds to the first training step: plain {plain:.2f}, on with a full store {on:.2f}; no weight of the encoder was read")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    batching(rounds)
    first_step(rounds)


if __name__ == "__main__":
    main()
