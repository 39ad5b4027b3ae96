"""The real sofl-seg repo at 535acb4, unmodified, by its own scripts. Needs its folder in VLMFILM_HOST_REPO and its dependencies."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from processes import python, succeed
from stand_in import SETTINGS

from vlmfilm_plugin.demo.dataset import make_dataset

REPO = os.environ.get("VLMFILM_HOST_REPO")
pytestmark = pytest.mark.skipif(REPO is None, reason="VLMFILM_HOST_REPO is unset: the folder of sofl-seg at 535acb4")
LAUNCHER = Path(__file__).with_name("sofl_launcher.py")
ARCHS = ["medsegdiff_flow", "medsegdiff_flow_multitask", "medsegdiff"]


class Host:
    """The repo, a tiny data set in its layout, and the checkpoints its runs left in `experiments/` (which it ignores)."""

    def __init__(self, root: Path) -> None:
        assert REPO is not None
        self.root, self.repo = root, Path(REPO).resolve()
        make_dataset(root / "data", train=4, val=1, test=2, size=32, seed=0)

    def config(self, arch: str, tag: str, resume: Path | None = None, epochs: int = 1, **model: Any) -> Path:
        sizes: dict[str, Any] = {"image_size": 32, "timesteps": 2, "learning_rate": 1e-3}
        if arch == "medsegdiff":
            sizes |= {"dim": 8}
        else:
            sizes |= {"patch_plan": [[32, 1]], "model_channels": 8, "channel_mult": [1, 2], "attn_resolutions": [], "num_blocks": 1}
            sizes |= {"loss": {"name": "flow_matching", "params": {"scheme": "l2"}}}
        data = {f"{split}_dir": str(self.root / "data" / split) for split in ("train", "val", "test")}
        trainer = {
            "max_epochs": epochs,
            "accelerator": "cpu",
            "devices": 1,
            "precision": "32-true",
            "check_val_every_n_epoch": 1,
            "log_every_n_steps": 1,
        }
        content = {
            "model": {"arch_name": arch, "data_name": "xca", "experiment_name": tag, **sizes, **model},
            "data": {"name": "xca", "train_bs": 2, "crop_size": 32, "num_samples_per_image": 1, **data},
            "trainer": trainer,
            "tag": tag,
            **({"resume": str(resume)} if resume else {}),
        }
        path = self.root / f"{tag}.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    def run(self, script: str, *arguments: str | Path, mode: str | None, **variables: str) -> str:
        cache = {"VLM_FILM_CACHE_DIR": str(self.root / "cache")} if mode else {}
        command = [LAUNCHER, self.repo / "scripts" / script, *arguments]
        return succeed(python(*command, cwd=self.repo, timeout=580, VLM_FILM_MODE=mode, **{**cache, **variables}))

    def train(self, arch: str, tag: str, mode: str | None, variables: dict[str, str] | None = None, **config: Any) -> tuple[str, Path]:
        output = self.run("train.py", "--config", self.config(arch, tag, **config), mode=mode, **(variables or {}))
        folder = re.search(r"Experiment dir: (.+)", output)
        assert folder is not None
        return output, self.repo / folder.group(1).strip() / "checkpoints" / "last.ckpt"

    def evaluate(self, arch: str, checkpoint: Path, mode: str | None) -> str:
        arguments = ["--data", "xca", "--models", arch, "--checkpoint", checkpoint, "--output", self.root / "results", "--no-save-predictions"]
        output = self.run("evaluate.py", *arguments, mode=mode)
        assert f"✅ {arch}: Dice=" in output, output[-3000:]
        return output

    def status(self) -> str:
        return subprocess.run(["git", "status", "--porcelain"], cwd=self.repo, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    return Host(tmp_path_factory.mktemp("sofl"))


@pytest.mark.parametrize("encoder", ["descriptor", "qwen2_5_vl"])
@pytest.mark.parametrize("arch", ARCHS)
def test_its_scripts_train_and_evaluate_in_every_mode_and_the_repo_stays_clean(host: Host, arch: str, encoder: str, tiny_qwen: Path) -> None:
    before = host.status()
    variables = SETTINGS if encoder == "descriptor" else {"VLM_FILM_MODEL_NAME": str(tiny_qwen)}
    output, checkpoint = host.train(arch, f"{encoder}-{arch}", "on", variables)
    assert f"encoder={encoder}" in output and "cache_key_example: unknown:val/image/" in output
    # The training batches' files are found through the host's data set: nothing is encoded crop by crop.
    assert "WARNING: no source file" not in output and "cache_key_source: content" not in output
    state = torch.load(checkpoint, weights_only=False)["state_dict"]
    heads = [value for name, value in state.items() if name.endswith("mlp.2.weight") and "vlm_film.heads" in name]
    assert heads and all(value.abs().sum() > 0 for value in heads)
    for mode in ("on", "off", "shuffle"):
        host.evaluate(arch, checkpoint, mode)
    assert host.status() == before == ""


def test_a_baseline_resumes_with_film_and_its_optimizer_state(host: Host) -> None:
    _, baseline = host.train("medsegdiff_flow", "baseline", None, epochs=1)
    output, resumed = host.train("medsegdiff_flow", "resumed", "on", SETTINGS, epochs=2, resume=baseline)
    assert "WARNING: the checkpoint has no FiLM weights" in output
    before, after = (torch.load(path, weights_only=False) for path in (baseline, resumed))
    names = [name for name in after["state_dict"] if "vlm_film" not in name or not name.endswith("_extra_state")]
    steps = [entry["step"].item() for entry in after["optimizer_states"][0]["state"].values()]
    # Two steps an epoch: the host's parameters have four, FiLM's have the two of the second epoch.
    assert sorted(set(steps)) == [2, 4] and len(after["optimizer_states"][0]["state"]) > len(before["optimizer_states"][0]["state"])
    assert any("vlm_film" in name for name in names)


def test_a_film_run_resumes_with_the_checkpoints_stages(host: Host) -> None:
    _, first = host.train("medsegdiff_flow", "stages", "on", SETTINGS, vlm_film_decoder_stages=[1], vlm_film_config={"gamma_scale": 0.3})
    output, _ = host.train("medsegdiff_flow", "stages-resumed", "on", {"VLM_FILM_ENCODER": "descriptor"}, epochs=2, resume=first)
    assert "stages=1 (ups.1.1, 8)" in output


def test_an_architecture_without_a_unet_for_film_is_refused(host: Host) -> None:
    result = python(LAUNCHER, host.repo / "scripts" / "train.py", "--config", host.config("dhariwal_concat_unet", "dhariwal"), cwd=host.repo,
                    timeout=580, VLM_FILM_MODE="on", **SETTINGS)  # fmt: skip
    assert result.returncode != 0 and "asks for FiLM, but this FlowModel has no UNet" in result.stderr


def test_off_trains_like_the_plain_host_to_the_bit(host: Host) -> None:
    states = {}
    for mode in (None, "off"):
        _, checkpoint = host.train("medsegdiff_flow", f"bits-{mode}", mode, SETTINGS if mode else None)
        state = torch.load(checkpoint, weights_only=False)["state_dict"]
        states[mode] = {name: value for name, value in state.items() if "vlm_film" not in name}
    assert states[None].keys() == states["off"].keys()
    assert all(torch.equal(value, states["off"][name]) for name, value in states[None].items())
