"""The log lines of a FiLM run: complete, one line each, as often as promised, and free outside logged steps."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_unet import SmallUNet, inputs, randomise
from torch import Tensor, nn

from vlmfilm_plugin.film.statistics import statistics
from vlmfilm_plugin.host_spec import HostSpec, Steps, UNet
from vlmfilm_plugin.hosts.patches import patch_host
from vlmfilm_plugin.run.log_fields import StepFacts
from vlmfilm_plugin.run.log_lines import Diagnostics
from vlmfilm_plugin.run.runtime import Runtime
from vlmfilm_plugin.settings.layers import resolve

FIELDS = [
    "stage",
    "step",
    "B",
    "split_key",
    "cache_key_example",
    "cond_source",
    "cond_dim",
    "cond_norm_mean",
    "cond_norm_std",
    "cond_cos_mean",
    "cond_cos_min",
    "cond_cos_max",
    "film_mode",
    "film_bypass",
    "gamma_mean",
    "gamma_std",
    "gamma_dev_mean",
    "gamma_dev_std",
    "beta_mean",
    "beta_std",
    "beta_norm_mean",
    "beta_norm_std",
    "x_pre_norm_mean",
    "x_post_norm_mean",
    "mean_abs_diff",
    "max_abs_diff",
    "rel_delta_mean",
    "rel_delta_p50",
    "rel_delta_p95",
    "cache_total",
    "cache_hit",
    "cache_miss",
    "hit_rate",
    "mem_hit",
    "disk_hit",
    "mixed_keys",
    "shuffle_perm_hash",
    "film_apply_point",
    "film_stage_idx",
]
SPEC = UNet(cls=SmallUNet, targets={"post_block2": "ups.*.1", "post_block1": "ups.*.0"})


class Owner:
    """What a Lightning module shows of itself."""

    def __init__(self) -> None:
        self.global_step, self.current_epoch = 0, 0


class Run:
    """A runtime, an attached UNet, and the lines it wrote."""

    def __init__(self, tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str = "on", *, is_moved: bool = True, **settings: object) -> None:
        environ = {"VLM_FILM_ENCODER": "descriptor", "VLM_FILM_CACHE_DIR": "cache", "VLM_FILM_COND_DIM": "4", "VLM_FILM_FEATURE_TRANSFORM": "none"}
        environ["VLM_FILM_FILM_DEBUG_LINES"] = "full"
        environ |= {f"VLM_FILM_{name.upper()}": str(value) for name, value in settings.items()}
        self.capsys, self.owner = capsys, Owner()
        self.runtime = Runtime(mode, environ, str(tmp_path))
        torch.manual_seed(0)
        self.unet = SmallUNet()
        self.runtime.attach(self.unet, SPEC)
        if is_moved:
            randomise(self.unet.vlm_film)
        capsys.readouterr()

    def step(self, phase: str = "train", rows: int = 3, forwards: int = 1, batch_idx: int = 0, seed: int = 0, backward: bool = False) -> None:
        image = torch.rand(rows, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
        batch = {"image": image, "name": [f"s{seed}_{i}.png" for i in range(rows)], "split": phase}
        with (
            self.runtime.batch(batch, phase=phase, value_range=(0.0, 1.0), owner=self.owner, batch_idx=batch_idx),
            torch.set_grad_enabled(phase == "train"),
        ):
            outs = [self.unet(*inputs(rows, seed=seed)) for _ in range(forwards)]
        if backward:
            torch.stack([out.sum() for out in outs]).sum().backward()

    def train(self, steps: range, **kwargs: Any) -> None:
        for step in steps:
            self.owner.global_step = step
            self.step(**kwargs)

    def lines(self, tag: str) -> list[str]:
        self.last = self.capsys.readouterr().out
        return [line for line in self.last.splitlines() if line.startswith(tag)]

    def rows(self, tag: str = "[FILM-DBG]") -> list[dict[str, Any]]:
        return [parse(line, tag) for line in self.lines(tag)]


def parse(line: str, tag: str) -> dict[str, Any]:
    """Read one line as strict JSON: NaN and Infinity are not JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in {line}")

    row: dict[str, Any] = json.loads(line.removeprefix(tag + " "), parse_constant=refuse)
    return row


