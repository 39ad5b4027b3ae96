"""Which feature each row of each UNet forward gets, seen from inside the stand-in host: patches, windows, EMA, recomputation."""

from __future__ import annotations

import json

import pytest
from processes import forked_code, succeed
from stand_in import SETTINGS, StandIn

# The expected gamma of a row is computed from the file on disk, by hand; the gamma that was used is taken at the modulation.
SETUP = """
import json, glob, hashlib, os, torch
import numpy as np
from PIL import Image
import torch
from src.archs.flow_model import FlowModel
from src.archs.diffusion_model import DiffusionModel
from vlmfilm_plugin.film import layers
from vlmfilm_plugin.encoders.descriptor import DescriptorEncoder
from vlmfilm_plugin.features.images import read_image

used = []
modulate = layers.modulate
layers.modulate = lambda x, gamma, beta: (used.append((gamma.detach().clone(), beta.detach().clone())), modulate(x, gamma, beta))[1]

def batch_of(files, size=32):
    image = torch.stack([torch.randn(1, size, size) for _ in files])
    label = (torch.rand(len(files), 1, size, size) > 0.7).float()
    return {"image": image, "label": label, "geometry": label * 2 - 1, "name": [f"train/image/{os.path.basename(f)}" for f in files],
            "image_meta_dict": {"filename_or_obj": list(files)}}

def wake(model):
    for module in model.modules():
        if type(module).__name__ == "AdaptiveFiLMHead":
            torch.nn.init.normal_(module.mlp[2].weight, std=0.5)

def expected(film, files, head):
    feature = DescriptorEncoder().encode([read_image(f) for f in files]).half().float()
    with torch.no_grad():
        return film.heads[head](film.project(feature))

def flow(**kwargs):
    torch.manual_seed(0)
    sizes = dict(arch_name="medsegdiff_flow", image_size=32, timesteps=2, model_channels=8, channel_mult=[1, 2], attn_resolutions=[])
    model = FlowModel(**{**sizes, **kwargs})
    wake(model)
    return model

files = sorted(glob.glob(os.environ["DATA"] + "/train/image/*.png"))[:4]
"""


def run(stand_in: StandIn, code: str, mode: str = "on", **variables: str) -> str:
    cache = str(stand_in.root / "cache_rows")
    # Features as they are: what is computed by hand here, and there are fewer images than a mean needs.
    raw = {"VLM_FILM_FEATURE_TRANSFORM": "none"}
    variables = {**SETTINGS, **raw, "VLM_FILM_CACHE_DIR": cache, "DATA": str(stand_in.data), **variables}
    return succeed(forked_code(SETUP + code, cwd=stand_in.repo, VLM_FILM_MODE=mode, **variables))


def test_every_patch_is_conditioned_on_its_own_image(stand_in: StandIn) -> None:
    run(
        stand_in,
        """
model = flow(patch_plan=[[16, 3]])
model.training_step(batch_of(files[:2]), 0)
film = model.unet.base_unet.vlm_film
for head, (gamma, beta) in enumerate(used):
    want = expected(film, files[:2], head)
    assert gamma.shape[0] == 6
    assert torch.allclose(gamma, want[0].repeat_interleave(3, dim=0), atol=1e-5)
    assert torch.allclose(beta, want[1].repeat_interleave(3, dim=0), atol=1e-5)
    assert not torch.allclose(gamma[0], gamma[3], atol=1e-3)
assert len(used) == 2
""",
    )


def test_every_window_of_an_image_is_conditioned_on_it_at_a_standing_step(stand_in: StandIn) -> None:
    run(
        stand_in,
        """
model = flow().eval()
film = model.unet.base_unet.vlm_film
seen = []
for file in files:
    used.clear()
    with torch.no_grad():
        model.validation_step(batch_of([file], size=48), 0)
    rows = {g.shape[0] for g, _ in used}
    assert rows - {1}, rows
    want = expected(film, [file], 0)[0]
    for gamma, _ in used[0::2]:
        assert torch.allclose(gamma, want.expand_as(gamma), atol=1e-5)
    seen.append(want)
assert not torch.allclose(seen[0], seen[1], atol=1e-3)
""",
    )


def test_evaluation_looks_up_once_for_each_image_and_computes_in_every_forward(stand_in: StandIn) -> None:
    output = run(
        stand_in,
        """
from vlmfilm_plugin.features.provider import FeatureProvider
model = flow(timesteps=4).eval()
film = model.unet.base_unet.vlm_film
calls = {"project": 0, "get": 0, "head": 0}
project, get = type(film).project, FeatureProvider.get
type(film).project = lambda self, f: (calls.__setitem__("project", calls["project"] + 1), project(self, f))[1]
FeatureProvider.get = lambda self, s, **more: (calls.__setitem__("get", calls["get"] + 1), get(self, s, **more))[1]
film.heads[0].register_forward_hook(lambda *a: calls.__setitem__("head", calls["head"] + 1))
with torch.inference_mode():
    for file in files[:2]:
        model.test_step(batch_of([file], size=64), 0)
print(json.dumps({**calls, "forwards": len(used) // 2}))
""",
    )
    found = json.loads(output.splitlines()[-1])
    assert found["get"] == 2
    # Nine windows in calls of 4, 4 and 1 rows, four solver steps each: what an EMA may swap in for one of them acts at once.
    assert found["head"] == found["project"] == found["forwards"] == 2 * 3 * 4


