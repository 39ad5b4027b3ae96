"""Checkpoints that the soft-seg port really trained, in its own repo, on the real host without it.

Needs the folder of sofl-seg at 535acb4 in VLMFILM_HOST_REPO, that of a commit with the port (26a87b8, d89631a, 9d28d82 or 2f7d8e1) in
VLMFILM_PORT_REPO, and the dependencies of both.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from processes import python, run_code, succeed

HOST, PORT = os.environ.get("VLMFILM_HOST_REPO"), os.environ.get("VLMFILM_PORT_REPO")
pytestmark = pytest.mark.skipif(
    HOST is None or PORT is None, reason="VLMFILM_HOST_REPO (sofl-seg at 535acb4) or VLMFILM_PORT_REPO (a commit with the port) is unset"
)
TRAINER = Path(__file__).with_name("port_trainer.py")
# name: which model trains, its architecture, its stages, the stages that this means
CASES: dict[str, tuple[str, str, Any, list[int]]] = {
    "film_null": ("film", "medsegdiff_flow", None, [0, 1]),
    "film_0": ("film", "medsegdiff_flow", [0], [0]),
    "film_2_0": ("film", "medsegdiff_flow", [2, 0], [0, 2]),
    "film_all": ("film", "medsegdiff_flow", [0, 1, 2], [0, 1, 2]),
    "film_multitask": ("film", "medsegdiff_flow_multitask", [1, 2], [1, 2]),
    "direct": ("direct", "medsegdiff_flow", None, [0, 1, 2]),
    "direct_multitask": ("direct", "medsegdiff_flow_multitask", None, [0, 1, 2]),
}
LOAD = """
import json, os, sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, os.getcwd())
sys.argv = [os.path.join(os.getcwd(), "scripts", "train.py")]
import importlib.util, types
if importlib.util.find_spec("torchvision") is None:
    import torchmetrics
    package, utils = types.ModuleType("torchvision"), types.ModuleType("torchvision.utils")
    utils.make_grid = None
    package.utils = utils
    sys.modules |= {"torchvision": package, "torchvision.utils": utils}
import src.registry, src.losses
from src.archs.flow_model import FlowModel
from vlmfilm_plugin.film.module import film_modules
from vlmfilm_plugin.forward.handle import FilmHandle
from vlmfilm_plugin.settings.layers import resolve
for name in CASES:
    model = FlowModel.load_from_checkpoint(f"{FOLDER}/{name}.ckpt", map_location="cpu", weights_only=False, strict=True).eval()
    film, saved = film_modules(model)[0], torch.load(f"{FOLDER}/{name}.pt")
    handle = FilmHandle(model.unet.base_unet, film, resolve([]), [])
    with torch.no_grad(), handle.condition(features=saved["features"]):
        y = model.unet(saved["x"], saved["time"], saved["image"])
    far = {place: float((saved[place] - saved["on"]).abs().max()) for place in ("plain", "other")}
    found = {"point": film.architecture.apply_point, "stages": [stage.index for stage in film.architecture.stages]}
    ours = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(ours)
    found["written"] = ours["vlm_film"]["architecture"]["apply_point"]
    print("RESULT", json.dumps({"name": name, "off": float((y - saved["on"]).abs().max()), **far, **found}))
bare = {"state_dict": torch.load(f"{FOLDER}/film_null.ckpt", weights_only=False)["state_dict"], "pytorch-lightning_version": "2.0.0"}
torch.save(bare, f"{FOLDER}/bare.ckpt")
try:
    FlowModel.load_from_checkpoint(f"{FOLDER}/bare.ckpt", weights_only=False, arch_name="medsegdiff_flow", image_size=32, dim=8, model_channels=8)
except Exception as error:
    print("REFUSED", json.dumps([type(error).__name__, str(error)]))
"""


def status(repo: str | None) -> str:
    assert repo is not None
    return subprocess.run(["git", "status", "--porcelain"], cwd=repo, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_qwen: Path) -> Path:
    """Return a folder with a checkpoint and reference outputs for each case, trained by the port in its own repo."""
    folder = tmp_path_factory.mktemp("port")
    cases = {}
    for name, (kind, arch, stages, _) in CASES.items():
        film = {"model_name": str(tiny_qwen), "cond_dim": 16, "text_mlp_hidden_dim": 16, "cache_dir": str(folder / "cache"), "dtype": "float32"}
        film |= {"batch_strategy": "per_sample", "device_map": None, "pred_warmup_epochs": 0}
        sizes = {"image_size": 32, "patch_plan": [[32, 1]], "timesteps": 2, "model_channels": 8, "channel_mult": [1, 2, 2], "num_blocks": 1}
        sizes |= {"attn_resolutions": [], "dim": 8, "learning_rate": 0.003, "use_vlm_film": True, "vlm_film_config": film}
        sizes |= {"loss": {"name": "flow_matching", "params": {"scheme": "l2"}}} if "multitask" not in arch else {}
        settings = {"arch_name": arch, **sizes, **({"vlm_film_decoder_stages": stages} if kind == "film" else {})}
        cases[name] = kind, settings
    (folder / "cases.json").write_text(json.dumps(cases))
    succeed(python(TRAINER, str(PORT), folder, cwd=folder, timeout=580))
    return folder


def test_they_give_the_ports_own_outputs_on_the_host_without_the_port(trained: Path) -> None:
    code = LOAD.replace("CASES", repr(list(CASES))).replace("{FOLDER}", str(trained))
    output = succeed(run_code(code, cwd=HOST, timeout=580, VLM_FILM_MODE="on", VLM_FILM_CACHE_DIR=str(trained / "ours")))
    results = [json.loads(line.removeprefix("RESULT ")) for line in output.splitlines() if line.startswith("RESULT ")]
    print(*results, sep="\n")
    assert [result["name"] for result in results] == list(CASES)
    for result in results:
        kind, _, _, stages = CASES[result["name"]]
        point = "post_block1" if kind == "film" else "post_block2"
        assert result["off"] < 1e-5, result
        # FiLM moves the output, and at the other place it would move it elsewhere: equality means something.
        assert result["plain"] > 1e-3 and result["other"] > 1e-3, result
        assert (result["point"], result["written"], result["stages"]) == (point, point, stages), result
    kind, text = json.loads(next(line for line in output.splitlines() if line.startswith("REFUSED ")).removeprefix("REFUSED "))
    assert kind == "CheckpointError" and "post_block1" in text and "post_block2" in text
    assert status(HOST) == status(PORT) == ""
