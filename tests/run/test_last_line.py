"""A FiLM checkpoint that a plain process cannot load: where people look, it says what to do."""

from __future__ import annotations

from pathlib import Path

import torch
from processes import run_code, succeed
from small_unet import SmallUNet

TRAIN = """
import os, sys, torch
from small_unet import SmallUNet
from vlmfilm_plugin import attach
from vlmfilm_plugin.run.runtime import Runtime

torch.manual_seed(0)
runtime = Runtime("on", os.environ, os.getcwd())
handle = attach(SmallUNet(), feature_dim=3, cond_dim=4)
runtime.states.settings_of = lambda film: handle.settings
for name in ("first.ckpt", "last.ckpt"):
    checkpoint = {"state_dict": handle.unet.state_dict()}
    if "--save" in sys.argv:
        runtime.save_checkpoint(handle.unet, checkpoint)
        torch.save(checkpoint, name)
print("the host's last words")
"""


def test_the_checkpoint_and_the_last_line_of_its_run_say_how_it_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(TRAIN)
    tests = str(Path(__file__).parents[1])
    code = "import runpy, sys; sys.argv = ['train.py', '--save']; runpy.run_path('train.py')"
    lines = succeed(run_code(code, cwd=tmp_path, PYTHONPATH=tests)).splitlines()
    assert lines[-2] == "the host's last words" and lines[-1].startswith("[VLM] checkpoints of this run hold FiLM")
    assert "VLM_FILM_MODE=off" in lines[-1] and "unexpected keys (vlm_film)" in lines[-1]
    assert sum("hold FiLM" in line for line in lines) == 1
    rank = run_code(code, cwd=tmp_path, PYTHONPATH=tests, RANK="1", LOCAL_RANK="1")
    assert "hold FiLM" not in succeed(rank)
    silent = run_code("import runpy; runpy.run_path('train.py')", cwd=tmp_path, PYTHONPATH=tests)
    assert succeed(silent).splitlines()[-1] == "the host's last words"
    # What such a person has: torch alone.
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    unexpected = SmallUNet().load_state_dict(content["state_dict"], strict=False).unexpected_keys
    note = content["vlm_film"]["note"]
    assert unexpected and all("vlm_film." in key for key in unexpected) and "'vlm_film.'" in note
    assert "unexpected keys" in note and "VLM_FILM_MODE=off" in note and "pip" not in note.split()[0]