def test_windows_of_several_images_a_batch_are_refused(stand_in: StandIn) -> None:
    output = run(
        stand_in,
        """
model = flow().eval()
try:
    with torch.no_grad():
        model.validation_step(batch_of(files[:2], size=48), 0)
except Exception as error:
    print(type(error).__name__, error)
""",
    )
    assert "ConditionError cannot tell which sample each row" in output and "batch size 1" in output


def test_whole_images_of_a_batch_are_told_apart_in_evaluation(stand_in: StandIn) -> None:
    run(
        stand_in,
        """
model = flow(use_sliding_infer=False).eval()
with torch.no_grad():
    model.validation_step(batch_of(files[:3]), 0)
want = expected(model.unet.base_unet.vlm_film, files[:3], 0)[0]
assert torch.allclose(used[0][0], want, atol=1e-5) and used[0][0].shape[0] == 3
""",
    )


def test_multitask_and_diffusion_rows_and_the_ema_copys_own_heads(stand_in: StandIn) -> None:
    run(
        stand_in,
        """
model = flow(arch_name="medsegdiff_flow_multitask", patch_plan=[[16, 2]])
model.training_step(batch_of(files[:2]), 0)
assert torch.allclose(used[0][0], expected(model.unet.base_unet.vlm_film, files[:2], 0)[0].repeat_interleave(2, dim=0), atol=1e-5)

torch.manual_seed(0)
model = DiffusionModel(arch_name="medsegdiff", image_size=32, dim=8, timesteps=2)
ours, copy = model.diffusion_model.model.vlm_film, model.ema_model.model.vlm_film
assert ours is not copy and ours.film_id == copy.film_id
wake(model.diffusion_model); wake(model.ema_model)
used.clear()
model.training_step(batch_of(files[:2]), 0)
assert torch.allclose(used[0][0], expected(ours, files[:2], 0)[0], atol=1e-5)
used.clear()
with torch.no_grad():
    model.eval().validation_step(batch_of(files[:1]), 0)
assert torch.allclose(used[0][0], expected(copy, files[:1], 0)[0].expand_as(used[0][0]), atol=1e-5)
assert not torch.allclose(expected(copy, files[:1], 0)[0], expected(ours, files[:1], 0)[0], atol=1e-3)
""",
    )


@pytest.mark.parametrize("kind", ["nonreentrant", "reentrant"])
def test_recomputed_blocks_get_the_condition_of_their_own_forward(stand_in: StandIn, kind: str) -> None:
    run(
        stand_in,
        f"""
def gradients(kind):
    model = flow().double()
    model.unet.base_unet.use_checkpoint = kind
    torch.manual_seed(1)
    batches = [batch_of(files[:2]), batch_of(files[2:4])]
    for batch in batches:
        batch.update({{k: v.double() for k, v in batch.items() if torch.is_tensor(v)}})
    loss = sum(model.training_step(batch, i) * (i + 1) for i, batch in enumerate(batches))
    loss.backward()
    return {{n: p.grad for n, p in model.named_parameters()}}
plain, again = gradients(None), gradients({kind!r})
biggest = max(g.norm() for g in plain.values() if g is not None)
assert plain["unet.base_unet.vlm_film.image_to_cond.proj.weight"].norm() > 0
for name, gradient in plain.items():
    assert (gradient is None) == (again[name] is None), name
    if gradient is not None:
        assert (gradient - again[name]).norm() <= 1e-9 * biggest, name
""",
    )


def test_shuffle_moves_every_row_and_depends_on_the_step_alone(stand_in: StandIn) -> None:
    run(
        stand_in,
        """
model = flow(patch_plan=[[16, 2]])
film = model.unet.base_unet.vlm_film
runs = []
for seed in (0, 7):
    used.clear(); torch.manual_seed(seed)
    model.training_step(batch_of(files), 0)
    runs.append(used[0][0])
assert torch.equal(runs[0], runs[1])
own = expected(film, files, 0)[0].repeat_interleave(2, dim=0)
assert not any(torch.allclose(a, b, atol=1e-4) for a, b in zip(own, runs[0]))
""",
        "shuffle",
    )


