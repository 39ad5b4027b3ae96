"""What a warm training step pays in Python for names, keys and features that are all known."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from PIL import Image
from small_unet import SmallUNet

from vlmfilm_plugin.forward.attach import install
from vlmfilm_plugin.run.film_state import FilmStates
from vlmfilm_plugin.run.log_lines import Diagnostics
from vlmfilm_plugin.run.running_batch import HostBatch, RunningBatch
from vlmfilm_plugin.settings.layers import resolve

# Measured: 51 for 2 rows, 61 for 4, 81 for 8, around the look-up alone; the first layout took 1,184, 1,240 and 1,352.
MOST = 150


def python_calls(function: Callable[[], object]) -> Counter[str]:
    calls: Counter[str] = Counter()

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            calls[f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}"] += 1

    sys.setprofile(watch)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls


def test_a_warm_step_looks_its_rows_up_in_few_python_calls(tmp_path: Path) -> None:
    names = [f"train/image/{i:04d}.png" for i in range(8)]
    files: dict[str, Path | None] = {name: tmp_path / name for name in names}
    for seed, path in enumerate(files.values()):
        assert path is not None
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 9), dtype=np.uint8)).save(path)
    settings = resolve([("argument", {"encoder": "descriptor", "cache_dir": str(tmp_path / "cache"), "film_log_every_n_steps_train": 1000})])
    film = install(SmallUNet(), settings, "on").film
    states, diagnostics = FilmStates(lambda: settings), Diagnostics(settings)
    x = torch.zeros(8, 1, 8, 8)
    batch = {"image": torch.zeros(8, 1, 8, 8), "label": torch.zeros(8, 1, 8, 8), "geometry": torch.zeros(8, 1), "coordinate": names, "name": names}

    def step(number: int) -> RunningBatch:
        return RunningBatch(HostBatch(batch, "train", (-1.0, 1.0), step=number), states, diagnostics, files)

    time.sleep(0.1)  # a file that was just written is looked at again
    for number in (1, 2):
        step(number).open_context(film, x, None, None)
    warm = step(3)
    calls = python_calls(lambda: warm.open_context(film, x, None, None))
    assert states.of(film).provider.stats.mem_hit == 16
    # What the transform of features and FiLM's module do with a feature is no look-up.
    names_and_features = {
        what: count for what, count in calls.items() if not what.startswith(("feature_transform.py", "module.py", "training_statistics.py"))
    }
    assert sum(names_and_features.values()) < MOST, sorted(names_and_features.items(), key=lambda item: -item[1])
