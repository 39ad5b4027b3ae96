"""`apply_vlm_film` by hand: what `_dbg` drives, whose state it is, the gate, and conditioner -> FiLM as one run."""

from __future__ import annotations

import copy
import gc
import json
import math
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from vlmfilm_plugin import AdaptiveFiLMHead, ConditionError, VLMConditioner, apply_vlm_film
from vlmfilm_plugin.features.shuffle import Shuffle
from vlmfilm_plugin.run.log_fields import FIELDS
from vlmfilm_plugin.soft_seg import model_state

B, D, C = 5, 4, 3
COND = torch.randn(B, D, generator=torch.Generator().manual_seed(0))
X = torch.randn(B, C, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def no_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLM_FILM_MODE", raising=False)


def heads(*, is_moved: bool = True) -> nn.ModuleList:
    torch.manual_seed(3)
    built = nn.ModuleList(AdaptiveFiLMHead(D, C, 6) for _ in range(2))
    if is_moved:
        for parameter in built.parameters():
            nn.init.normal_(parameter)
    return built


HEADS, FRESH = heads(), heads(is_moved=False)


def cond(step: object = 0, **fields: Any) -> dict[str, Any]:
    return {"cond_vec": COND, "_dbg": {"step": step, "should_log": True, **fields}}


def rows(output: str, tag: str = "FILM-DBG") -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in {output}")

    return [json.loads(line.split(" ", 1)[1], parse_constant=refuse) for line in output.splitlines() if line.startswith(f"[{tag}] ")]


# The line


@pytest.mark.parametrize("mode", ["on", "off", "shuffle"])
def test_a_logged_call_writes_every_field_once(mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    told = {"split_key": "train", "cache_key_example": "train:a.png", "cond_source": "image_global", "cache_total": 7, "hit_rate": 0.5}
    y, payload = apply_vlm_film(X, cond(11, **told), HEADS, 1, nn.Module(), apply_point="after the skip", mode=mode)
    (line,) = rows(capsys.readouterr().out)
    assert set(FIELDS) <= set(line)
    assert {name: line[name] for name in told} == told
    assert (line["step"], line["B"], line["cond_dim"], line["stage"]) == (11, B, D, "train")
    assert (line["film_mode"], line["film_apply_point"], line["film_stage_idx"]) == (mode, "after the skip", 1)
    assert line["max_abs_diff"] == pytest.approx(float((y - X).detach().abs().max()), abs=1e-6)
    assert (line["shuffle_perm_hash"] is None) == (mode != "shuffle")
    assert "should_log" not in line and "keys" not in line
    assert payload is not None and all(payload[name] == pytest.approx(line[name], abs=1e-6) for name in ("gamma_std", "rel_delta_p95"))


def test_a_call_that_is_not_logged_reads_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Plain(nn.Linear):
        def forward(self, cond_vec: Tensor) -> tuple[Tensor, Tensor]:
            gamma, beta = super().forward(cond_vec)[:, :, None, None].chunk(2, dim=1)
            return gamma, beta

    # Tensors on the meta device have no values: whoever reads one fails.
    x, cond_vec, built = X.to("meta"), COND.to("meta"), nn.ModuleList([Plain(D, 2 * C, device="meta")])
    gate = torch.ones(B, 1, 4, 4, device="meta")
    module = nn.Module()
    for mode in ("on", "off", "shuffle"):
        for training in (True, False, True):
            module.train(training)
            quiet = {"cond_vec": cond_vec, "_dbg": {"step": 1, "should_log": False, "keys": list("abcde")}}
            y, _ = apply_vlm_film(x, quiet, built, 0, module, junction_gate=gate, mode=mode)
            assert y.shape == x.shape
    output = capsys.readouterr().out
    assert "FILM-DBG" not in output and output.count("[FILM-SHUFFLE]") == 2  # before and after the validation
    with pytest.raises((RuntimeError, NotImplementedError)):
        apply_vlm_film(x, {"cond_vec": cond_vec, "_dbg": {"step": 1, "should_log": True}}, built, 0, module)
    # Nor is anything read there on other ranks, which write nothing.
    monkeypatch.setenv("RANK", "1")
    apply_vlm_film(x, {"cond_vec": cond_vec, "_dbg": {"step": 1, "should_log": True}}, built, 0, module)


def test_odd_values_in_debug_fields_still_make_json(capsys: pytest.CaptureFixture[str]) -> None:
    debug = {"hit_rate": float("nan"), "vlm_response_debug": {"top": [float("inf"), Path("x")], 3: torch.tensor(2)}}
    apply_vlm_film(X, cond(1, **debug), HEADS, 0)
    (line,) = rows(capsys.readouterr().out)
    assert line["hit_rate"] == "nan" and line["vlm_response_debug"]["top"] == ["inf", "x"]


# Bad input


@pytest.mark.parametrize("mode", ["on", "off", "shuffle"])
@pytest.mark.parametrize("debug", [{}, {"should_log": True}, {"step": None}, {"step": "7"}, {"step": 1.5}, {"step": True}, {"step": torch.tensor(1)}])
def test_a_debug_without_a_step_is_refused(debug: dict[str, Any], mode: str) -> None:
    with pytest.raises(ConditionError, match=r"(?s)step.*found: .*expected: +a whole number.*fix: "):
        apply_vlm_film(X, {"cond_vec": COND, "_dbg": debug}, HEADS, 0, nn.Module(), mode=mode)


def test_the_models_step_stands_in_for_a_missing_one(capsys: pytest.CaptureFixture[str]) -> None:
    apply_vlm_film(X, {"cond_vec": COND, "_dbg": {"should_log": True}}, HEADS, 0, SimpleNamespace(global_step=9))
    assert rows(capsys.readouterr().out)[0]["step"] == 9


@pytest.mark.parametrize("debug", [7, "x", [1]])
def test_a_debug_that_is_no_mapping_is_refused(debug: object) -> None:
    with pytest.raises(ConditionError, match="_dbg"):
        apply_vlm_film(X, {"cond_vec": COND, "_dbg": debug}, HEADS, 0)


# Shuffle


def permutation_of(step: int, x: Tensor = X, **arguments: Any) -> list[int]:
    """Return what `shuffle` did at a step, read off the output: identity heads but for a beta that names the row."""

    class Name(nn.Module):
        def forward(self, cond_vec: Tensor) -> tuple[Tensor, Tensor]:
            beta = cond_vec[:, :1, None, None].expand(-1, x.shape[1], 1, 1)
            return torch.ones_like(beta), beta

    vector = torch.arange(len(x), dtype=torch.float32)[:, None].expand(-1, D)
    debug = {"step": step, **arguments.pop("fields", {})}
    y, _ = apply_vlm_film(
        torch.zeros_like(x), {"cond_vec": vector, "_dbg": debug}, nn.ModuleList([Name()]), 0, nn.Module(), mode="shuffle", **arguments
    )
    return [int(value) for value in y[:, 0, 0, 0]]


def test_the_permutation_is_a_function_of_step_and_seed_alone() -> None:
    assert permutation_of(3) == Shuffle().derangement(B, 3) == permutation_of(3, fields={"keys": list("vwxyz")})
    assert len({tuple(permutation_of(step)) for step in range(24)}) == 24
    assert permutation_of(3, seed=8) == Shuffle(8).derangement(B, 3) != permutation_of(3)


def test_the_seed_and_the_file_of_pairs_are_set_in_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VLM_FILM_SHUFFLE_SEED", "8")
    monkeypatch.setenv("VLM_FILM_SHUFFLE_PAIRS_FILE", str(tmp_path / "pairs.csv"))
    module, pair = nn.Module(), cond(3, keys=[f"train:{name}" for name in "abcde"], should_log=False)
    for stage in (0, 1, 0, 1):
        apply_vlm_film(X, pair, HEADS, stage, module, mode="shuffle")
    names, found = "abcde", Shuffle(8).derangement(B, 3)
    expected = [f"train:{names[row]},train:{names[other]},3" for row, other in enumerate(found)]
    assert (tmp_path / "pairs.csv").read_text().splitlines() == expected


def test_rows_are_told_apart_by_their_keys() -> None:
    keys = ["a", "a", "b", "b", "a"]
    for step in range(5):
        found = permutation_of(step, fields={"keys": keys})
        assert all(keys[row] != keys[other] for row, other in enumerate(found))


@pytest.mark.parametrize("keys", [list("abcd"), "abcde", 5])
def test_keys_that_do_not_fit_the_rows_are_refused(keys: object) -> None:
    with pytest.raises(ConditionError, match="keys"):
        permutation_of(0, fields={"keys": keys})


def test_rows_of_one_image_are_not_quietly_left_as_they_are() -> None:
    for arguments in ({"x": X[:1]}, {"fields": {"keys": ["a"] * B}}):
        with pytest.raises(ConditionError, match="all rows are of one image"):
            permutation_of(0, **arguments)  # type: ignore[arg-type]


def test_without_any_step_the_line_says_that_nothing_varies(capsys: pytest.CaptureFixture[str]) -> None:
    apply_vlm_film(X, COND, HEADS, 0, mode="shuffle")
    assert "[FILM-SHUFFLE] perm_first10=[" in (output := capsys.readouterr().out) and "WARNING: no step is known" in output


# The state is the model's


def test_two_models_do_not_mix(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = nn.Module(), nn.Module()
    for step in range(4):
        for module in (first, second):
            apply_vlm_film(X, cond(step), FRESH, 0, module)
    assert "[FILM-WARN]" not in capsys.readouterr().out
    first.eval()
    apply_vlm_film(X, cond(4), HEADS, 0, first)
    apply_vlm_film(X, cond(4), HEADS, 0, second, mode="shuffle")
    assert "[FILM-VAL]" not in (output := capsys.readouterr().out) and output.count("[FILM-SHUFFLE]") == 1
    first.train()
    apply_vlm_film(X, cond(5), HEADS, 0, first, mode="shuffle")
    assert (output := capsys.readouterr().out).count("[FILM-VAL]") == 1 and output.count("[FILM-SHUFFLE]") == 1


def test_two_stages_of_one_model_do_not_mix(capsys: pytest.CaptureFixture[str]) -> None:
    module, built = nn.Module(), nn.ModuleList([FRESH[0], HEADS[0]])
    for step in range(5):
        for stage in (0, 1):
            apply_vlm_film(X, cond(step), built, stage, module)
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[FILM-WARN]")]
    assert len(warnings) == 1 and "decoder stage 0" in warnings[0]


def test_the_state_dies_with_the_model_and_stays_out_of_copies(capsys: pytest.CaptureFixture[str]) -> None:
    gc.collect()
    before, module = len(model_state._states), nn.Linear(1, 1)
    for step in range(4):
        apply_vlm_film(X, cond(step), FRESH, 0, module)
    assert len(model_state._states) == before + 1
    assert module.__dict__.keys() == nn.Linear(1, 1).__dict__.keys()
    twin = pickle.loads(pickle.dumps(copy.deepcopy(module)))
    apply_vlm_film(X, cond(4), FRESH, 0, twin)
    assert "[FILM-WARN]" not in capsys.readouterr().out
    del module, twin
    gc.collect()
    assert len(model_state._states) == before


def test_an_object_that_cannot_be_referred_to_weakly_keeps_its_state(capsys: pytest.CaptureFixture[str]) -> None:
    class Slots:
        __slots__ = ()

    for owner in (SimpleNamespace(), Slots(), None):
        built = copy.deepcopy(FRESH)
        for step in range(5):
            apply_vlm_film(X, cond(step), built, 0, owner)
        assert capsys.readouterr().out.count("[FILM-WARN]") == 1


def test_off_never_warns_and_a_moving_call_starts_the_count_anew(capsys: pytest.CaptureFixture[str]) -> None:
    module = nn.Module()
    for step in range(8):
        apply_vlm_film(X, cond(step), FRESH, 0, module, mode="off")
    for step in range(12):
        apply_vlm_film(X, cond(step), HEADS if step % 5 == 4 else FRESH, 0, module)
    assert "[FILM-WARN]" not in capsys.readouterr().out


def test_fresh_heads_in_a_validation_do_not_count_as_training_that_stands_still(capsys: pytest.CaptureFixture[str]) -> None:
    module = nn.Module().eval()
    for step in range(4):
        apply_vlm_film(X, cond(step, stage="val"), FRESH, 0, module)
    module.train()
    apply_vlm_film(X, cond(0), FRESH, 0, module)
    assert "[FILM-WARN]" not in capsys.readouterr().out


def test_a_validation_of_which_nothing_was_logged_is_still_named(capsys: pytest.CaptureFixture[str]) -> None:
    module = nn.Module().eval()
    apply_vlm_film(X, cond(0, should_log=False), HEADS, 0, module)
    apply_vlm_film(X, cond(0, should_log=False), HEADS, 0, module.train())
    assert rows(capsys.readouterr().out, "FILM-VAL") == [{"stage": "val", "logged_steps": 0}]


# The gate


def test_the_gate_keeps_film_away_where_it_is_zero(capsys: pytest.CaptureFixture[str]) -> None:
    gate = torch.zeros(B, 1, 4, 4)
    gate[:, :, :2] = 1
    plain, _ = apply_vlm_film(X, COND, HEADS, 0)
    y, _ = apply_vlm_film(X, cond(1), HEADS, 0, junction_gate=gate, junction_warmup_active=True)
    assert torch.equal(y[:, :, :4], plain[:, :, :4]) and torch.equal(y[:, :, 4:], X[:, :, 4:])
    (line,) = rows(capsys.readouterr().out)
    assert line["junction_gate_enabled"] is line["junction_gate_warmup_active"] is True
    assert (line["junction_gate_mean"], line["junction_gate_min"], line["junction_gate_max"], line["junction_area_pct"]) == (0.5, 0, 1, 50)
    half, _ = apply_vlm_film(X, COND, HEADS, 0, junction_gate=torch.full((1, 1, 1, 1), 0.25))
    torch.testing.assert_close(half, X + 0.25 * (plain - X))
    off, _ = apply_vlm_film(X, COND, HEADS, 0, junction_gate=gate, mode="off")
    assert torch.equal(off, X)


def test_the_gates_arguments_stand_where_the_port_has_them() -> None:
    gate = torch.zeros(B, 1, 8, 8)
    assert torch.equal(apply_vlm_film(X, COND, HEADS, 0, None, "post_block1_pre_concat2", gate, False)[0], X)


@pytest.mark.parametrize("gate", [torch.ones(B, 2, 8, 8), torch.ones(B - 1, 1, 8, 8), torch.ones(B, 8, 8), torch.full((B, 1, 8, 8), 1.5)])
def test_a_gate_that_does_not_fit_is_refused(gate: Tensor) -> None:
    with pytest.raises(ConditionError, match="gate"):
        apply_vlm_film(X, COND, HEADS, 0, junction_gate=gate)


# Conditioner and FiLM together


def build(tmp_path: Path, **settings: Any) -> VLMConditioner:
    torch.manual_seed(0)
    return VLMConditioner(**{"encoder": "descriptor", "cond_dim": D, "cache_dir": str(tmp_path / "cache"), **settings})


def images(count: int = B, seed: int = 0) -> Tensor:
    return torch.rand(count, 1, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def stored(conditioner: VLMConditioner) -> set[str]:
    return set(conditioner._provider.store.keys(conditioner._provider.encoder.identity))


def test_conditioner_and_film_log_like_a_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    conditioner, module = build(tmp_path), nn.Module()
    for step in range(201):
        condition = conditioner.compute_condition(images(), global_step=step, is_train=True)
        assert condition is not None
        apply_vlm_film(X, condition, HEADS, 0, module)
    module.eval()
    for _ in range(21):
        apply_vlm_film(X, conditioner.compute_condition(images(), global_step=200), HEADS, 0, module)
    module.train()
    apply_vlm_film(X, conditioner.compute_condition(images(), global_step=201, is_train=True), HEADS, 0, module)
    output = capsys.readouterr().out
    found = rows(output)
    assert [(row["stage"], row["step"]) for row in found] == [("train", 0), ("train", 100), ("train", 200), ("val", 200), ("val", 200)]
    for row in found:
        assert all(row[name] is not None for name in FIELDS if name != "shuffle_perm_hash")
    assert [found[0][name] for name in ("cache_total", "cache_miss", "cache_hit", "hit_rate")] == [B, B, 0, 0]
    assert [found[1][name] for name in ("cache_total", "cache_miss", "mem_hit", "hit_rate")] == [B, 0, B, 1]
    assert found[0]["cond_source"] == "image_global" and found[0]["mixed_keys"] is False
    assert [row["logged_steps"] for row in rows(output, "FILM-VAL")] == [2]


def test_debug_has_every_field_and_statistics_on_logged_calls_alone(tmp_path: Path) -> None:
    conditioner = build(tmp_path)
    logged = conditioner.compute_condition(images(), global_step=0, is_train=True)["_dbg"]
    quiet = conditioner.compute_condition(images(), global_step=1, is_train=True)["_dbg"]
    assert set(FIELDS) | {"should_log", "keys"} <= set(logged) == set(quiet)
    assert (logged["should_log"], quiet["should_log"]) == (True, False)
    assert math.isfinite(logged["cond_norm_mean"]) and quiet["cond_norm_mean"] is None
    # The same step again, as with gradient accumulation, is not logged again.
    again = [conditioner.compute_condition(images(), global_step=step, is_train=True)["_dbg"]["should_log"] for step in (100, 100)]
    assert again == [True, False]
    mixed = conditioner.compute_condition(images(2), batch={"split": ["train", "val"]})["_dbg"]
    assert mixed["mixed_keys"] is True and mixed["split_key"] == "train"


def test_without_a_global_step_training_calls_are_counted(tmp_path: Path) -> None:
    conditioner = build(tmp_path)
    steps = [conditioner.compute_condition(images(), is_train=is_train)["_dbg"]["step"] for is_train in (False, True, True, False, True)]
    assert steps == [0, 0, 1, 1, 2]


def test_which_calls_are_logged_is_set_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM_FILM_FILM_LOG_EVERY_N_STEPS_TRAIN", "2")
    conditioner = build(tmp_path)
    logged = [conditioner.compute_condition(images(), global_step=step, is_train=True)["_dbg"]["should_log"] for step in range(4)]
    assert logged == [True, False, True, False]


def test_cache_stats_are_written_when_enabled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    conditioner = build(tmp_path, vlm_cache_stats_enabled=True, vlm_cache_stats_every_n_steps=2)
    for step in range(4):
        conditioner.compute_condition(images(), global_step=step, is_train=True)
    assert [line.split(": ")[1].split(" hit=")[0] for line in capsys.readouterr().out.splitlines() if "cache_stats" in line] == [
        "total=5",
        "total=15",
    ]


@pytest.mark.parametrize("strategy", ["per_sample", "first", "random"])
@pytest.mark.parametrize("batch", [None, {"name": ["a", "b", "c", "d", "e"], "split": "train"}])
def test_the_keys_reported_are_the_keys_under_which_features_are_stored(batch: dict[str, Any] | None, strategy: str, tmp_path: Path) -> None:
    conditioner = build(tmp_path, batch_strategy=strategy)
    for step in range(3):
        debug = conditioner.compute_condition(images(seed=step), batch=batch, global_step=step, is_train=True)["_dbg"]
        assert len(debug["keys"]) == B and set(debug["keys"]) <= stored(conditioner)
        assert debug["cache_key_example"] == debug["keys"][0]
        assert (len(set(debug["keys"])) == 1) == (strategy != "per_sample")


def test_files_are_reported_by_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (10, 90):
        Image.fromarray(np.full((8, 8), value, dtype=np.uint8)).save(tmp_path / f"{value}.png")
    monkeypatch.setenv("VLM_FILM_DATASET_ROOT", str(tmp_path))
    conditioner = build(tmp_path)
    debug = conditioner.compute_condition(images(2), batch={"name": ["10.png", "90.png"], "split": "val"})["_dbg"]
    assert debug["keys"] == ["val:10.png", "val:90.png"] and set(debug["keys"]) == stored(conditioner)
    assert debug["cache_key_source"] == "batch['name']" and debug["split_key"] == "val"


def test_image_id_names_what_is_stored_and_never_another_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    conditioner = build(tmp_path)
    first = conditioner.compute_condition(images(2), image_id=["x", "y"], batch={"split": "val"})
    assert first["_dbg"]["keys"] == ["val:x", "val:y"] and stored(conditioner) == {"val:x", "val:y"}
    assert first["_dbg"]["cache_key_source"] == "image_id" and "[VLM] cache_key_example: val:x" in capsys.readouterr().out
    again = build(tmp_path)
    assert again.compute_condition(images(2), image_id=["x", "y"], batch={"split": "val"})["_dbg"]["cache_miss"] == 0
    # Other pixels under the same name are another image.
    other = again.compute_condition(images(2, seed=5), image_id=["x", "y"], batch={"split": "val"})
    assert other["_dbg"]["cache_miss"] == 2 and not torch.allclose(other["cond_vec"], first["cond_vec"])
    torch.testing.assert_close(other["cond_vec"], build(tmp_path / "fresh").compute_condition(images(2, seed=5))["cond_vec"])


def test_one_image_id_for_several_images_keeps_them_apart(tmp_path: Path) -> None:
    conditioner = build(tmp_path)
    result = conditioner.compute_condition(images(3), image_id="one")
    assert all(key.startswith("unknown:one#") for key in result["_dbg"]["keys"]) and len(set(result["_dbg"]["keys"])) == 3
    torch.testing.assert_close(result["cond_vec"], build(tmp_path / "fresh").compute_condition(images(3))["cond_vec"])


def test_an_image_alone_gets_a_donor_of_its_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    conditioner = build(tmp_path)
    for split, seed in (("train", 1), ("test", 2), ("test", 3)):
        conditioner.compute_condition(images(1, seed), batch={"split": split})
    wanted = conditioner.compute_condition(images(1, 3), batch={"split": "test"})["cond_vec"]
    monkeypatch.setenv("VLM_FILM_MODE", "shuffle")
    condition = conditioner.compute_condition(images(1, 2), batch={"split": "test"}, global_step=4)
    y, _ = apply_vlm_film(X[:1], condition, HEADS, 0, nn.Module())
    gamma, beta = HEADS[0](wanted)
    torch.testing.assert_close(y, gamma * X[:1] + beta)
    assert "batch of one image: test:fp-" in capsys.readouterr().out
    with pytest.raises(ConditionError, match="no other image of its split"):
        conditioner.compute_condition(images(1, 1), batch={"split": "train"})


def test_two_names_of_one_image_do_not_exchange_with_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM_FILM_MODE", "shuffle")
    picture = images(3)[[0, 0, 1, 2]]
    for step in range(6):
        condition = build(tmp_path).compute_condition(picture, image_id=["a", "copy", "b", "c"], global_step=step)
        y, _ = apply_vlm_film(X[:4], condition, HEADS, 0, nn.Module())
        own, _ = apply_vlm_film(X[:4], condition, HEADS, 0, nn.Module(), mode="on")
        assert not any(torch.allclose(a, b) for a, b in zip(y, own, strict=True))


# The alarm


class Model(nn.Module):
    """A model that applies FiLM by hand at two stages."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = heads()

    def forward(self, given: Any, seen: Tensor = X) -> Tensor:
        for stage in range(2):
            seen, _ = apply_vlm_film(seen, given, self.heads, stage, module=self)
        return seen

    def saturate(self, value: float = 20.0) -> Model:
        with torch.no_grad():
            for head in self.heads:
                head.mlp[2].bias.fill_(value)  # type: ignore[index, union-attr]
                head.mlp[2].weight.zero_()  # type: ignore[index, union-attr]
        return self


def alarms(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if "no longer reaches the decoder" in line]


@pytest.mark.parametrize("kind", ["tensor", "conditioner's", "one image a batch"])
def test_a_training_whose_heads_tell_no_images_apart_is_warned_once_with_what_to_set(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = Model().saturate()
    for number in range(101):
        given: Any = COND
        if kind != "tensor":
            rows_ = [number % B] if kind == "one image a batch" else list(range(B))
            given = {"cond_vec": COND[rows_], "_dbg": {"step": number, "should_log": False, "keys": [f"train:{row}.png" for row in rows_]}}
        model(given, X[: len(given["cond_vec"]) if kind != "tensor" else B])
        said = alarms(capsys)
        assert len(said) == (number == 24), (number, said)
        if said:
            assert said[0].startswith("[FILM-WARN] step 24: ") and "stages 0, 1" in said[0]
            assert "feature_transform='center'" in said[0] and "`fit`" in said[0] and "gamma_scale=None" in said[0]


def test_no_alarm_by_hand_for_live_or_fresh_heads_controls_evaluation_or_one_image(capsys: pytest.CaptureFixture[str]) -> None:
    dead = Model().saturate()
    fresh = Model()
    fresh.heads = heads(is_moved=False)
    one = {"cond_vec": COND[:1].expand(B, -1), "_dbg": {"step": 0, "should_log": False, "keys": ["train:0.png"] * B}}
    for number in range(101):
        one["_dbg"]["step"] = number  # type: ignore[index]
        Model()(COND)
        fresh(COND)
        dead(one)
        dead(COND[:1].expand(B, -1))
        with torch.no_grad():
            dead(COND)
        dead.eval()(COND)
        dead.train()
    for mode in ("off", "shuffle"):
        for _ in range(101):
            apply_vlm_film(X, COND, dead.heads, 0, module=dead, mode=mode)
    assert alarms(capsys) == []


def test_accumulated_batches_and_recomputed_stages_count_once_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    from torch.utils.checkpoint import checkpoint

    model, x = Model().saturate(), X.clone().requires_grad_()
    for number in range(25):
        assert alarms(capsys) == [], number
        for _ in range(2):
            given = cond(number, should_log=False, keys=[f"train:{row}.png" for row in range(B)])
            checkpoint(model, given, x, use_reentrant=False).sum().backward()
    assert len(alarms(capsys)) == 1
