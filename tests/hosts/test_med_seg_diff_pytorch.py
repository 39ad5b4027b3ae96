"""The real med-seg-diff-pytorch, untouched, in processes of its own; one of them real from its start, the others forks."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from processes import forked_code, run_code, succeed

pytestmark = pytest.mark.skipif(find_spec("med_seg_diff_pytorch") is None, reason="med-seg-diff-pytorch is not installed (pip install --no-deps)")

SETUP = """
import json, torch
from med_seg_diff_pytorch import Unet, MedSegDiff
torch.set_num_threads(1)
torch.manual_seed(0)
model = Unet(dim=16, image_size=32, mask_channels=1, input_img_channels=3, dim_mults=(1, 2), full_self_attn=(False, False),
             conditioning_kwargs=dict(dim_head=8, heads=2, depth=1, patch_size=8))
diffusion = MedSegDiff(model, timesteps=8)
image, mask = torch.rand(4, 3, 32, 32), (torch.rand(4, 1, 32, 32) > 0.5).float()
def train(steps, lr=1e-2):
    optimizer = torch.optim.Adam([p for p in diffusion.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        loss = diffusion(mask, image)
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        losses.append(loss.item())
    return losses
"""
ON = {"VLM_FILM_ENCODER": "descriptor", "VLM_FILM_COND_DIM": "16", "VLM_FILM_TEXT_MLP_HIDDEN_DIM": "16"}


def run(code: str, folder: Path, mode: str | None, **variables: str) -> str:
    return succeed(forked_code(SETUP + code, cwd=folder, VLM_FILM_MODE=mode, **{**ON, **variables} if mode else {}))


def last_words(output: str) -> str:
    """Return the host's own last line."""
    return [line for line in output.splitlines() if not line.startswith("[")][-1]


def last_json(output: str) -> dict[str, object]:
    found: dict[str, object] = json.loads(last_words(output))
    return found


def test_training_moves_heads_and_projection_and_samples_stay_finite(tmp_path: Path) -> None:
    output = succeed(
        run_code(
            SETUP
            + """
before = {n: p.detach().clone() for n, p in diffusion.named_parameters() if "vlm_film" in n}
train(1)
still = [n for n, p in diffusion.named_parameters() if n in before and not torch.equal(before[n], p)]
assert not still, f"FiLM is the identity until eight different images are counted: {still}"
image = torch.rand(4, 3, 32, 32)
train(4)
moved = [n for n, p in diffusion.named_parameters() if n in before and not torch.equal(before[n], p)]
sample = diffusion.sample(image)
print(json.dumps({"film": len(before), "moved": len(moved), "shape": list(sample.shape), "finite": bool(sample.isfinite().all())}))
""",
            cwd=tmp_path,
            VLM_FILM_MODE="on",
            **ON,
        )
    )
    # Its loop saves without us; how that is loaded is said all the same.
    assert output.splitlines()[-1].startswith("[VLM] checkpoints of this run hold FiLM: load them with VLM_FILM_MODE=off")
    found = last_json(output)
    assert found["shape"] == [4, 1, 32, 32] and found["finite"] is True
    # Everything but the LayerNorm behind a still-zero last layer has a gradient after the second step.
    assert found["film"] == found["moved"] == 2 * 6 + 4
    assert (tmp_path / "cache" / "vlm_profiles" / "features.sqlite").is_file()


def test_each_image_is_looked_up_once_a_sample_call_however_many_steps_follow(tmp_path: Path) -> None:
    output = run(
        """
from vlmfilm_plugin.features.provider import FeatureProvider
calls = []
get = FeatureProvider.get
FeatureProvider.get = lambda self, samples, **more: (calls.append(len(samples)), get(self, samples, **more))[1]
forwards = []
model.register_forward_pre_hook(lambda *a: forwards.append(1))
diffusion.sample(image)
print(json.dumps({"lookups": calls, "forwards": len(forwards)}))
""",
        tmp_path,
        "on",
        VLM_FILM_FEATURE_TRANSFORM="none",
    )
    assert last_json(output) == {"lookups": [4], "forwards": 8}


def test_off_equals_the_plain_host_to_the_bit(tmp_path: Path) -> None:
    code = """
losses = train(3)
torch.manual_seed(1)
sample = diffusion.sample(image)
print(json.dumps({"losses": losses, "sum": sample.double().sum().item(), "keys": sum("vlm_film" in k for k in diffusion.state_dict())}))
"""
    plain, off = last_json(run(code, tmp_path, None)), last_json(run(code, tmp_path, "off"))
    assert plain["keys"] == 0 and off["keys"] != 0
    assert (plain["losses"], plain["sum"]) == (off["losses"], off["sum"])


def test_the_first_step_of_on_equals_the_plain_host_to_the_bit(tmp_path: Path) -> None:
    code = "print({'losses': train(1)})"
    assert last_words(run(code, tmp_path, None)) == last_words(run(code, tmp_path, "on"))


def test_a_caller_with_names_publishes_its_batch(tmp_path: Path) -> None:
    output = run(
        """
import numpy as np, vlmfilm_plugin
from PIL import Image
files = []
for i in range(4):
    files.append(f"case{i}.png"); Image.fromarray((np.random.default_rng(i).random((40, 40)) * 255).astype("uint8")).save(files[-1])
with vlmfilm_plugin.running_batch({"image": image, "filepath": files, "split": "train"}, phase="train", step=0):
    diffusion(mask, image).backward()
print(json.dumps({"ok": True}))
""",
        tmp_path,
        "on",
    )
    assert "[VLM] cache_key_example: train:case0.png" in output


def test_a_unet_called_on_its_own_is_refused_with_the_way_out(tmp_path: Path) -> None:
    result = forked_code(SETUP + "model(mask, torch.zeros(4), image)", cwd=tmp_path, VLM_FILM_MODE="on", **ON)
    assert result.returncode == 1
    assert "ConditionError: Unet was called with no condition in force" in result.stderr and "running_batch" in result.stderr


def test_state_dict_round_trip_carries_the_architecture_and_refuses_another(tmp_path: Path) -> None:
    run('image = torch.rand(8, 3, 32, 32); mask = torch.rand(8, 1, 32, 32); train(2); torch.save(diffusion.state_dict(), "film.pt")', tmp_path, "on")
    load = """
missing = diffusion.load_state_dict(torch.load("film.pt", weights_only=True))
assert model.vlm_film.feature_transform.statistics.facts.count == 8
print(json.dumps({"moved": float(model.vlm_film.heads[0].mlp[2].weight.abs().sum())}))
"""
    assert last_json(run(load, tmp_path, "on"))["moved"] != 0.0
    other = forked_code(SETUP + load, cwd=tmp_path, VLM_FILM_MODE="on", **{**ON, "VLM_FILM_DECODER_STAGES": "1"})
    assert other.returncode == 1 and "CheckpointError" in other.stderr and "decoder_stages=[0, 1]" in other.stderr


def test_a_baseline_state_dict_loads_at_identity_with_one_warning(tmp_path: Path) -> None:
    run('torch.save(diffusion.state_dict(), "plain.pt"); print("{}")', tmp_path, None)
    output = run('diffusion.load_state_dict(torch.load("plain.pt", weights_only=True)); train(1); print("{}")', tmp_path, "on")
    assert output.count("WARNING: the checkpoint has no FiLM weights") == 1


def test_a_loss_in_eval_mode_validates_and_conditions_images_on_themselves(tmp_path: Path) -> None:
    output = run(
        """
from vlmfilm_plugin.hosts import activation
train(2)
diffusion.eval()
seen = []
runtime = activation.current().runtime
batch = type(runtime).batch
type(runtime).batch = lambda self, b, *, phase, **k: (seen.append(phase), batch(self, b, phase=phase, **k))[1]
with torch.no_grad():
    diffusion(mask, torch.rand(4, 3, 32, 32))
diffusion.train()
diffusion(mask, image)
print(json.dumps({"seen": seen}))
""",
        tmp_path,
        "on",
        VLM_FILM_BATCH_STRATEGY="first",
    )
    assert last_json(output) == {"seen": ["val", "train"]}


ACCELERATED = """
from accelerate import Accelerator
accelerator = Accelerator(cpu=True, mixed_precision=PRECISION)
optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-2)
prepared, optimizer = accelerator.prepare(diffusion, optimizer)
before = {n: p.detach().clone() for n, p in diffusion.named_parameters() if "vlm_film.heads" in n}
for _ in range(2):
    loss = prepared(mask, image)
    optimizer.zero_grad(); accelerator.backward(loss); optimizer.step()
moved = all(not torch.equal(before[n], p) for n, p in diffusion.named_parameters() if n in before and n.endswith("2.bias"))
samples = [model.sample(image) for model in (prepared, accelerator.unwrap_model(prepared))]
again = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
loss = again(mask, image)
print(json.dumps({"moved": moved and bool(before), "finite": all(bool(s.isfinite().all()) for s in samples), "loss": loss.item() > 0}))
"""


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_accelerates_prepare_keeps_the_batch_in_force_in_every_precision(tmp_path: Path, precision: str) -> None:
    # Two steps train FiLM only where it does not wait for statistics of features.
    output = run(ACCELERATED.replace("PRECISION", repr(precision)), tmp_path, "on", VLM_FILM_FEATURE_TRANSFORM="none")
    assert last_json(output) == {"moved": True, "finite": True, "loss": True}
    plain = run(ACCELERATED.replace("PRECISION", repr(precision)).replace("moved and bool(before)", "True"), tmp_path, None)
    assert last_json(plain) == last_json(output)


CENTRED = """
from accelerate import Accelerator
accelerator = Accelerator(cpu=True, mixed_precision=PRECISION)
optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-2)
prepared, optimizer = accelerator.prepare(diffusion, optimizer)
film = model.vlm_film
counts, moved = [], []
for step in range(5):
    before = film.heads[0].mlp[2].bias.detach().clone()
    loss = prepared(mask, torch.rand(4, 3, 32, 32))
    optimizer.zero_grad(); accelerator.backward(loss); optimizer.step()
    counts.append(film.feature_transform.statistics.facts.count)
    moved.append(not torch.equal(before, film.heads[0].mlp[2].bias))
accelerator.save_model(prepared, "saved", safe_serialization=False)
held = accelerator.unwrap_model(prepared).state_dict()
mean = next(value for name, value in held.items() if name.endswith("feature_transform.mean"))
sample = prepared.sample(image)
print(json.dumps({"counts": counts, "moved": moved, "mean": bool(mean.abs().sum() > 0), "finite": bool(sample.isfinite().all())}))
"""


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_under_accelerates_prepare_statistics_are_counted_and_film_trains_from_the_eighth_image(tmp_path: Path, precision: str) -> None:
    found = last_json(run(CENTRED.replace("PRECISION", repr(precision)), tmp_path, "on"))
    assert found == {"counts": [4, 8, 12, 16, 20], "moved": [False, True, True, True, True], "mean": True, "finite": True}
