"""Libraries in processes of their own: imported and unused, trained by a script's own loop, beside teachers, loaded from files."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from processes import forked_code, succeed

HERE = str(Path(__file__).parent)
SETUP = f"""
import sys; sys.path[:0] = [{HERE!r}, {str(Path(HERE).parent)!r}]
import torch, vlmfilm_plugin
torch.set_num_threads(1)
"""
NET = """
from monai.networks.nets import BasicUNet
def net(seed):
    torch.manual_seed(seed)
    return BasicUNet(2, 1, 1, (4, 4, 4, 4, 4, 4))
x = torch.rand(8, 1, 32, 32, generator=torch.Generator().manual_seed(0))
def step(unet, optimizer, number):
    with vlmfilm_plugin.running_batch({"image": x}, phase="train", step=number):
        loss = unet(x).square().mean()
    optimizer.zero_grad(); loss.backward(); optimizer.step()
"""
ON = {"VLM_FILM_ENCODER": "descriptor", "VLM_FILM_COND_DIM": "16", "VLM_FILM_TEXT_MLP_HIDDEN_DIM": "16", "VLM_FILM_FEATURE_TRANSFORM": "none"}
needs_monai = pytest.mark.skipif(find_spec("monai") is None, reason="monai is not installed")
needs_diffusers = pytest.mark.skipif(find_spec("diffusers") is None, reason="diffusers is not installed (pip install --no-deps diffusers)")


def run(code: str, folder: Path, mode: str | None = "on", **variables: str) -> str:
    return succeed(forked_code(SETUP + code, cwd=folder, VLM_FILM_MODE=mode, **{**ON, **variables} if mode else {}))


@needs_monai
@pytest.mark.parametrize("mode", ["on", "off", "shuffle"])
def test_a_library_that_is_imported_and_not_used_changes_and_says_nothing(tmp_path: Path, mode: str) -> None:
    code = """
import monai.networks.nets, monai.losses
assert "vlmfilm_plugin.run.runtime" not in sys.modules, "what a run needs was loaded for an import"
loss = monai.losses.DiceLoss()(torch.rand(1, 1, 4, 4), torch.ones(1, 1, 4, 4))
"""
    result = forked_code(SETUP + code, cwd=tmp_path, VLM_FILM_MODE=mode, **ON)
    assert succeed(result) == "" and result.stderr == "", result.stderr


@needs_monai
def test_training_another_net_beside_an_imported_library_is_refused(tmp_path: Path) -> None:
    code = """
import monai.networks.nets
net = torch.nn.Conv2d(1, 1, 3)
optimizer = torch.optim.SGD(net.parameters(), 0.1)
net(torch.rand(1, 1, 8, 8)).mean().backward(); optimizer.step()
print("TRAINED")
"""
    result = forked_code(SETUP + code, cwd=tmp_path, VLM_FILM_MODE="on", **ON)
    assert result.returncode == 1 and "TRAINED" not in result.stdout
    assert "about to train a plain baseline" in result.stderr and re.search(r"monai.networks.nets.unet: +watched as MONAI", result.stderr)
    wrong = forked_code(SETUP + code, cwd=tmp_path, VLM_FILM_MODE="onn", **ON)
    assert wrong.returncode == 1 and "'onn'" in wrong.stderr, wrong.stderr


@needs_monai
def test_a_plain_loop_trains_film_and_off_equals_plain_to_the_bit(tmp_path: Path) -> None:
    code = (
        NET
        + """
unet = net(0)
optimizer = torch.optim.Adam(unet.parameters(), 1e-2)
start = {name: p.detach().clone() for name, p in unet.named_parameters() if "vlm_film" in name}
for number in range(3):
    if "vlm_film" in dict(unet.named_children()):
        step(unet, optimizer, number)
    else:
        loss = unet(x).square().mean(); optimizer.zero_grad(); loss.backward(); optimizer.step()
host = [p.double().sum().item() for name, p in unet.named_parameters() if "vlm_film" not in name]
still = [name for name, p in unet.named_parameters() if name in start and torch.equal(p, start[name])]
print("RESULT", host, torch.get_rng_state().sum().item(), len(start), still)
"""
    )
    plain, off, on = (run(code, tmp_path, mode).split("RESULT")[1].splitlines()[0] for mode in (None, "off", "on"))
    assert plain.rsplit("]", 2)[0].rsplit(" ", 2)[0] == off.rsplit("]", 2)[0].rsplit(" ", 2)[0]
    assert on.split("]")[0] != plain.split("]")[0] and on.endswith("[]")


@needs_monai
def test_a_frozen_teacher_beside_the_net_that_trains_stays_plain(tmp_path: Path) -> None:
    run(
        NET
        + """
student, teacher, loaded = net(0), net(1), net(2)
torch.save({k: v for k, v in net(3).state_dict().items() if "vlm_film" not in k}, "teacher.pt")
loaded.load_state_dict(torch.load("teacher.pt"))
teacher.requires_grad_(False)
optimizer = torch.optim.Adam(student.parameters(), 1e-2)
with torch.no_grad():
    outputs = [teacher(x), loaded(x)]  # no batch is published: the library's own call