def test_a_shuffled_image_alone_gets_another_images_feature_or_stops(stand_in: StandIn) -> None:
    empty = str(stand_in.root / "cache_alone")
    code = """
model = flow().eval()
film = model.unet.base_unet.vlm_film
def step():
    used.clear()
    with torch.no_grad():
        model.test_step(batch_of(files[:1]), 0)
    return used[0][0]
try:
    step()
except Exception as error:
    print(type(error).__name__, error)
from vlmfilm_plugin.hosts import activation
source = activation.current().runtime.states.of(film).provider
source.get(source.samples_of(batch_of(files[1:2]), torch.zeros(1, 1, 32, 32), (-1, 1)))
assert torch.allclose(step(), expected(film, files[1:2], 0)[0], atol=1e-5)
"""
    output = run(stand_in, code, "shuffle", VLM_FILM_CACHE_DIR=empty)
    assert "ConditionError cannot shuffle a batch of one image" in output


def test_a_model_without_a_unet_that_can_carry_film_is_refused(stand_in: StandIn) -> None:
    output = run(
        stand_in,
        """
from src.registry.base import ARCHS_REGISTRY
import torch.nn as nn
@ARCHS_REGISTRY.register(name="other")
class Other(nn.Module):
    def __init__(self, **_):
        super().__init__()
try:
    flow(arch_name="other")
except Exception as error:
    print(type(error).__name__, error)
""",
    )
    assert "HostError VLM_FILM_MODE=on asks for FiLM, but this FlowModel has no UNet" in output and "'other'" in output


def test_a_damaged_source_image_is_an_error_that_names_it(stand_in: StandIn) -> None:
    output = run(
        stand_in,
        """
import shutil, tempfile
bad = os.path.join(tempfile.mkdtemp(), "bad.png")
open(bad, "w").write("this is no picture")
try:
    flow().training_step(batch_of([files[0], bad]), 0)
except Exception as error:
    print(type(error).__name__, error)
""",
    )
    assert "ImageReadError" in output and "bad.png" in output


def test_a_replaced_file_is_encoded_again(stand_in: StandIn) -> None:
    run(
        stand_in,
        """
import shutil, tempfile
mine = os.path.join(tempfile.mkdtemp(), "mine.png")
model = flow()
film = model.unet.base_unet.vlm_film
for source in files[:2]:
    shutil.copy(source, mine); used.clear()
    model.training_step(batch_of([mine]), 0)
    assert torch.allclose(used[0][0], expected(film, [source], 0)[0], atol=1e-5)
""",
    )


def test_a_cache_folder_that_cannot_be_written_is_an_error_not_silence(stand_in: StandIn) -> None:
    blocked = stand_in.root / "blocked"
    blocked.touch()
    output = run(
        stand_in,
        """
try:
    flow().training_step(batch_of(files[:1]), 0)
except Exception as error:
    print(type(error).__name__, error)
""",
        VLM_FILM_CACHE_DIR=str(blocked / "cache"),
    )
    assert "StoreError" in output and "blocked" in output and "fix:" in output


def test_a_step_that_is_not_logged_reads_nothing_back_from_the_device(stand_in: StandIn) -> None:
    output = run(
        stand_in,
        """
import sys
from vlmfilm_plugin.hosts.activation import current
current().runtime.learn_image_files((f"train/image/{os.path.basename(file)}", file) for file in files)
model = flow(patch_plan=[[16, 2]])
batch = batch_of(files[:2])
for number in range(4):  # the alarm reads in the first two steps of a process
    type(model).global_step = property(lambda self, number=number: number)
    model.training_step(batch, 0).backward()
reads = []
def watch(name):
    original = getattr(torch.Tensor, name)
    def watched(self, *args, **kwargs):
        frame = sys._getframe(1)
        while "/torch/" in frame.f_code.co_filename:
            frame = frame.f_back
        # The host's own reads, below our wrapper of its step, are its own affair.
        path = frame.f_code.co_filename
        if "vlmfilm_plugin" in path:
            reads.append((name, path.rsplit("/", 1)[-1], frame.f_lineno))
        return original(self, *args, **kwargs)
    setattr(torch.Tensor, name, watched)
for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "nonzero"):
    watch(name)
type(model).global_step = property(lambda self: 4)
model.training_step(batch, 1).backward()
print("READS", json.dumps(reads))
type(model).global_step = property(lambda self: 100)
model.training_step(batch, 2).backward()
print("READS", json.dumps(len(reads)))
assert model.unet.base_unet.vlm_film.feature_transform.is_frozen
""",
        VLM_FILM_FEATURE_TRANSFORM="center",
    )
    found = [json.loads(line.removeprefix("READS ")) for line in output.splitlines() if line.startswith("READS ")]
    # The logged step proves that the watch sees reads at all.
    assert found[0] == [] and found[1] > 10


def test_shuffled_rows_of_one_image_never_get_its_own_feature(stand_in: StandIn) -> None:
    run(
        stand_in,
        """
model = flow()
film = model.unet.base_unet.vlm_film
for step in range(4):
    type(model).global_step = property(lambda self: step)
    used.clear()
    model.training_step(batch_of([files[0], files[0], files[1], files[0]]), 0)
    own, other = (expected(film, [f], 0)[0][0] for f in files[:2])
    wanted = [other, other, own, other]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(used[0][0], wanted, strict=True))
""",
        "shuffle",
    )
