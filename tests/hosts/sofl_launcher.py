"""Run a script of the sofl-seg repo on a small machine: no DataLoader workers, one thread, and a stand-in where torchvision is not installed.

python sofl_launcher.py REPO/scripts/train.py ARGUMENTS...
"""

from __future__ import annotations

import os
import random
import runpy
import sys
from typing import Any

import torch
from small_machine import provide_torchvision
from torch.utils.data import DataLoader

script = os.path.abspath(sys.argv[1])
sys.argv = [script, *sys.argv[2:]]  # the host finds its root from argv[0]
sys.path[0] = os.path.dirname(script)
torch.set_num_threads(1)

build = DataLoader.__init__


def without_workers(self: Any, *args: Any, **kwargs: Any) -> None:
    kwargs |= {"num_workers": 0, "prefetch_factor": None, "persistent_workers": False, "pin_memory": False}
    build(self, *args, **kwargs)


DataLoader.__init__ = without_workers  # type: ignore[method-assign]

provide_torchvision()

# The host seeds nothing; MONAI's transforms take their seeds from MONAI.
from monai.utils import set_determinism  # noqa: E402 - after the stand-in

set_determinism(0)
random.seed(0)

runpy.run_path(script, run_name="__main__")