@pytest.mark.parametrize("mode", ["on", "off", "shuffle"])
def test_a_logged_step_writes_every_field_once_a_stage(mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path, capsys, mode)
    run.step(forwards=3)
    rows = run.rows()
    assert [row["film_stage_idx"] for row in rows] == [0, 1]
    for row in rows:
        assert set(FIELDS) <= set(row)
        assert (row["stage"], row["step"], row["B"]) == ("train", 0, 3)
        assert (row["film_mode"], row["film_bypass"], row["film_apply_point"]) == (mode, mode == "off", "post_block2")


def test_values_are_those_of_the_forward(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path, capsys)
    seen: list[Tensor] = []
    # Runs before FiLM's own hook on the block and after it.
    run.unet.ups[0][1].register_forward_hook(lambda m, a, out: seen.append(out.detach().clone()), prepend=True)
    run.unet.ups[0][1].register_forward_hook(lambda m, a, out: seen.append(out.detach().clone()))
    run.step()
    row, (x, y) = run.rows()[0], seen
    norms = [tensor.flatten(1).norm(dim=1) for tensor in (x, y, y - x)]
    assert row["x_pre_norm_mean"] == pytest.approx(float(norms[0].mean()), abs=1e-5)
    assert row["x_post_norm_mean"] == pytest.approx(float(norms[1].mean()), abs=1e-5)
    assert row["rel_delta_mean"] == pytest.approx(float((norms[2] / norms[0]).mean()), abs=1e-5)
    assert row["max_abs_diff"] == pytest.approx(float((y - x).abs().max()), abs=1e-6)
    assert row["mean_abs_diff"] == pytest.approx(float((y - x).abs().mean()), abs=1e-6)
    assert 0 < row["mean_abs_diff"] < row["max_abs_diff"]
    assert row["cond_dim"] == 4
    assert -1 <= row["cond_cos_min"] <= row["cond_cos_mean"] <= row["cond_cos_max"] <= 1.000001
    assert row["cache_key_example"].startswith("train:")
    assert row["split_key"] == "train"


def test_cache_counts_are_those_of_the_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path, capsys, film_log_every_n_steps_train=1)
    run.train(range(2))
    first, second = run.rows()[::2]
    assert [first[name] for name in ("cache_total", "cache_miss", "cache_hit", "hit_rate")] == [3, 3, 0, 0.0]
    assert [second[name] for name in ("cache_total", "cache_miss", "cache_hit", "mem_hit", "disk_hit", "hit_rate")] == [3, 0, 3, 3, 0, 1.0]


def test_off_reports_the_identity(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path, capsys, "off")
    run.step()
    for row in run.rows():
        assert (row["gamma_mean"], row["gamma_std"], row["beta_mean"], row["max_abs_diff"], row["rel_delta_mean"]) == (1, 0, 0, 0, 0)
        assert row["cond_norm_mean"] is None


def test_steps_are_logged_every_so_many_from_the_first_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path, capsys)
    run.train(range(0, 201))
    assert [row["step"] for row in run.rows()] == [0, 0, 100, 100, 200, 200]
    for batch_idx in range(21):
        run.step("val", rows=1, batch_idx=batch_idx)
    assert [row["batch_idx"] for row in run.rows()] == [0, 0, 20, 20]


def test_gradient_accumulation_logs_a_step_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path, capsys, film_log_every_n_steps_train=2)
    for step in (0, 1, 2):
        run.owner.global_step = step
        for batch_idx in range(4):
            run.step(batch_idx=4 * step + batch_idx, seed=batch_idx)
    assert [(row["step"], row["batch_idx"], row["film_stage_idx"]) for row in run.rows()] == [(0, 0, 0), (0, 0, 1), (2, 8, 0), (2, 8, 1)]


