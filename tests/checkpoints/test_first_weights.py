"""What the first version made keeps working: its state dicts and exported weights, made by its own code out of the history."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import environment
from small_unet import SmallUNet, inputs

from vlmfilm_plugin.checkpoints.film_weights import apply_adapter
from vlmfilm_plugin.forward.attach import attach

ROOT = Path(__file__).parents[2]
FIRST = "25f05ac4034d6a1867d3efc6e80611ec22e65b26"

# Run by the first version's own code; the UNet is today's.
MAKE = """
import sys, torch, types
# What today's UNet of the tests names for its types alone.
sys.modules["vlmfilm_plugin.film.module"] = types.SimpleNamespace(FilmModule=object)
sys.path.insert(0, sys.argv[2])
from small_unet import SmallUNet, inputs
import vlmfilm_plugin
assert vlmfilm_plugin.__file__.startswith(sys.argv[1]), vlmfilm_plugin.__file__
made = {}
for kind, given in {"by_hand": {"feature_dim": 5}, "descriptor": {"encoder": "descriptor"}, "text": {"feature_dim": 5, "use_text_prompt_cond": True},
                    "unbounded": {"feature_dim": 5, "gamma_scale": None, "beta_scale": None, "decoder_stages": [1]}}.items():
    torch.manual_seed(0)
    unet = SmallUNet()
    handle = vlmfilm_plugin.attach(unet, **given)
    with torch.no_grad():
        for parameter in handle.film.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        features = torch.randn(2, handle.film.architecture.feature_dim)
        with handle.condition(features=features):
            output = unet(*inputs(2))
    made[kind] = {"given": given, "state": unet.state_dict(), "features": features, "output": output}
torch.save(made, "made.pt")
torch.save({"state_dict": {"unet." + name: value for name, value in made["descriptor"]["state"].items()}}, "host.ckpt")
from vlmfilm_plugin.cli import main
raise SystemExit(main(["export", "host.ckpt", "film.safetensors"]))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first")
    archive = subprocess.run(["git", "archive", FIRST, "vlmfilm_plugin", "hooks"], cwd=ROOT, capture_output=True, check=False)
    if archive.returncode:
        pytest.skip("the history with the first version is not here")
    old = folder / "old"
    old.mkdir()
    subprocess.run(["tar", "-x", "-C", old], input=archive.stdout, check=True)
    command = [sys.executable, "-c", MAKE, str(old), str(ROOT / "tests")]
    result = subprocess.run(command, cwd=folder, env=environment(PYTHONPATH=str(old)), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize("kind", ["by_hand", "descriptor", "text", "unbounded"])
def test_its_state_dicts_load_strictly_and_give_the_same_output(made: Path, kind: str) -> None:
    item = torch.load(made / "made.pt", weights_only=True)[kind]
    unet = SmallUNet()
    handle = attach(unet, **item["given"])
    unet.load_state_dict(item["state"], strict=True)
    with torch.no_grad(), handle.condition(features=item["features"]):
        output = unet(*inputs(2))
    assert torch.equal(output, item["output"])


def test_its_exported_weights_are_applied(made: Path) -> None:
    torch.manual_seed(7)
    torch.save({"state_dict": {f"unet.{name}": value for name, value in SmallUNet().state_dict().items()}}, made / "plain.ckpt")
    apply_adapter(made / "film.safetensors", made / "plain.ckpt", made / "both.ckpt", force=True)
    item = torch.load(made / "made.pt", weights_only=True)["descriptor"]
    unet = SmallUNet()
    handle = attach(unet, encoder="descriptor")
    state = torch.load(made / "both.ckpt", weights_only=True)["state_dict"]
    unet.load_state_dict({name.removeprefix("unet."): value for name, value in state.items()})
    film = {name: value for name, value in item["state"].items() if "vlm_film" in name and not name.endswith("_extra_state")}
    assert film and all(torch.equal(unet.state_dict()[name], value) for name, value in film.items())
    with torch.no_grad(), handle.condition(features=item["features"]):
        unet(*inputs(2))
