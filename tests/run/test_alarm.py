"""The alarm of a condition that no longer reaches the decoder: it sees what kills a run, and is silent over every run that lives.

Runs are real ones, by the runtime, of a net of three stages on features of which the class is one direction among many.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from vlmfilm_plugin.encoders.base import EncoderIdentity
from vlmfilm_plugin.encoders.registry import ENCODERS
from vlmfilm_plugin.film.heads import HeadShape, register_head
from vlmfilm_plugin.film.layers import AdaptiveFiLMHead, modulate
from vlmfilm_plugin.film.module import FilmModule
from vlmfilm_plugin.film.statistics import differing_energy
from vlmfilm_plugin.host_spec import UNet
from vlmfilm_plugin.run.runtime import Runtime

IMAGES, WIDTH = 64, 96


class Table:
    """An encoder that looks a feature up by the grey value of an image."""

    is_loaded = True
    feature_dim = WIDTH

    def __init__(self, features: Tensor) -> None:
        self.features = features
        self.identity = EncoderIdentity({"encoder": "table", "sum": float(features.sum())})

    def encode(self, images: Sequence[Image.Image]) -> Tensor:
        return torch.stack([self.features[int(np.asarray(image.convert("L"))[0, 0]) % IMAGES] for image in images])

    def release(self) -> None:
        pass


class Block(nn.Module):
    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(inner, outer, 3, padding=1), nn.GroupNorm(4, outer)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.silu(self.norm(self.conv(x)))


class ThreeStages(nn.Module):
    def __init__(self, run: Callable[..., Tensor] = lambda block, x: block(x)) -> None:
        super().__init__()
        self.ups, self.last, self.run = nn.ModuleList([Block(1, 16), Block(16, 16), Block(16, 16)]), nn.Conv2d(16, 1, 1), run

    def forward(self, x: Tensor) -> Tensor:
        for block in self.ups:
            x = self.run(block, x)
        return self.last(x)


def table(offset: float, signal: float = 0.1, seed: int = 0) -> Tensor:
    """Return features of two classes, in turns, with a common offset (6: mean cosine 0.97)."""
    g = torch.Generator().manual_seed(seed)
    noise, direction, common = (torch.randn(*shape, generator=g) for shape in ((IMAGES, WIDTH), (WIDTH,), (WIDTH,)))
    sign = (torch.arange(IMAGES) % 2 * 2 - 1)[:, None]
    return noise + sign * signal * WIDTH**0.5 * nn.functional.normalize(direction, dim=0) + offset * common


class Training:
    """A training by the runtime."""

    global_step = current_epoch = 0

    def __init__(
        self, folder: Path, capsys: pytest.CaptureFixture[str], features: Tensor, mode: str = "on", unet: nn.Module | None = None, **settings: Any
    ) -> None:
        ENCODERS["table"] = lambda _: Table(features)
        environ = {
            "encoder": "table",
            "cache_dir": "cache",
            "accept_narrow_range": True,
            "feature_transform": "none",
            "film_debug_lines": "full",
        } | settings
        self.runtime = Runtime(mode, {f"VLM_FILM_{name.upper()}": str(value) for name, value in environ.items()}, str(folder))
        self.capsys, self.files = capsys, []
        for value in range(IMAGES):
            path = folder / f"{value}.png"
            Image.fromarray(np.full((12, 12), value, dtype=np.uint8)).save(path)
            self.files.append(str(path))
        self.g = torch.Generator().manual_seed(1)
        torch.manual_seed(0)
        self.unet = unet or ThreeStages()
        self.runtime.attach(self.unet, UNet(cls=ThreeStages, targets={"post_block2": "ups.*"}, condition=None))
        self.film: FilmModule = self.unet.vlm_film  # type: ignore[assignment]
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), lr=3e-3)
        self.written = ""

    def step(self, rows: Sequence[int] | None = None, *, batches: int = 1, loss: bool = True, size: int = 8) -> None:
        for _ in range(batches):
            index = torch.randint(0, IMAGES, (size,), generator=self.g) if rows is None else torch.tensor(rows)
            x = torch.randn(len(index), 1, 12, 12, generator=self.g)
            batch = {"image": x, "filepath": [self.files[i] for i in index]}
            with self.runtime.batch(batch, phase="train", value_range=(0.0, 1.0), owner=self):
                y = self.unet(x)
            if loss:
                truth = torch.where(index[:, None, None, None] % 2 == 1, x > 0.7, x < -0.7).float()
                nn.functional.binary_cross_entropy_with_logits(y.float(), truth).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.global_step += 1

    def train(self, steps: int, **kwargs: Any) -> Training:
        for _ in range(steps):
            self.step(**kwargs)
        self.written += self.capsys.readouterr().out
        return self

    def lines(self, start: str = "[FILM-WARN]") -> list[str]:
        self.written += self.capsys.readouterr().out
        return [line for line in self.written.splitlines() if line.startswith(start)]

    def kill(self, *stages: int, value: float = 20.0) -> Training:
        """Saturate the heads of these stages, as training does."""
        with torch.no_grad():
            for stage in stages:
                self.film.heads[stage].mlp[2].bias.fill_(value)  # type: ignore[index, union-attr]
        return self

    def move(self) -> Training:
        """Move every head off the identity, alive."""
        with torch.no_grad():
            for head in self.film.heads:
                head.mlp[2].weight.copy_(torch.randn(head.mlp[2].weight.shape, generator=self.g))  # type: ignore[index, union-attr]
        return self


@pytest.fixture(autouse=True)
def an_encoder_of_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENCODERS, "table", lambda _: Table(table(0.0)))


def test_features_that_are_alike_are_warned_about_within_100_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Training(tmp_path, capsys, table(6.0)).train(101)
    lines = run.lines()
    assert lines and "the condition no longer reaches the decoder" in lines[0] and "feature_transform: center" in lines[0]
    assert int(lines[0].split("step ")[1].split(":")[0]) <= 100
    assert "lie at their bounds" in lines[0], "the likely cause"
    energy = run.lines("[VLM] condition at step 0")
    assert len(energy) == 1 and "the features are alike" in energy[0]


def test_a_run_that_learns_is_never_warned_though_its_heads_lie_at_their_bounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Training(tmp_path, capsys, table(0.0)).train(201)
    assert run.lines() == []
    rows = [line for line in run.lines("[FILM-DBG]") if '"step": 200' in line]
    assert len(rows) == 3 and all('"gamma_between_images"' in row for row in rows)
    assert max(float(row.split('"gamma_at_bound": ')[1].split(",")[0]) for row in rows) > 0.8


def test_the_energy_is_that_of_the_first_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    features = table(2.0)
    run = Training(tmp_path, capsys, features)
    share = float(differing_energy(run.film.project(features[:4])))
    run.train(1, rows=[0, 1, 2, 3])
    assert f"{100 * share:.1f} % of the energy" in run.lines("[VLM] condition at step 0")[0]


def test_batches_of_one_image_are_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Training(tmp_path, capsys, table(0.0))
    run.step([0])
    assert run.lines("[VLM] condition") == [], "one image differs from nothing"
    run.step([1])
    assert len(run.lines("[VLM] condition at step 1")) == 1
    run.kill(0, 1, 2)
    for step in range(23):
        run.step([step + 2])
    assert len(run.lines()) == 1
    assert Training(tmp_path, capsys, table(0.0)).move().train(26, size=1).lines() == []


@pytest.mark.parametrize("what", ["rows of one image", "two files of one image"])
def test_one_image_is_no_verdict_and_equal_features_of_two_are(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    features = table(0.0)
    features[1] = features[0]
    rows = [0] * 8 if what == "rows of one image" else [0, 1] * 4
    run = Training(tmp_path, capsys, features).move().train(30, rows=rows)
    assert bool(run.lines()) == (what == "two files of one image")


@pytest.mark.parametrize("mode", ["shuffle", "off"])
def test_controls_are_exempt(mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Training(tmp_path, capsys, table(0.0), mode, film_log_every_n_steps_train=10).kill(0, 1, 2)
    assert run.train(30, loss=False).lines() == [] and run.lines("[VLM] condition") == []


@pytest.mark.parametrize("control", ["constant", "random", "zero"])
def test_trained_controls_are_exempt_and_named_in_every_line(control: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Training(tmp_path, capsys, table(6.0), feature_control=control, feature_transform="center").train(60)
    assert run.lines() == [] and f"feature_control={control} (a control" in run.lines("[VLM] FiLM attached")[0]
    lines = run.lines("[FILM-DBG]")
    assert lines and all(f'"feature_control": "{control}"' in line for line in lines)
    if control == "random":
        own = run.film.transform(table(6.0)[:2], [f"train:{run.files[0]}", f"train:{run.files[1]}"])
        again = Training(tmp_path, capsys, table(0.0), feature_control=control, feature_transform="none").train(2)
        scale: Any = again.film.control.scale / run.film.control.scale  # type: ignore[union-attr]
        assert torch.allclose(again.film.transform(table(3.0)[:2], [f"train:{file}" for file in run.files[:2]]), own * scale)


def test_fresh_heads_that_have_not_moved_are_exempt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert Training(tmp_path, capsys, table(6.0)).train(101, loss=False).lines() == []


def test_a_learning_rate_that_hardly_moves_anything_raises_no_alarm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Training(tmp_path, capsys, table(6.0), film_log_every_n_steps_train=5)
    run.optimizer.param_groups[0]["lr"] = 1e-7
    assert run.train(51).lines() == []


def test_accumulation_counts_steps_not_batches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Training(tmp_path, capsys, table(0.0)).kill(0, 1, 2)
    run.global_step = 1000  # resumed
    run.train(24, batches=4, loss=False)
    assert all("step 1023" not in line for line in run.lines()) and len(run.lines()) == 1, "said once, at its first reading"
    assert "step 1001" in run.lines()[0] or "step 1000" in run.lines()[0]


def test_a_stage_that_died_alone_is_named_and_so_is_its_return(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Training(tmp_path, capsys, table(0.0), film_log_every_n_steps_train=10).move().kill(1)
    run.film.heads[1].mlp[2].weight.data.zero_()  # type: ignore[index, union-attr]
    run.train(11, loss=False)
    assert len(run.lines()) == 1 and "at stage 1 (it does reach stages 0, 2)" in run.lines()[0]
    run.kill(1, value=0.0).move().train(10, loss=False)
    assert len(run.lines()) == 1 and "it reaches decoder stage 1 again" in run.lines("[VLM] condition at")[-1]
    run.kill(1)
    run.film.heads[1].mlp[2].weight.data.zero_()  # type: ignore[index, union-attr]
    assert len(run.train(10, loss=False).lines()) == 2, "it died again"


def test_a_faint_spread_is_warned_about_once_it_has_lasted_25_steps_and_one_that_passes_never(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Training(tmp_path, capsys, table(0.0), film_log_every_n_steps_train=10).kill(0, 1, 2, value=5.0)
    for head in run.film.heads:
        torch.nn.init.normal_(head.mlp[2].weight, std=0.05, generator=run.g)  # type: ignore[index, union-attr]
    assert run.train(21, loss=False).lines() == []
    faint = [line for line in run.lines("[FILM-DBG]") if '"step": 20' in line]
    assert all(1e-6 < float(line.split('"gamma_between_images": ')[1].split(",")[0]) < 1e-4 for line in faint), "far from the same, far from 0.1"
    assert len(run.train(10, loss=False).lines()) == 1 and "step 30" in run.lines()[0]
    passing = Training(tmp_path, capsys, table(0.0), film_log_every_n_steps_train=10).kill(0, 1, 2, value=5.0)
    for head in passing.film.heads:
        torch.nn.init.normal_(head.mlp[2].weight, std=0.05, generator=run.g)  # type: ignore[index, union-attr]
    assert passing.train(15, loss=False).kill(0, 1, 2, value=0.0).train(30, loss=False).lines() == []


def test_unbounded_heads_that_ignore_the_condition_are_seen_without_a_word_of_bounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Training(tmp_path, capsys, table(0.0), gamma_scale="null", beta_scale="null").kill(0, 1, 2, value=0.5).train(26, loss=False)
    assert len(run.lines()) == 1 and "bounds" not in run.lines()[0] and "feature_transform" in run.lines()[0]


class OnlyBeta(nn.Module):
    """A head without bounds or gamma, with what must not be disturbed: a draw in training and a count."""

    gamma_scale = "none of yours"

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        self.channels, self.linear, self.drop = shape.channels, nn.Linear(shape.cond_dim, shape.channels), nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))
        self.reset()

    def forward(self, cond_vec: Tensor) -> tuple[Tensor, Tensor]:
        if self.training:
            self.calls += 1  # type: ignore[operator]
        beta = self.linear(self.drop(cond_vec))[:, :, None, None]
        return torch.ones_like(beta), beta

    def modulate(self, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return modulate(x, gamma, beta)

    def reset(self) -> None:
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def change_probes(self) -> list[Tensor]:
        return [self.linear.bias]


def test_a_head_of_ones_own_is_judged_by_what_it_does_and_not_disturbed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    undo = register_head("only_beta", OnlyBeta)
    try:
        ends = []
        for every in (1, 10**6):
            run = Training(tmp_path, capsys, table(0.0), head="only_beta", film_log_every_n_steps_train=every)
            if every > 1:
                run.runtime.diagnostics.alarm(run.film.film_id, run.runtime.settings).is_due = lambda step: False  # type: ignore[method-assign]
            run.train(6)
            assert run.lines() == []
            ends.append((run.film.state_dict(), torch.random.get_rng_state()))
        assert torch.equal(ends[0][1], ends[1][1]), "no random number was drawn"
        assert all(torch.equal(ends[0][0][name], ends[1][0][name]) for name in ends[0][0])
        with torch.no_grad():
            for head in run.film.heads:
                head.linear.weight.zero_()  # type: ignore[union-attr]
                head.linear.bias.fill_(0.3)  # type: ignore[union-attr]
        run = Training(tmp_path, capsys, table(0.0), head="only_beta", unet=None)
        with torch.no_grad():
            for head in run.film.heads:
                head.linear.bias.fill_(0.3)  # type: ignore[union-attr]
        assert len(run.train(2, loss=False).lines()) == 1
    finally:
        undo()


def test_a_run_that_is_watched_is_the_run_that_is_not_to_the_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ends = []
    for is_watched in (True, False):
        run = Training(tmp_path, capsys, table(6.0), film_log_every_n_steps_train=3 if is_watched else 10**6)
        run.train(12)
        ends.append(run.unet.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_half_precision_and_checkpointing_are_watched_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from torch.utils.checkpoint import checkpoint

    runners: dict[str, Callable[..., Tensor]] = {
        "reentrant": lambda block, x: checkpoint(block, x, use_reentrant=True),
        "not reentrant": lambda block, x: checkpoint(block, x, use_reentrant=False),
        "bfloat16": lambda block, x: block(x),
    }
    for kind, run_block in runners.items():
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "bfloat16"):
            dead = Training(tmp_path, capsys, table(0.0), unet=ThreeStages(run_block)).kill(0, 1, 2)
            assert len(dead.train(3).lines()) == 1, kind
            alive = Training(tmp_path, capsys, table(0.0), unet=ThreeStages(run_block)).move()
            assert alive.train(26).lines() == [], kind


def test_compiled_stages_are_watched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Training(tmp_path, capsys, table(0.0)).kill(0, 1, 2)
    run.unet.compile(backend="eager", fullgraph=False)
    assert len(run.train(3).lines()) == 1
    alive = Training(tmp_path, capsys, table(0.0)).move()
    alive.unet.compile(backend="eager", fullgraph=False)
    assert alive.train(26).lines() == []


def test_what_diverged_is_no_matter_of_the_condition(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert Training(tmp_path, capsys, table(0.0)).kill(0, value=float("nan")).train(3, loss=False).lines() == []


def test_a_switched_off_diagnosis_still_warns_and_writes_no_statistics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Training(tmp_path, capsys, table(0.0), film_debug_enabled=False).kill(0, 1, 2).train(30, loss=False)
    assert len(run.lines()) == 1 and run.lines("[FILM-DBG]") == []


def test_what_is_kept_is_bounded_and_held_by_reference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Training(tmp_path, capsys, table(0.0)).train(20)
    alarm = run.runtime.diagnostics.alarm(run.film.film_id, run.runtime.settings)
    assert len(alarm._kept) == 32
    big = torch.randn(100, WIDTH)
    alarm.collect([f"big{i}" for i in range(100)], big)
    assert len(alarm._kept) == 32 and {id(kept) for kept, _ in alarm._kept.values()} == {id(big)}


def test_the_heads_are_asked_at_the_said_steps_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Training(tmp_path, capsys, table(0.0), film_log_every_n_steps_train=40)
    asked: list[int] = []
    run.film.heads[0].register_forward_hook(lambda *_: asked.append(run.global_step) if not run.film.training else None)
    run.train(125, loss=False)
    assert asked == [0, 24, 40, 49, 80, 99, 120]
    assert run.film.training and all(isinstance(head, AdaptiveFiLMHead) and head.training for head in run.film.heads)
