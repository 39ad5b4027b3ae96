"""The stand-in host's own scripts, unmodified: train with FiLM, evaluate on, off and shuffle, and every kind of checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from processes import forked, forked_code, python, succeed
from stand_in import StandIn

from vlmfilm_plugin.encoders.descriptor import DescriptorEncoder
from vlmfilm_plugin.features.images import read_image
from vlmfilm_plugin.film.feature_statistics import read_facts

FLOW, MULTITASK, DIFFUSION = "medsegdiff_flow", "medsegdiff_flow_multitask", "medsegdiff"


@pytest.fixture(scope="module")
def trained(stand_in: StandIn) -> tuple[StandIn, str]:
    """Return the host with a FiLM run called `film`, with SWA, and what its training printed."""
    before = stand_in.digest()
    output = stand_in.train("film", "on", VLM_FILM_FILM_LOG_EVERY_N_STEPS_TRAIN="2")
    assert stand_in.digest() == before
    return stand_in, output


def lines(output: str, tag: str) -> list[dict[str, object]]:
    return [json.loads(line.split("] ", 1)[1]) for line in output.splitlines() if line.startswith(f"[{tag}]")]


def load(path: Path) -> dict[str, object]:
    found: dict[str, object] = torch.load(path, weights_only=False)
    return found


def test_training_moves_the_heads_inside_the_unet_and_the_checkpoint_describes_them(trained: tuple[StandIn, str]) -> None:
    checkpoint = load(trained[0].checkpoint("film"))
    state = checkpoint["state_dict"]
    film = {name: value for name, value in state.items() if "vlm_film" in name}
    assert film and all(name.startswith("unet.base_unet.vlm_film.") for name in film)
    assert all(film[f"unet.base_unet.vlm_film.heads.{i}.mlp.2.weight"].abs().sum() > 0 for i in range(2))
    assert checkpoint["vlm_film_trained_stages"] == [0, 1]
    assert checkpoint["vlm_film"]["settings"]["encoder"] == "descriptor"
    # Four training images, two of validation and three of the test; the run averages its weights (SWA).
    statistics = read_facts(film["unet.base_unet.vlm_film.feature_transform._extra_state"])
    assert statistics is not None and (statistics.count, statistics.split, statistics.is_frozen) == (4, "train", True)
    expected = DescriptorEncoder().encode([read_image(path) for path in sorted((trained[0].data / "train" / "image").glob("*.png"))]).half().double()
    assert torch.equal(film["unet.base_unet.vlm_film.feature_transform.mean"], expected.mean(0).float())


def test_training_prints_the_lines_of_a_film_run(trained: tuple[StandIn, str]) -> None:
    debug = lines(trained[1], "FILM-DBG")
    assert {row["film_stage_idx"] for row in debug} == {0, 1}
    assert [row["step"] for row in debug if row["stage"] == "train" and row["film_stage_idx"] == 0] == [0, 2]
    # After sanity checking, and after each epoch's validation: at the next training step, or at the end of the fit.
    assert [row["step"] for row in lines(trained[1], "FILM-VAL")] == [0, 2, 4]
    assert "[VLM] cache_key_example: unknown:val/image/" in trained[1]


def test_evaluation_runs_in_every_mode_from_the_checkpoint_alone(trained: tuple[StandIn, str]) -> None:
    host = trained[0]
    outputs = {mode: host.evaluate("film", mode, VLM_FILM_FILM_DEBUG_LINES="full") for mode in ("on", "off", "shuffle")}
    scores = {mode: json.loads((host.output(f"film-{mode}") / "metrics.json").read_text()) for mode in outputs}
    assert all(0 <= score["dice"] <= 1 for score in scores.values())
    assert "encoder=descriptor" in outputs["on"] and "[FILM-SHUFFLE]" in outputs["shuffle"] and "[FILM-SHUFFLE]" not in outputs["on"]
    assert all(row["film_bypass"] for row in lines(outputs["off"], "FILM-DBG"))


def test_shuffle_gives_one_result_for_a_checkpoint_wherever_the_data_lie_and_whatever_is_stored(trained: tuple[StandIn, str], tmp_path: Path) -> None:
    host, found = trained[0], []
    for place in ("a", "far/away/b"):
        root = tmp_path / place
        shutil.copytree(host.data, root / "data")
        shutil.copytree(host.root / "runs" / "film", root / "film")
        config = root / "film" / "config.yaml"
        config.write_text(config.read_text().replace(str(host.data), str(root / "data")))
        arguments = ["--data", "angio", "--models", FLOW, "--checkpoint", root / "film/checkpoints/last.ckpt", "--output", root / "out"]
        pairs = root / "pairs.csv"
        variables = {"VLM_FILM_CACHE_DIR": str(root / "cache"), "VLM_FILM_SHUFFLE_PAIRS_FILE": str(pairs)}
        succeed(forked("scripts/evaluate.py", *arguments, cwd=host.repo, VLM_FILM_MODE="shuffle", **variables))
        found.append((json.loads((root / "out" / "metrics.json").read_text()), pairs.read_text()))
    assert found[0] == found[1]
    rows = [line.split(",") for line in found[0][1].splitlines()]
    # Each of the three test images, its donor another test image, although nothing was stored before.
    assert sorted(row[0] for row in rows) == sorted(row[1] for row in rows) == [f"unknown:test/image/000{index}.png" for index in range(3)]
    assert all(image != donor and step == "0" for image, donor, step in rows)


def test_the_checkpoints_stages_and_scales_win_at_evaluation(stand_in: StandIn) -> None:
    stand_in.train("stages", "on", {"vlm_film_decoder_stages": [1], "vlm_film_config": {"gamma_scale": None, "cond_dim": 8}})
    output = stand_in.evaluate("stages", "on", VLM_FILM_DECODER_STAGES="0", VLM_FILM_GAMMA_SCALE="0.5")
    assert "stages=1 (ups.1.1, 8)" in output


def test_a_checkpoint_of_another_encoder_is_refused_with_both_fingerprints(trained: tuple[StandIn, str], tiny_qwen: Path) -> None:
    host = trained[0]
    code = f"""
    from src.archs.flow_model import FlowModel
    FlowModel.load_from_checkpoint({str(host.checkpoint("film"))!r}, map_location="cpu", weights_only=False)
    """
    result = forked_code(code, cwd=host.repo, VLM_FILM_MODE="on", VLM_FILM_ENCODER="qwen2_5_vl", VLM_FILM_MODEL_NAME=str(tiny_qwen))
    assert result.returncode == 1 and "CheckpointError" in result.stderr
    assert "checkpoint: descriptor-" in result.stderr and "this run:   qwen2_5_vl-" in result.stderr


def test_a_plain_baseline_is_not_evaluated_under_the_name_of_film(stand_in: StandIn) -> None:
    plain = stand_in.train("plain", None)
    assert "VLM" not in plain and not any("vlm_film" in name for name in load(stand_in.checkpoint("plain"))["state_dict"])
    stand_in.evaluate("plain", None)
    for mode in ("on", "shuffle"):
        with pytest.raises(AssertionError) as failed:
            stand_in.evaluate("plain", mode, VLM_FILM_ENCODER="descriptor")
        assert "CheckpointError" in str(failed.value) and "would give a plain baseline's numbers the name of FiLM" in str(failed.value)
        assert not (stand_in.output(f"plain-{mode}") / "metrics.json").exists()
    stand_in.evaluate("plain", "off", VLM_FILM_ENCODER="descriptor")
    output = stand_in.evaluate("plain", "on", VLM_FILM_ENCODER="descriptor", VLM_FILM_STRICT="0", VLM_FILM_FEATURE_TRANSFORM="none")
    assert output.count("would give a plain baseline's numbers") == 1
    scores = [json.loads((stand_in.output(f"plain-{mode}") / "metrics.json").read_text()) for mode in (None, "off", "on")]
    assert scores[0] == scores[1] == scores[2]


def test_off_equals_the_plain_host_with_the_same_weights_to_the_bit(trained: tuple[StandIn, str]) -> None:
    host = trained[0]
    stripped = host.root / "runs" / "stripped" / "checkpoints" / "last.ckpt"
    stripped.parent.mkdir(parents=True)
    checkpoint = load(host.checkpoint("film"))
    checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if "vlm_film" not in name}
    torch.save(checkpoint, stripped)
    code = """
    import hashlib, torch
    from src.archs.flow_model import FlowModel
    model = FlowModel.load_from_checkpoint({path!r}, map_location="cpu", weights_only=False, strict=True).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        y = model.sample(torch.randn(2, 1, 32, 32), torch.randn(2, 1, 32, 32))
    print(hashlib.sha256(y.numpy().tobytes()).hexdigest())
    """
    plain = succeed(forked_code(code.format(path=str(stripped)), cwd=host.repo))
    off = succeed(forked_code(code.format(path=str(host.checkpoint("film"))), cwd=host.repo, VLM_FILM_MODE="off"))
    assert plain.splitlines()[-1] == off.splitlines()[-1]


def test_a_checkpoint_of_the_port_loads_with_its_stages_and_unbounded_heads(trained: tuple[StandIn, str], tiny_qwen: Path) -> None:
    host = trained[0]
    port = host.root / "runs" / "port" / "checkpoints" / "last.ckpt"
    port.parent.mkdir(parents=True)
    checkpoint = load(host.checkpoint("film"))
    state = {name: value for name, value in checkpoint["state_dict"].items() if "vlm_film" not in name}
    hidden, channels = 12, 8
    torch.manual_seed(0)
    state |= {
        "vlm_film_heads.0.ln.weight": torch.ones(10),
        "vlm_film_heads.0.ln.bias": torch.zeros(10),
        "vlm_film_heads.0.mlp.0.weight": torch.randn(hidden, 10),
        "vlm_film_heads.0.mlp.0.bias": torch.randn(hidden),
        "vlm_film_heads.0.mlp.2.weight": torch.randn(2 * channels, hidden),
        "vlm_film_heads.0.mlp.2.bias": torch.randn(2 * channels),
        "vlm_film_conditioner.image_to_cond.proj.weight": torch.randn(10, 32),
        "vlm_film_conditioner.image_to_cond.proj.bias": torch.randn(10),
        "vlm_film_conditioner.image_to_cond.ln.weight": torch.ones(10),
        "vlm_film_conditioner.image_to_cond.ln.bias": torch.zeros(10),
        "vlm_film_conditioner.text_to_cond.mlp.0.weight": torch.randn(10, 32),
    }
    checkpoint = {name: value for name, value in checkpoint.items() if name not in {"vlm_film", "optimizer_states"}}
    checkpoint |= {"state_dict": state, "vlm_film_trained_stages": [1]}
    checkpoint["hyper_parameters"] |= {"use_vlm_film": True, "vlm_film_config": {"model_name": str(tiny_qwen), "gamma_scale": 0.1}}
    checkpoint["hyper_parameters"] |= {"vlm_film_decoder_stages": [1], "junction_gating_config": None}
    torch.save(checkpoint, port)
    code = f"""
    import torch
    from src.archs.flow_model import FlowModel
    model = FlowModel.load_from_checkpoint({str(port)!r}, map_location="cpu", weights_only=False, strict=True)
    film = model.unet.base_unet.vlm_film
    state = torch.load({str(port)!r}, weights_only=False)["state_dict"]
    assert torch.equal(film.heads[0].mlp[2].weight, state["vlm_film_heads.0.mlp.2.weight"])
    assert torch.equal(film.image_to_cond.proj.weight, state["vlm_film_conditioner.image_to_cond.proj.weight"])
    print([s.index for s in film.architecture.stages], film.heads[0].gamma_scale, film.architecture.cond_dim, film.architecture.apply_point)
    # A model that is built afterwards is built with the settings of the run, not with those of the checkpoint.
    sizes = {{name: model.hparams[name] for name in ("arch_name", "image_size", "patch_plan", "timesteps", "model_channels", "channel_mult")}}
    fresh = FlowModel(**sizes, attn_resolutions=[]).unet.base_unet.vlm_film
    print([s.index for s in fresh.architecture.stages], fresh.heads[0].gamma_scale, fresh.architecture.cond_dim, fresh.architecture.apply_point)
    for instance in (model, FlowModel(**sizes, attn_resolutions=[])):
        try:
            instance.load_from_checkpoint({str(port)!r}, map_location="cpu", weights_only=False)
        except TypeError as error:
            print(error)
    """
    output = succeed(forked_code(code, cwd=host.repo, VLM_FILM_MODE="on", VLM_FILM_MODEL_NAME=str(tiny_qwen)))
    lines = [line for line in output.splitlines() if not line.startswith("[VLM]")][-4:]
    assert lines[:2] == ["[1] None 10 post_block1", "[0, 1] 0.1 256 post_block2"]
    assert len(lines) == 4 and all("cannot be called on an instance" in line for line in lines[2:])
    assert "not used here: vlm_film_conditioner.text_to_cond.mlp.0.weight" in output


@pytest.mark.parametrize("arch", [MULTITASK, DIFFUSION])
def test_multitask_and_diffusion_train_and_evaluate(stand_in: StandIn, arch: str) -> None:
    model = {"arch_name": arch, "image_size": 32} if arch == MULTITASK else {"arch_name": arch, "image_size": 32, "dim": 8, "timesteps": 3}
    stand_in.train(arch, "on", model)
    state = load(stand_in.checkpoint(arch))["state_dict"]
    prefixes = {name.split("vlm_film")[0] for name in state if "vlm_film" in name}
    assert prefixes == ({"unet.base_unet."} if arch == MULTITASK else {"diffusion_model.model.", "ema_model.model."})
    assert all(state[f"{prefix}vlm_film.heads.0.mlp.2.weight"].abs().sum() > 0 for prefix in prefixes)
    # An EMA copy was made before anything was known of the training images.
    means = [state[f"{prefix}vlm_film.feature_transform.mean"] for prefix in prefixes]
    assert float(means[0].norm()) > 0 and all(torch.equal(mean, means[0]) for mean in means)
    for mode in ("on", "off", "shuffle"):
        stand_in.evaluate(arch, mode, arch)


def test_a_tiny_qwen_conditions_the_host_and_is_in_no_checkpoint(stand_in: StandIn, tiny_qwen: Path) -> None:
    variables = {"VLM_FILM_ENCODER": "qwen2_5_vl", "VLM_FILM_MODEL_NAME": str(tiny_qwen)}
    assert "encoder=qwen2_5_vl" in stand_in.train("qwen", "on", **variables)
    state = load(stand_in.checkpoint("qwen"))["state_dict"]
    assert state["unet.base_unet.vlm_film.image_to_cond.proj.weight"].shape == (16, 32)
    assert not any("visual" in name or "language" in name for name in state)
    stand_in.evaluate("qwen", "on")


def test_with_every_feature_stored_no_weight_of_the_encoder_is_read(stand_in: StandIn, tiny_qwen: Path) -> None:
    variables = {"VLM_FILM_ENCODER": "qwen2_5_vl", "VLM_FILM_MODEL_NAME": str(tiny_qwen), "VLM_FILM_CACHE_DIR": str(stand_in.root / "warm")}
    stand_in.train("warm", "on", **variables)
    code = f"""
    import runpy, sys
    import transformers
    def refuse(*a, **k): raise AssertionError("weights were read")
    transformers.modeling_utils.PreTrainedModel.from_pretrained = classmethod(refuse)
    sys.argv = ["scripts/train.py", "--config", {str(stand_in.config("warm2"))!r}]
    runpy.run_path("scripts/train.py", run_name="__main__")
    """
    succeed(forked_code(code, cwd=stand_in.repo, VLM_FILM_MODE="on", VLM_FILM_ON_MISSING_FEATURE="error", **variables))


def test_a_missing_feature_can_be_an_error(stand_in: StandIn) -> None:
    result = python(
        "scripts/train.py", "--config", stand_in.config("missing"), cwd=stand_in.repo, VLM_FILM_MODE="on", VLM_FILM_ENCODER="descriptor",
        VLM_FILM_CACHE_DIR=str(stand_in.root / "empty"), VLM_FILM_ON_MISSING_FEATURE="error",
    )  # fmt: skip
    assert result.returncode == 1 and "MissingFeatureError" in result.stderr and "unknown:val/image/" in result.stderr


def test_text_mode_conditions_the_host(stand_in: StandIn, tiny_qwen: Path) -> None:
    variables = {
        "VLM_FILM_ENCODER": "qwen2_5_vl",
        "VLM_FILM_MODEL_NAME": str(tiny_qwen),
        "VLM_FILM_USE_TEXT_PROMPT_COND": "1",
        "VLM_FILM_MAX_NEW_TOKENS": "3",
    }
    stand_in.train("text", "on", **variables)
    assert "unet.base_unet.vlm_film.text_to_cond.mlp.0.weight" in load(stand_in.checkpoint("text"))["state_dict"]
    stand_in.evaluate("text", "on")


def test_a_frozen_host_keeps_every_weight_and_its_optimizer_holds_film_alone(stand_in: StandIn) -> None:
    stand_in.train("frozen", "on", VLM_FILM_FREEZE_HOST="1")
    checkpoint = load(stand_in.checkpoint("frozen"))
    film = [name for name in checkpoint["state_dict"] if "vlm_film." in name and not name.endswith("_extra_state")]
    film = [name for name in film if ".feature_transform." not in name]
    assert len(checkpoint["optimizer_states"][0]["param_groups"][0]["params"]) == len(film)
    code = f"""
    import torch, yaml, lightning as L
    from src.runner.factory import known_arguments, model_class
    config = yaml.safe_load(open({str(stand_in.root / "frozen.yaml")!r}))
    L.seed_everything(0)
    cls = model_class(config["model"]["arch_name"])
    fresh = cls(**known_arguments(cls, config["model"])).state_dict()
    trained = torch.load({str(stand_in.checkpoint("frozen"))!r}, weights_only=False)["state_dict"]
    assert all(torch.equal(value, trained[name]) for name, value in fresh.items()), "the host moved"
    assert trained["unet.base_unet.vlm_film.heads.0.mlp.2.weight"].abs().sum() > 0
    """
    succeed(forked_code(code, cwd=stand_in.repo))


def test_a_weights_file_moves_film_from_one_run_to_a_baseline_of_the_host(trained: tuple[StandIn, str]) -> None:
    host = trained[0]
    host.train("base", None)
    weights, copied = host.root / "film.safetensors", host.root / "runs" / "moved" / "checkpoints" / "last.ckpt"
    copied.parent.mkdir(parents=True)
    # The host's evaluation reads the configuration beside the checkpoint.
    (copied.parents[1] / "config.yaml").write_bytes((host.checkpoint("base").parents[1] / "config.yaml").read_bytes())
    succeed(forked("-m", "vlmfilm_plugin", "export", host.checkpoint("film"), weights))
    succeed(forked("-m", "vlmfilm_plugin", "apply", weights, host.checkpoint("base"), "--output", copied))
    assert "encoder=descriptor" in host.evaluate("moved", "on")