def test_validation_in_the_middle_of_an_accumulation_does_not_log_the_step_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path, capsys)
    run.step()
    run.step("val", rows=1)
    run.step(batch_idx=1)
    assert [row["stage"] for row in run.rows()].count("train") == 2


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recompute_in_backward_does_not_log_again(use_reentrant: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path, capsys)
    run.unet.use_reentrant = use_reentrant
    run.step(backward=True)
    assert len(run.rows()) == 2


def test_a_diverged_run_still_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path, capsys)
    with torch.no_grad():
        run.unet.stem.weight.fill_(float("nan"))
    run.step()
    rows = run.rows()
    assert len(rows) == 2
    assert rows[0]["gamma_mean"] == pytest.approx(1, abs=0.2)


def test_a_single_row_has_no_cosines_and_no_nan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path, capsys)
    run.step(rows=1)
    assert [(row["cond_cos_mean"], row["cond_norm_std"]) for row in run.rows()] == [(None, 0.0)] * 2


def test_nothing_is_read_from_a_device_outside_logged_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, capsys)
    run.step()
    reads: list[str] = []
    for name in ("__float__", "__int__", "__bool__", "__index__", "item", "tolist", "numpy"):
        original = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda self, *args, _name=name, _original=original: (reads.append(_name), _original(self, *args))[1])
    # A new batch is named by its content, which reads the image; FiLM itself must read nothing.
    image = torch.rand(3, 1, 8, 8)
    run.owner.global_step = 1
    with run.runtime.batch({"image": image}, phase="train", value_range=(0.0, 1.0), owner=run.owner):
        run.unet(*inputs(3))
        reads.clear()
        for _ in range(3):
            run.unet(*inputs(3))
        assert reads == []
    run.owner.global_step = 100
    with run.runtime.batch({"image": image}, phase="train", value_range=(0.0, 1.0), owner=run.owner):
        run.unet(*inputs(3))
    assert reads.count("__float__") > 20


def test_off_reads_nothing_outside_logged_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, capsys, "off")
    run.step()
    monkeypatch.setattr(Tensor, "__bool__", lambda self: pytest.fail("a tensor was read"))
    monkeypatch.setattr(Tensor, "__float__", lambda self: pytest.fail("a tensor was read"))
    run.train(range(1, 4))


# FILM-VAL


def test_validation_means_are_written_when_training_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path, capsys, film_log_every_n_steps_val=2)
    for batch_idx in range(5):
        run.step("val", rows=1, batch_idx=batch_idx, seed=batch_idx)
    debug = run.rows()
    assert not [line for line in run.last.splitlines() if line.startswith("[FILM-VAL]")]
    run.step()
    run.step()
    (row,) = run.rows("[FILM-VAL]")
    assert (row["stage"], row["logged_steps"], row["film_mode"]) == ("val", 3, "on")
    for name in ("gamma_mean", "beta_norm_mean", "rel_delta_p95", "cond_norm_mean"):
        assert row[name] == pytest.approx(sum(line[name] for line in debug) / len(debug), abs=1e-6)


def test_validation_means_are_written_at_the_end_and_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path, capsys)
    run.step("val", rows=1)
    run.runtime.diagnostics.report_validation()
    run.runtime.diagnostics.report_validation()
    assert len(run.rows("[FILM-VAL]")) == 1
    run.step("test", rows=1)
    run.runtime.diagnostics.report_validation()
    assert run.rows("[FILM-VAL]") == []


def test_a_mean_that_does_not_exist_in_the_first_row_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path, capsys, film_log_every_n_steps_val=1)
    for batch_idx, rows in enumerate((1, 3, 2)):
        run.step("val", rows=rows, batch_idx=batch_idx, seed=batch_idx)
    # A batch of one has no cosines.
    debug = [row["cond_cos_mean"] for row in run.rows() if row["film_stage_idx"] == 0]
    assert debug[0] is None and None not in debug[1:]
    run.step()
    (row,) = run.rows("[FILM-VAL]")
    assert row["cond_cos_mean"] == pytest.approx(sum(debug[1:]) / 2, abs=1e-6)