assert not hasattr(teacher, "vlm_film") and not hasattr(loaded, "vlm_film") and hasattr(student, "vlm_film")
assert not any("vlm_film" in name for name in teacher.state_dict())
step(student, optimizer, 0)
with vlmfilm_plugin.running_batch({"image": x}, phase="train", step=1), torch.no_grad():
    assert torch.equal(teacher(x), outputs[0])
try:
    student(x)
    raise SystemExit("the student ran without a condition")
except vlmfilm_plugin.errors.ConditionError:
    pass
""",
        tmp_path,
    )


@needs_monai
def test_an_ema_that_is_built_and_loaded_keeps_its_film(tmp_path: Path) -> None:
    run(
        NET
        + """
unet, ema = net(0), net(1)
ema.load_state_dict(unet.state_dict()); ema.requires_grad_(False)
optimizer = torch.optim.Adam(unet.parameters(), 1e-2)
step(unet, optimizer, 0)
with vlmfilm_plugin.running_batch({"image": x}, phase="val"), torch.no_grad():
    ema(x)
assert hasattr(ema, "vlm_film")
""",
        tmp_path,
    )


@needs_monai
def test_film_in_a_frozen_teacher_alone_does_not_make_a_baseline_a_film_run(tmp_path: Path) -> None:
    for how in ("teacher.requires_grad_(False)", "teacher.eval()"):
        code = (
            NET
            + f"""
teacher, student = net(0), torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.Conv2d(4, 1, 3, padding=1))
{how}
optimizer = torch.optim.Adam(student.parameters(), 1e-2)
student(x).mean().backward(); optimizer.step()
print("TRAINED")
"""
        )
        result = forked_code(SETUP + code, cwd=tmp_path, VLM_FILM_MODE="on", **ON)
        assert result.returncode == 1 and "TRAINED" not in result.stdout and "about to train a plain baseline" in result.stderr, result.stderr


@needs_monai
def test_a_second_optimizer_may_step_first(tmp_path: Path) -> None:
    run(
        NET
        + """
unet, judge = net(0), torch.nn.Conv2d(1, 1, 3)
optimizer, other = torch.optim.Adam(unet.parameters(), 1e-2), torch.optim.Adam(judge.parameters(), 1e-2)
judge(x).mean().backward(); other.step()
step(unet, optimizer, 0)
""",
        tmp_path,
    )


@needs_monai
@pytest.mark.skipif(find_spec("med_seg_diff_pytorch") is None, reason="med-seg-diff-pytorch is not installed (pip install --no-deps)")
def test_beside_a_host_that_an_adapter_describes_the_nets_of_libraries_stay_plain(tmp_path: Path) -> None:
    run("from med_seg_diff_pytorch import Unet\n" + NET + 'assert not hasattr(net(0), "vlm_film")\nnet(0)(x)', tmp_path)


@needs_diffusers
def test_diffusers_loads_plain_and_film_weights_with_film_in_place(tmp_path: Path) -> None:
    code = """
from library_nets import NETS
net = NETS["UNet2DModel"]
torch.manual_seed(0)
cls = net.cls()
"""
    run(code + 'net.build(cls).save_pretrained("plain")', tmp_path, None)
    said = run(
        code
        + """
unet = cls.from_pretrained("plain")
print("STREAM", torch.get_rng_state().sum().item(), torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(0).get_state()))
assert not any(p.is_meta for p in unet.parameters())
for p in unet.vlm_film.parameters():
    p.data.normal_()
unet.save_pretrained("film")
""",
        tmp_path,
    )
    plain = run(code + 'unet = cls.from_pretrained("plain"); print("STREAM", torch.get_rng_state().sum().item(), True)', tmp_path, None)
    assert said.split("STREAM")[1].splitlines()[0] == plain.split("STREAM")[1].splitlines()[0]
    run(
        code
        + """
from safetensors.torch import load_file
unet, held = cls.from_pretrained("film"), load_file("film/diffusion_pytorch_model.safetensors")
assert unet.vlm_film.was_loaded and held.keys() == unet.state_dict().keys()
assert all(torch.equal(held[name], value) for name, value in unet.state_dict().items())
""",
        tmp_path,
    )


@needs_monai
def test_sliding_windows_of_several_images_are_refused_and_of_one_are_not(tmp_path: Path) -> None:
    code = (
        NET
        + """
import pickle
from monai.inferers import SlidingWindowInferer, sliding_window_inference
assert pickle.loads(pickle.dumps(sliding_window_inference)) is sliding_window_inference
unet = net(0).eval()
torch.nn.init.normal_(unet.vlm_film.heads[3].mlp[2].weight) if hasattr(unet, "vlm_film") else None
# As many windows a call as images: row i would pass for a window of image i.
x = torch.rand(2, 1, 48, 48)
for images, windows in ((x, 2), (x[:1], 4), (x[:1], 1)):
    try:
        with vlmfilm_plugin.running_batch({"image": images}, phase="test"), torch.no_grad():
            SlidingWindowInferer(32, sw_batch_size=windows)(images, unet)
        print("RAN", len(images), windows)
    except vlmfilm_plugin.errors.ConditionError as error:
        print("REFUSED", len(images), windows, str(error).splitlines()[0])
"""
    )
    said = run(code, tmp_path)
    assert "REFUSED 2 2 cannot tell which image each window of sliding_window_inference belongs to" in said and said.count("RAN 1") == 2
    assert run(code, tmp_path, "off").count("RAN") == 3
