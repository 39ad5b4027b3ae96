"""The settings of a checkpoint meet those of a run: for the models it loads, and for no other."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from small_unet import SmallUNet

from vlmfilm_plugin import CheckpointError, attach
from vlmfilm_plugin.checkpoints.facts import resolve_with
from vlmfilm_plugin.checkpoints.metadata import write_metadata
from vlmfilm_plugin.checkpoints.peek import facts_of
from vlmfilm_plugin.host_spec import UNet
from vlmfilm_plugin.run.runtime import Runtime

UNET = UNet(cls=SmallUNet, targets={"post_block2": "ups.*.1", "post_block1": "ups.*.0"})


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLM_FILM_MODE", raising=False)


def recorded(**settings: Any) -> dict[str, Any]:
    """Return a checkpoint of ours, of a UNet with these settings."""
    handle = attach(SmallUNet(), encoder="descriptor", **settings)
    checkpoint: dict[str, Any] = {"state_dict": handle.unet.state_dict()}
    write_metadata(handle.unet, handle.settings, checkpoint)
    return checkpoint


def test_a_model_built_after_a_checkpoint_was_loaded_takes_the_settings_of_the_run(tmp_path: Path) -> None:
    run = Runtime("on", {"VLM_FILM_ENCODER": "descriptor"}, str(tmp_path))
    saved = attach(SmallUNet(), encoder="descriptor", decoder_stages=[0], gamma_scale=0.5, cond_dim=32, apply_point="post_block1")
    checkpoint: dict[str, object] = {"state_dict": saved.unet.state_dict()}
    write_metadata(saved.unet, saved.settings, checkpoint)
    torch.save(checkpoint, tmp_path / "film.ckpt")
    built = []
    for path in (None, tmp_path / "film.ckpt", None):
        with run.loading(path) if path else nullcontext():
            built.append(run.attach(SmallUNet(), UNET))
    found = [
        [(a.apply_point, len(a.stages), a.gamma_scale, a.cond_dim)] for a in (handle.film.architecture for handle in built if handle is not None)
    ]
    assert found == [[("post_block2", 2, 0.1, 256)], [("post_block1", 1, 0.5, 32)], [("post_block2", 2, 0.1, 256)]]
    assert [run.states.settings_of(handle.film).cond_dim for handle in built if handle is not None] == [256, 32, 256]


def test_a_load_that_fails_leaves_no_settings_behind(tmp_path: Path) -> None:
    run = Runtime("on", {"VLM_FILM_ENCODER": "descriptor"}, str(tmp_path))
    saved = attach(SmallUNet(), encoder="descriptor", decoder_stages=[0])
    torch.save(saved.unet.state_dict(), tmp_path / "bare.pt")
    with pytest.raises(ZeroDivisionError), run.loading(tmp_path / "bare.pt"):
        assert run.settings.decoder_stages == (0,)
        raise ZeroDivisionError
    assert run.settings.decoder_stages is None


def test_a_setting_recorded_by_another_version_is_named_and_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = recorded(decoder_stages=[1])
    checkpoint["vlm_film"]["settings"] |= {"crop_policy": "centre", "model_name": "m"}
    facts = facts_of(checkpoint, "film.ckpt")
    settings = resolve_with(facts, {})
    assert settings.model_name == "m" and settings.decoder_stages == (1,)
    line = next(line for line in capsys.readouterr().out.splitlines() if "does not know" in line)
    assert "crop_policy" in line and "film.ckpt" in line


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        "film",
        [],
        {},
        {"architecture": {}},
        {"settings": {}, "architecture": {}},
        {"settings": [], "architecture": {}},
        {"settings": {}, "architecture": 3},
    ],
    ids=str,
)
def test_metadata_that_no_version_wrote_is_refused(metadata: Any) -> None:
    with pytest.raises(CheckpointError, match="cannot use this checkpoint's FiLM"):
        facts_of({"state_dict": {}, "vlm_film": metadata}, "film.ckpt")


def test_a_gate_that_a_checkpoint_was_trained_with_is_a_default_for_its_evaluation() -> None:
    facts = facts_of(recorded(spatial_gate="vessel_junctions"), "film.ckpt")
    assert resolve_with(facts, {}).spatial_gate == "vessel_junctions"
    assert resolve_with(facts, {}, arguments={"spatial_gate": None}).spatial_gate is None
    plain = facts_of(recorded(), "film.ckpt")
    assert resolve_with(plain, {}, arguments={"spatial_gate": "vessel_junctions"}).spatial_gate == "vessel_junctions"


def test_settings_that_agree_with_the_checkpoint_or_say_nothing_are_not_mentioned(capsys: pytest.CaptureFixture[str]) -> None:
    facts = facts_of(recorded(decoder_stages=[1], gamma_scale=0.3), "film.ckpt")
    capsys.readouterr()
    resolve_with(facts, {}, host={"decoder_stages": [1], "cache_dir": "x"})
    assert capsys.readouterr().out == ""
    resolve_with(facts, {}, host={"decoder_stages": None, "gamma_scale": 0.2})
    out = capsys.readouterr().out
    assert out.count("is not used") == 2 and "gamma_scale=0.2 is not used (from host config: gamma_scale)" in out
