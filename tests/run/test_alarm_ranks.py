"""The alarm in two processes: both ask their heads at the same steps, under DDP and FSDP2; the first one alone writes; a control is one for all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import environment

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")

SCRIPT = """
import datetime, os, sys
from pathlib import Path
sys.path[:0] = [os.environ["TESTS"], os.path.join(os.environ["TESTS"], "run")]
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from test_alarm import Table, ThreeStages, Training, table, IMAGES
rank, folder = int(os.environ["RANK"]), Path(os.environ["FOLDER"])
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60))

class Nothing:
    def readouterr(self):
        return type("Read", (), {"out": ""})

def training(**settings):
    own = folder / f"rank{rank}"
    own.mkdir(exist_ok=True)
    return Training(own, Nothing(), table(0.0), film_log_every_n_steps_train=3, **settings)

for kind in ("ddp", "fsdp"):
    if rank == 0:
        print("KIND", kind, flush=True)
    run = training().kill(0, 1, 2)
    asked = []
    run.film.heads[0].register_forward_hook(lambda *_: asked.append(run.global_step) if not run.film.training else None)
    if kind == "ddp":
        wrapped = DistributedDataParallel(run.unet)
    else:
        from torch.distributed.fsdp import fully_shard
        for head in run.film.heads:
            fully_shard(head)
        wrapped = fully_shard(run.unet)
        run.optimizer = torch.optim.AdamW(run.unet.parameters(), lr=1e-3)
    run.unet = wrapped
    for step in range(5):
        # The second process has one image in its batches, and sees no second one until the end.
        run.step([0, 1, 2, 3] if rank == 0 or step == 4 else [5])
    assert asked == [0, 3], asked
    torch.distributed.barrier()

run = training(feature_control="constant")
run.unet = DistributedDataParallel(run.unet)
run.step([rank, 2, 3])
held = [torch.zeros(96), torch.zeros(96)]
dist.all_gather(held, run.film.control.feature)
assert torch.equal(held[0], held[1]) and torch.equal(held[0].half(), table(0.0)[0].half())
dist.barrier()
"""


def test_processes_ask_together_and_the_first_one_writes(tmp_path: Path) -> None:
    tests = Path(__file__).parents[1]
    running = []
    for rank in range(2):
        env = environment(RANK=str(rank), FOLDER=str(tmp_path), TESTS=str(tests))
        command = [sys.executable, "-c", SCRIPT]
        running.append(subprocess.Popen(command, cwd=os.getcwd(), env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    ddp, fsdp = said[0][0].split("KIND fsdp")
    assert ddp.count("[FILM-WARN]") == 1 and fsdp.count("[FILM-WARN]") == 1, said
    assert "[FILM-WARN]" not in said[1][0] and "[VLM] condition" not in said[1][0]
