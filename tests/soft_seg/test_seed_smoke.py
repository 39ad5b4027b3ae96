"""Section 8 of the text that started this: on, off and shuffle, mismatch errors, and the lines `[FILM-WARN]`, `[FILM-VAL]`, `[FILM-SHUFFLE]`.

Written from that section alone, against the public names.
"""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vlmfilm_plugin import AdaptiveFiLMHead, ImageToConditionVector, TextToConditionVector, VLMConditioner, VlmFilmError, apply_vlm_film

B, D, C = 6, 16, 8


class Decoder(nn.Module):
    """A model that applies FiLM by hand in one stage."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.vlm_film_heads = nn.ModuleList([head])

    def forward(self, x: Tensor, vlm_cond: dict[str, Any] | None) -> Tensor:
        x, self.payload = apply_vlm_film(x, vlm_cond=vlm_cond, vlm_film_heads=self.vlm_film_heads, stage_idx=0, module=self)
        return x


def model(*, is_trained: bool = True) -> Decoder:
    torch.manual_seed(0)
    head = AdaptiveFiLMHead(cond_dim=D, channels=C, hidden_dim=32)
    if is_trained:
        nn.init.normal_(head.mlp[2].weight)  # type: ignore[arg-type]
    return Decoder(head)


def condition(step: int, stage: str = "train", should_log: bool = True) -> dict[str, Any]:
    cond_vec = torch.randn(B, D, generator=torch.Generator().manual_seed(1))
    return {"cond_vec": cond_vec, "_dbg": {"stage": stage, "step": step, "B": B, "split_key": "train", "should_log": should_log}}


X = torch.randn(B, C, 4, 4, generator=torch.Generator().manual_seed(2))


def row(output: str, tag: str = "FILM-DBG") -> dict[str, Any]:
    (line,) = [line for line in output.splitlines() if line.startswith(f"[{tag}] ")]
    found: dict[str, Any] = json.loads(line.split(" ", 1)[1])
    return found


@pytest.fixture(autouse=True)
def no_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLM_FILM_MODE", raising=False)


@pytest.mark.parametrize("mode", [None, "on"])
def test_on_is_the_default_and_modulates(mode: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if mode is not None:
        monkeypatch.setenv("VLM_FILM_MODE", mode)
    unet, cond = model(), condition(1)
    gamma, beta = unet.vlm_film_heads[0](cond["cond_vec"])
    torch.testing.assert_close(unet(X, cond), gamma * X + beta)
    line = row(capsys.readouterr().out)
    assert (line["film_mode"], line["film_bypass"], line["step"], line["stage"]) == ("on", False, 1, "train")
    assert line["max_abs_diff"] > 0 and line["gamma_dev_std"] > 0 and line["beta_norm_std"] > 0


def test_off_bypasses_to_the_bit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("VLM_FILM_MODE", "off")
    assert torch.equal(model()(X, condition(1)), X)
    line = row(capsys.readouterr().out)
    assert (line["film_mode"], line["film_bypass"], line["gamma_mean"], line["beta_mean"], line["max_abs_diff"]) == ("off", True, 1, 0, 0)


def test_shuffle_permutes_cond_vec_and_logs_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("VLM_FILM_MODE", "shuffle")
    unet, cond = model(), condition(3)
    found = unet(X, cond)
    output = capsys.readouterr().out
    match = re.search(r"^\[FILM-SHUFFLE\] perm_first10=(\[.*\])$", output, re.MULTILINE)
    assert match
    permutation = json.loads(match.group(1))
    assert sorted(permutation) == list(range(B)) and all(place != value for place, value in enumerate(permutation))
    gamma, beta = unet.vlm_film_heads[0](cond["cond_vec"][permutation])
    torch.testing.assert_close(found, gamma * X + beta)
    assert re.fullmatch(r"[0-9a-f]{8}", row(output)["shuffle_perm_hash"])
    assert torch.equal(unet(X, cond), found) and not torch.equal(unet(X, condition(4)), found)


def test_mismatches_are_errors_that_name_what_was_got_and_expected() -> None:
    for projection in (ImageToConditionVector(4, D), TextToConditionVector(4, D), AdaptiveFiLMHead(4, C)):
        with pytest.raises(RuntimeError, match=r"(?s)got: +5.*expected: +4.*\(2, 5\)"):
            projection(torch.zeros(2, 5))
    unet = model()
    for wrong in (torch.zeros(B, D + 1), torch.zeros(B - 1, D)):
        with pytest.raises(VlmFilmError):
            unet(X, {"cond_vec": wrong})
    with pytest.raises(VlmFilmError):
        unet(X[:, :-1], condition(1))
    with pytest.raises(VlmFilmError):
        VLMConditioner(pool="max")


def test_film_warn_comes_with_the_fifth_constant_call_in_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    unet = model(is_trained=False)
    for step in range(4):
        unet(X, condition(step))
    assert "[FILM-WARN]" not in capsys.readouterr().out
    unet(X, condition(4))
    assert capsys.readouterr().out.count("[FILM-WARN]") == 1
    moving = model()
    for step in range(8):
        moving(X, condition(step))
    assert "[FILM-WARN]" not in capsys.readouterr().out


def test_film_val_sums_a_validation_up_when_training_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    unet = model()
    unet(X, condition(0))
    unet.eval()
    for scale in (1.0, 2.0):
        unet(scale * X, condition(0, "val"))
    output = capsys.readouterr().out
    assert "[FILM-VAL]" not in output
    logged = [json.loads(line.split(" ", 1)[1]) for line in output.splitlines() if line.startswith("[FILM-DBG]")][1:]
    unet.train()
    unet(X, condition(1))
    line = row(capsys.readouterr().out, "FILM-VAL")
    assert line["stage"] == "val" and line["logged_steps"] == 2
    for name in ("gamma_dev_mean", "beta_norm_mean", "rel_delta_mean", "x_pre_norm_mean", "cond_norm_mean"):
        assert line[name] == pytest.approx(sum(one[name] for one in logged) / 2, abs=1e-6)
    unet(X, condition(2))
    assert "[FILM-VAL]" not in capsys.readouterr().out


def test_film_shuffle_is_written_once_an_epoch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("VLM_FILM_MODE", "shuffle")
    unet = model()
    for _ in range(2):
        unet.train()
        for step in range(3):
            unet(X, condition(step, should_log=False))
        assert capsys.readouterr().out.count("[FILM-SHUFFLE]") == 1
        unet.eval()
        unet(X, condition(3, "val", should_log=False))
        capsys.readouterr()
