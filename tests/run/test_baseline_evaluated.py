"""A plain baseline under mode `on`: evaluating it is an error, training it on is fine-tuning, whatever copy is evaluated afterwards."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from small_unet import SmallUNet, inputs
from torch import nn

from vlmfilm_plugin.errors import CheckpointError
from vlmfilm_plugin.forward.attach import install
from vlmfilm_plugin.forward.context import in_force
from vlmfilm_plugin.run.film_state import FilmStates
from vlmfilm_plugin.run.log_lines import Diagnostics
from vlmfilm_plugin.run.running_batch import HostBatch, RunningBatch
from vlmfilm_plugin.settings.layers import resolve


class Run:
    def __init__(self, folder: Path, mode: str = "on") -> None:
        settings = resolve([("argument", {"encoder": "descriptor", "cache_dir": str(folder), "feature_transform": "none"})])
        self.unet: nn.Module = SmallUNet()
        self.handle = install(self.unet, settings, mode)
        self.states, self.diagnostics = FilmStates(lambda: settings), Diagnostics(settings)

    def forward(self, phase: str, *, is_fit: bool, has_trainer: bool = True, unet: nn.Module | None = None) -> None:
        unet = unet or self.unet
        unet.train(phase == "train")
        batch = HostBatch({"image": torch.rand(2, 1, 8, 8)}, phase, (0.0, 1.0), step=1, batch_idx=1, is_fit=is_fit, is_in_fit=is_fit and has_trainer)
        with torch.set_grad_enabled(phase == "train"), in_force(RunningBatch(batch, self.states, self.diagnostics, {})):
            unet(*inputs(2))


@pytest.mark.parametrize("mode", ["on", "shuffle"])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("phase", ["val", "test", "predict"])
def test_it_is_refused_in_evaluation_however_it_was_loaded(tmp_path: Path, mode: str, strict: bool, phase: str) -> None:
    run = Run(tmp_path, mode)
    run.unet.load_state_dict(SmallUNet().state_dict(), strict=strict)
    for unet in (run.unet, copy.deepcopy(run.unet)):
        with pytest.raises(CheckpointError, match=f"mode is {mode}"):
            run.forward(phase, is_fit=False, unet=unet)


def test_off_and_a_fresh_model_and_a_film_checkpoint_are_not(tmp_path: Path) -> None:
    off = Run(tmp_path, "off")
    off.unet.load_state_dict(SmallUNet().state_dict())
    off.forward("test", is_fit=False)
    run = Run(tmp_path)
    run.forward("test", is_fit=False)
    state = copy.deepcopy(run.unet.state_dict())
    run.unet.load_state_dict(SmallUNet().state_dict())
    run.unet.load_state_dict(state)
    run.forward("test", is_fit=False)


def test_fine_tuning_is_not_refused_nor_its_result(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.unet.load_state_dict(SmallUNet().state_dict())
    average = copy.deepcopy(run.unet)
    run.forward("val", is_fit=True)  # the sanity check before the first step
    run.forward("train", is_fit=True)
    for unet in (run.unet, average):
        run.forward("test", is_fit=False, unet=unet)
    run.unet.load_state_dict(SmallUNet().state_dict())  # and another baseline is one again
    with pytest.raises(CheckpointError):
        run.forward("test", is_fit=False)


def test_a_host_without_a_trainer_fine_tunes_where_there_is_an_optimizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path)
    run.unet.load_state_dict(SmallUNet().state_dict())
    # Of other tests in this process.
    monkeypatch.setattr("vlmfilm_plugin.run.running_batch.living_optimizers", list)
    with pytest.raises(CheckpointError):
        run.forward("predict", is_fit=True, has_trainer=False)
    monkeypatch.undo()
    optimizer = torch.optim.SGD(run.unet.parameters(), lr=0.1)
    run.forward("predict", is_fit=True, has_trainer=False)
    assert optimizer.param_groups


def test_strict_0_warns_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("VLM_FILM_STRICT", "0")
    run = Run(tmp_path)
    run.unet.load_state_dict(SmallUNet().state_dict())
    for _ in range(2):
        run.forward("test", is_fit=False)
    assert capsys.readouterr().out.count("would give a plain baseline's numbers") == 1