def test_another_phase_than_training_ends_a_validation_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path, capsys)
    run.step("val", rows=1)
    run.step("test", rows=1)
    assert len(run.rows("[FILM-VAL]")) == 1


def test_a_validation_alone_writes_its_means(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lightning = pytest.importorskip("lightning.pytorch")

    class Net(SmallUNet):
        pass

    class Model(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.unet = Net()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.unet(*inputs(len(batch["image"])))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    steps = Steps(cls=Model, phases={"validation_step": "val"}, value_range=(0.0, 1.0))
    spec = HostSpec(name="tiny", unets=[UNet(cls=Net, targets=SPEC.targets)], models=[Model], steps=[steps])
    patch_host(sys.modules[__name__], spec, Run(tmp_path, capsys, unnamed_rows="content").runtime)
    loader = torch.utils.data.DataLoader([{"image": torch.rand(1, 8, 8), "name": f"{i}.png"} for i in range(3)])
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(accelerator="cpu", devices=1, **options)
    for _ in range(2):
        capsys.readouterr()
        trainer.validate(Model(), loader, verbose=False)
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[FILM-VAL] ")]
        assert len(lines) == 1 and json.loads(lines[0].split(" ", 1)[1])["stage"] == "val"


# FILM-WARN


def test_constant_gamma_and_beta_warn_after_exactly_five_logged_intervals_and_only_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path, capsys, is_moved=False, film_log_every_n_steps_train=2)
    run.train(range(0, 8))
    assert run.lines("[FILM-WARN]") == []
    run.train(range(8, 10))
    warnings = run.lines("[FILM-WARN]")
    assert len(warnings) == 2
    assert "decoder stage 0" in warnings[0] and "step 8" in warnings[0]
    run.train(range(10, 40))
    assert run.lines("[FILM-WARN]") == []


def test_an_interval_that_moves_starts_the_count_anew_for_its_stage_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path, capsys, is_moved=False, film_log_every_n_steps_train=1)
    bias = run.unet.vlm_film.heads[1].mlp[2].bias
    run.train(range(0, 4))
    with torch.no_grad():
        bias.copy_(torch.randn_like(bias))
    run.train(range(4, 5))
    assert ["stage 0" in line for line in run.lines("[FILM-WARN] decoder stage")] == [True]
    with torch.no_grad():
        bias.zero_()
    run.train(range(5, 9))
    assert run.lines("[FILM-WARN] decoder stage") == []
    run.train(range(9, 10))
    assert ["stage 1" in line for line in run.lines("[FILM-WARN] decoder stage")] == [True]


def test_two_models_of_one_process_count_for_themselves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path, capsys, is_moved=False, film_log_every_n_steps_train=1)
    first, second = run.unet, SmallUNet()
    run.runtime.attach(second, SPEC)
    for step in range(4):
        run.owner.global_step = step
        image = torch.rand(2, 1, 8, 8)
        with run.runtime.batch({"image": image}, phase="train", value_range=(0.0, 1.0), owner=run.owner):
            first(*inputs(2))
            second(*inputs(2))
    assert run.lines("[FILM-WARN]") == []
    with run.runtime.batch({"image": torch.rand(2, 1, 8, 8)}, phase="val", value_range=(0.0, 1.0), owner=run.owner, batch_idx=0):
        first(*inputs(2))
        second(*inputs(2))
    run.step()
    assert len(run.rows("[FILM-VAL]")) == 2


@pytest.mark.parametrize(("mode", "phase"), [("off", "train"), ("on", "val")])
def test_off_and_validation_never_warn(mode: str, phase: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path, capsys, mode, is_moved=False, film_log_every_n_steps_train=1, film_log_every_n_steps_val=1)
    for index in range(8):
        run.owner.global_step = index
        run.step(phase, rows=1, batch_idx=index)
    assert run.lines("[FILM-WARN]") == []


# FILM-SHUFFLE and cache_stats


