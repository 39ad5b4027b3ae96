"""Run a script of the soft-seg repo on a small machine: WORKERS=2:spawn loader workers, one thread, a stand-in where torchvision is missing.

python soft_seg_launcher.py REPO/script/train_diffusion_models.py ARGUMENTS...

PROBE=condition has `row_probe` write whose feature each row got.
"""

from __future__ import annotations

import os
import runpy
import sys
from typing import Any

import torch
from small_machine import provide_torchvision
from torch.utils.data import DataLoader

script = os.path.abspath(sys.argv[1])
sys.argv = [script, *sys.argv[2:]]
sys.path[0] = os.path.dirname(script)
sys.path.insert(0, os.path.dirname(os.path.dirname(script)))
torch.set_num_threads(1)
torch.manual_seed(0)

workers, _, start = os.environ.get("WORKERS", "0").partition(":")
build = DataLoader.__init__


def with_workers(self: Any, *args: Any, **kwargs: Any) -> None:
    few = {"num_workers": 0, "prefetch_factor": None, "persistent_workers": False}
    many = {"num_workers": int(workers), "multiprocessing_context": start or None, "persistent_workers": True}
    build(self, *args, **{**kwargs, **(many if int(workers) else few)})


DataLoader.__init__ = with_workers  # type: ignore[method-assign]

provide_torchvision()
if os.environ.get("PROBE"):
    import row_probe

    row_probe.watch(os.environ["PROBE"])

if __name__ == "__main__":
    runpy.run_path(script, run_name="__main__")