def test_the_permutation_is_written_once_an_epoch_and_seeded_by_the_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path, capsys, "shuffle", film_log_every_n_steps_train=1)
    lines = []
    for epoch in (0, 1):
        run.owner.current_epoch = epoch
        run.train(range(3 * epoch, 3 * epoch + 3), rows=12)
        lines.append(run.lines("[FILM-SHUFFLE]"))
        hashes = [parse(line, "[FILM-DBG]")["shuffle_perm_hash"] for line in run.last.splitlines() if line.startswith("[FILM-DBG]")]
        assert len(set(hashes)) == 3
        assert all(len(value) == 8 and int(value, 16) >= 0 for value in hashes)
    assert [len(found) for found in lines] == [1, 1]
    permutation = json.loads(lines[0][0].split("perm_first10=")[1])
    assert len(permutation) == 10
    assert all(value != place for place, value in enumerate(permutation))
    twin = Run(tmp_path, capsys, "shuffle")
    twin.step(rows=12)
    assert twin.lines("[FILM-SHUFFLE]") == lines[0]


def test_a_shuffled_batch_of_one_takes_another_images_feature_or_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from vlmfilm_plugin.errors import ConditionError

    run = Run(tmp_path, capsys, "shuffle")
    with pytest.raises(ConditionError, match="no other image"):
        run.step("val", rows=1, seed=1)
    run.step("val", rows=1, seed=2, batch_idx=1)
    (line,) = run.lines("[FILM-SHUFFLE]")
    first, second = line.split(": ", 1)[1].split(" is conditioned on ")
    assert first != second


def test_cache_stats_are_written_when_enabled_and_every_so_many_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path, capsys, vlm_cache_stats_enabled=True, vlm_cache_stats_every_n_steps=2)
    for step in (0, 0, 1, 2):
        run.train(range(step, step + 1))
    assert len(run.lines("[VLM] cache_stats: ")) == 2
    quiet = Run(tmp_path, capsys)
    quiet.train(range(3))
    assert quiet.lines("[VLM] cache_stats") == []


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, capsys)
    monkeypatch.setenv("RANK", "1")
    run.step()
    assert run.capsys.readouterr().out == ""


# Parts


def test_statistics_keep_a_meta_tensors_class_out_and_detach() -> None:
    class Meta(torch.Tensor):
        pass

    x = torch.randn(2, 3, 4, 4, requires_grad=True).as_subclass(Meta)
    ones, zeros = torch.ones(2, 3, 1, 1), torch.zeros(2, 3, 1, 1)
    numbers = statistics(x, x * 2, ones * 2, zeros, torch.randn(2, 4))
    assert all(value is None or type(value) in (float, int) for value in numbers.values())
    assert numbers["rel_delta_p50"] == pytest.approx(1)
    assert numbers["gamma_dev_mean"] == 1


def test_statistics_of_zeros_are_finite() -> None:
    zeros = torch.zeros(1, 2, 3, 3)
    numbers = statistics(zeros, zeros, torch.ones(1, 2, 1, 1), torch.zeros(1, 2, 1, 1), torch.zeros(2, 4))
    assert all(value is None or math.isfinite(value) for value in numbers.values())


def test_a_phase_without_a_count_is_not_logged() -> None:
    diagnostics = Diagnostics(resolve([]))
    assert not diagnostics.is_logged("train", None, 0)
    assert not diagnostics.is_logged("val", 0, None)
    assert StepFacts("val", None, None, None, 1, "on", "post_block2", "image").fields()["split_key"] is None


def test_a_second_unet_of_another_family_is_logged_as_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path, capsys)
    other: nn.Module = SmallUNet()
    run.runtime.attach(other, SPEC)
    run.capsys.readouterr()
    with run.runtime.batch({"image": torch.rand(2, 1, 8, 8)}, phase="train", value_range=(0.0, 1.0), owner=run.owner):
        run.unet(*inputs(2))
        other(*inputs(2))
    assert len(run.rows()) == 4
