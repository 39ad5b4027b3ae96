"""What happens over a process's life: attached again and again, two hosts at once, modules reloaded, notebook cells run twice."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from processes import DEMO_HOST, run_code, succeed
from small_unet import SmallUNet, inputs, randomise
from torch import Tensor, nn

from vlmfilm_plugin import conditioning
from vlmfilm_plugin.attachment import FilmHandle, attach
from vlmfilm_plugin.errors import ConditionError, HostError, VlmFilmError

SETTINGS = {"VLM_FILM_ENCODER": "descriptor", "VLM_FILM_COND_DIM": "16", "VLM_FILM_TEXT_MLP_HIDDEN_DIM": "16"}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLM_FILM_MODE", raising=False)


def hooks_of(unet: nn.Module) -> dict[tuple[str, str], int]:
    return {(name, kind): len(getattr(module, kind)) for name, module in unet.named_modules() for kind in HOOKS if getattr(module, kind)}


def film_on(unet: nn.Module, **settings: object) -> FilmHandle:
    return attach(unet, feature_dim=5, **{"cond_dim": 4, "text_mlp_hidden_dim": 6, **settings})


def features(seed: int = 0, rows: int = 3) -> Tensor:
    return torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed))


def output(handle: FilmHandle) -> Tensor:
    with torch.no_grad(), handle.condition(features=features()):
        return handle.unet(*inputs(3))


def test_hooks_and_state_do_not_pile_up_over_many_attachments() -> None:
    unet = SmallUNet()
    before, keys = hooks_of(unet), list(unet.state_dict())
    first = film_on(unet)
    once = hooks_of(unet)
    first.remove()
    for cycle in range(5):
        handle = film_on(unet)
        assert hooks_of(unet) == once and len(handle.film.heads) == 2
        randomise(handle.film, cycle)
        output(handle)
        handle.remove()
        assert hooks_of(unet) == before == {} and list(unet.state_dict()) == keys
    assert not conditioning._stacks.frames and not conditioning._stacks.conditions


def test_attached_again_film_is_fresh_and_may_have_another_shape() -> None:
    unet = SmallUNet()
    with torch.no_grad():
        plain = unet(*inputs(3))
    first = film_on(unet)
    randomise(first.film)
    assert not torch.equal(output(first), plain)
    first.remove()
    second = film_on(unet, decoder_stages=[1], cond_dim=8)
    assert torch.equal(output(second), plain)
    assert [stage.index for stage in second.stages] == [1] and second.film is not first.film


def test_an_old_handle_can_neither_remove_nor_condition_a_later_attachment() -> None:
    unet = SmallUNet()
    old = film_on(unet)
    old.remove()
    new = film_on(unet)
    randomise(new.film)
    expected = output(new)
    old.remove()
    assert torch.equal(output(new), expected)
    with pytest.raises(ConditionError, match="no condition in force"):
        output(old)


def test_an_optimizer_over_the_removed_film_leaves_the_unet_alone() -> None:
    unet = SmallUNet()
    handle = film_on(unet)
    randomise(handle.film)
    optimizer = torch.optim.SGD(unet.parameters(), lr=0.1)
    with handle.condition(features=features()):
        unet(*inputs(3)).sum().backward()
    handle.remove()
    optimizer.step()
    optimizer.zero_grad()
    unet(*inputs(3)).sum().backward()
    assert all(parameter.grad is None for parameter in handle.film.parameters())


def test_removed_inside_a_condition_or_by_a_failing_block_nothing_is_left() -> None:
    unet = SmallUNet()
    handle = film_on(unet)
    with handle.condition(features=features()):
        handle.remove()
        unet(*inputs(3))
    with pytest.raises(KeyError), film_on(unet) as again, again.condition(features=features()):
        raise KeyError
    assert hooks_of(unet) == {} and not conditioning._stacks.frames and not conditioning._stacks.conditions


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_removed_between_forward_and_a_recomputing_backward_gradients_are_right_or_it_raises(use_reentrant: bool) -> None:
    def gradients(is_removed: bool) -> dict[str, Tensor | None]:
        torch.manual_seed(0)
        handle = film_on(SmallUNet(use_reentrant=use_reentrant).double())
        randomise(handle.film)
        with handle.condition(features=features()):
            loss = handle.unet(*inputs(3, dtype=torch.float64)).square().sum()
        named = dict(handle.unet.named_parameters())
        if is_removed:
            handle.remove()
        loss.backward()
        return {name: parameter.grad for name, parameter in named.items()}

    expected = gradients(False)
    try:
        found = gradients(True)
    except Exception:
        return
    for name, gradient in expected.items():
        assert found[name] is not None, f"{name} has lost its gradient"
        torch.testing.assert_close(found[name], gradient, msg=name)


def test_a_copy_made_before_removal_keeps_its_own_film() -> None:
    import copy

    handle = film_on(SmallUNet())
    randomise(handle.film)
    expected, twin = output(handle), copy.deepcopy(handle.unet)
    handle.remove()
    with torch.no_grad():
        with pytest.raises(ConditionError):
            twin(*inputs(3))
        with handle.condition(features=features()):
            assert torch.equal(twin(*inputs(3)), expected)
    with pytest.raises(HostError):
        film_on(twin)


def test_removing_where_the_host_took_the_module_out_already_still_takes_every_hook() -> None:
    unet = SmallUNet()
    handle = film_on(unet)
    del unet.vlm_film
    try:
        handle.remove()
    except VlmFilmError:
        pass
    handle.remove()
    assert hooks_of(unet) == {}
    unet(*inputs(3))


# The rest runs in processes of their own: cells of a notebook are `exec` in one namespace.

NOTEBOOK = """
import os, sys, torch
torch.set_num_threads(1)
import vlmfilm_plugin
space = {"__name__": "__main__"}
def cell(text):
    exec(compile(text, "<cell>", "exec"), space)
def attempt(text):
    "Run a cell; return the error's name, or None."
    try:
        cell(text)
    except BaseException as error:
        print("SAID", type(error).__name__, error)
        return type(error).__name__
IMPORT = '''
from src.archs.flow_model import FlowModel
from src.archs.components.diffusion_unet import MedSegDiffUNet
'''
BUILD = '''
def build():
    torch.manual_seed(0)
    return FlowModel(arch_name="medsegdiff_flow", image_size=16, timesteps=2, model_channels=8, channel_mult=[1, 2], attn_resolutions=[])
model = build()
'''
STEP = '''
def batch(rows=2):
    label = (torch.rand(rows, 1, 16, 16) > 0.5).float()
    return {"image": torch.rand(rows, 1, 16, 16) * 2 - 1, "label": label, "geometry": label * 2 - 1}
model.training_step(batch(), 0).backward()
'''
space["torch"], space["os"], space["vlmfilm_plugin"] = torch, os, vlmfilm_plugin
def films(model):
    return [name for name, module in model.named_modules() if type(module).__name__ == "FilmModule"]
def is_trained(model):
    "Tell whether FiLM took part in the last backward, exactly once a block."
    film = model.unet.base_unet.vlm_film
    hooks = [len(model.unet.base_unet.ups[i][1]._forward_hooks) for i in range(2)]
    return all(head.mlp[2].weight.grad is not None and float(head.mlp[2].weight.grad.norm()) > 0 for head in film.heads) and hooks == [1, 1]
"""


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the demo's host."""
    target = tmp_path_factory.mktemp("life") / "host"
    shutil.copytree(DEMO_HOST, target, ignore=shutil.ignore_patterns("__pycache__"))
    return target


def notebook(repo: Path, tmp_path: Path, code: str, mode: str | None = None) -> str:
    return succeed(run_code(NOTEBOOK + code, cwd=repo, VLM_FILM_MODE=mode, VLM_FILM_CACHE_DIR=str(tmp_path), **SETTINGS))


def test_one_cell_run_again_and_again_gives_a_fresh_model_with_film_once(repo: Path, tmp_path: Path) -> None:
    notebook(
        repo,
        tmp_path,
        """
for run in range(3):
    cell('os.environ["VLM_FILM_MODE"] = "on"; assert vlmfilm_plugin.activate() is vlmfilm_plugin.activate()')
    cell(IMPORT + BUILD + STEP)
    model = space["model"]
    assert films(model) == ["unet.base_unet.vlm_film"] and is_trained(model)
    assert float(model.unet.base_unet.vlm_film.heads[0].mlp[2].weight.norm()) == 0
""",
    )


def test_classes_defined_in_a_cell_carry_film_each_time_the_cell_runs(repo: Path, tmp_path: Path) -> None:
    notebook(
        repo,
        tmp_path,
        """
cell('os.environ["VLM_FILM_MODE"] = "on"; vlmfilm_plugin.activate()')
cell(IMPORT)
for run in range(2):
    cell('''
class Mine(FlowModel):
    def training_step(self, batch, batch_idx):
        return 2 * super().training_step(batch, batch_idx)
class Wider(MedSegDiffUNet):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.extra = torch.nn.Linear(1, 1)
''')
    cell(BUILD.replace("FlowModel(", "Mine(") + STEP)
    model = space["model"]
    assert type(model).__name__ == "Mine" and films(model) == ["unet.base_unet.vlm_film"] and is_trained(model)
    cell('wider = Wider(8, 16, dim_mult=(1, 2), full_self_attn=(False, False))')
    assert films(space["wider"]) == ["vlm_film"]
    assert [len(stage[1]._forward_hooks) for stage in space["wider"].ups] == [1, 1]
""",
    )


def test_a_host_imported_before_activation_carries_film_in_models_built_after(repo: Path, tmp_path: Path) -> None:
    notebook(
        repo,
        tmp_path,
        """
cell(IMPORT)
cell('os.environ["VLM_FILM_MODE"] = "on"; vlmfilm_plugin.activate(); vlmfilm_plugin.activate()')
cell(BUILD + STEP)
assert films(space["model"]) == ["unet.base_unet.vlm_film"] and is_trained(space["model"])
""",
    )


def test_an_activation_that_was_refused_is_refused_again_until_it_can_succeed(repo: Path, tmp_path: Path) -> None:
    notebook(
        repo,
        tmp_path,
        """
cell(IMPORT + BUILD)
ACTIVATE = 'os.environ["VLM_FILM_MODE"] = "on"; vlmfilm_plugin.activate()'
assert attempt(ACTIVATE) == "HostError"
again = attempt(ACTIVATE)
cell(IMPORT)
# A second run of the cell must not look like a success that leaves later models plain.
if again is None:
    failed = attempt(BUILD + STEP)
    assert failed or (films(space["model"]) and is_trained(space["model"])), "the cell succeeded and the model is a plain baseline"
else:
    assert again == "HostError"
    import gc
    del space["model"]; gc.collect()
    assert attempt(ACTIVATE) is None
    cell(BUILD + STEP)
    assert films(space["model"]) and is_trained(space["model"])
""",
    )


@pytest.mark.parametrize("later", ["off", "shuffle", "nonsense", None])
def test_another_mode_in_a_later_cell_takes_effect_or_is_refused(repo: Path, tmp_path: Path, later: str | None) -> None:
    notebook(
        repo,
        tmp_path,
        f"""
later = {later!r}
cell('os.environ["VLM_FILM_MODE"] = "on"; vlmfilm_plugin.activate()')
cell(IMPORT + BUILD)
if later is None:
    del os.environ["VLM_FILM_MODE"]
else:
    os.environ["VLM_FILM_MODE"] = later
failed = attempt('vlmfilm_plugin.activate()') or attempt(IMPORT + BUILD)
mode = space["model"].unet.base_unet.vlm_film.mode
assert failed or mode == later, f"the variable says {{later}}, the new model runs {{mode}}, and nothing was said"
""",
    )


@pytest.mark.parametrize(
    "names",
    [
        ["src.archs.components.diffusion_unet"],
        ["src.archs.flow_model"],
        ["src.archs.components.diffusion_unet", "src.archs.components.medsegdiff_flow", "src.archs.flow_model"],
    ],
    ids=["unet", "model", "all"],
)
def test_a_reloaded_host_carries_film_or_stops(repo: Path, tmp_path: Path, names: list[str]) -> None:
    notebook(
        repo,
        tmp_path,
        f"""
import importlib
cell(IMPORT + BUILD + STEP)
def reload_and_build():
    for name in {names!r}:
        importlib.reload(sys.modules[name])
    cell(IMPORT + BUILD)
    assert films(space["model"]), "the reloaded host built a plain baseline"
    cell(STEP)
    assert is_trained(space["model"]), "FiLM took no part, or took part twice"
    unet = space["MedSegDiffUNet"](8, 16, dim_mult=(1, 2), full_self_attn=(False, False))
    assert films(unet), "the reloaded UNet is plain"
try:
    reload_and_build()
    reload_and_build()
except BaseException as error:
    assert type(error).__name__ in ("HostError", "ConditionError", "SystemExit"), repr(error)
    print("STOPPED", type(error).__name__)
""",
        "on",
    )


def test_methods_replaced_in_place_as_autoreload_does_keep_film_or_stop(repo: Path, tmp_path: Path) -> None:
    notebook(
        repo,
        tmp_path,
        """
import importlib, types
cell(IMPORT + BUILD + STEP)
name = "src.archs.components.diffusion_unet"
old = sys.modules[name].MedSegDiffUNet
new = importlib.reload(sys.modules[name]).MedSegDiffUNet
# IPython's autoreload: the old class takes the functions of the new one.
for key, value in vars(new).items():
    if isinstance(value, types.FunctionType):
        setattr(old, key, value)
unet_error = attempt(BUILD)
assert unet_error or films(space["model"]), "the reloaded host built a plain baseline"
""",
        "on",
    )


@pytest.mark.skipif(find_spec("med_seg_diff_pytorch") is None, reason="med-seg-diff-pytorch is not installed (pip install --no-deps)")
@pytest.mark.parametrize("mode", ["on", "off"])
def test_two_hosts_in_one_process_are_each_conditioned_on_their_own_images(repo: Path, tmp_path: Path, mode: str) -> None:
    notebook(
        repo,
        tmp_path,
        """
import numpy as np
from med_seg_diff_pytorch import MedSegDiff, Unet
from vlmfilm_plugin import _bootstrap, attachment, conditioning
from vlmfilm_plugin.encoders.descriptor import DescriptorEncoder
from vlmfilm_plugin.images import from_tensor
mode = os.environ["VLM_FILM_MODE"]
cell(IMPORT + BUILD + STEP)
model = space["model"]
torch.manual_seed(1)
other = Unet(dim=16, image_size=16, mask_channels=1, input_img_channels=3, dim_mults=(1, 2), full_self_attn=(False, False),
             conditioning_kwargs=dict(dim_head=8, heads=2, depth=1, patch_size=8))
diffusion = MedSegDiff(other, timesteps=4)
ours, theirs = model.unet.base_unet.vlm_film, other.vlm_film
assert ours.family != theirs.family and {ours.mode, theirs.mode} == {mode}
for film in (ours, theirs):
    for head in film.heads:
        torch.nn.init.normal_(head.mlp[2].weight, std=0.5)

used = []
modulate = attachment.modulate
attachment.modulate = lambda x, gamma, beta: (used.append(gamma.detach().clone()), modulate(x, gamma, beta))[1]
def expected(film, image, value_range):
    feature = DescriptorEncoder().encode([from_tensor(row, value_range) for row in image]).half().float()
    with torch.no_grad():
        return [head(film.project(feature))[0] for head in film.heads]

a, b = space["batch"](2), torch.rand(3, 3, 16, 16)
mask = (torch.rand(3, 1, 16, 16) > 0.5).float()
for turn in range(2):
    # Interleaved: both forwards, then both backwards.
    model.zero_grad(); diffusion.zero_grad(); used.clear()
    first = model.training_step(a, turn)
    second = diffusion(mask, b)
    (first + second).backward()
    if mode == "off":
        assert not used and all(p.grad is None for film in (ours, theirs) for p in film.parameters())
        continue
    want = expected(ours, a["image"], (-1, 1)) + expected(theirs, b, (0, 1))
    assert len(used) == len(want) == 4
    for found, wanted in zip(used, want):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert all(float(p.grad.norm()) > 0 for film in (ours, theirs) for p in film.parameters())
assert not conditioning._stacks.frames and not conditioning._stacks.conditions
fates = _bootstrap.current().seen
assert sum(fate.startswith("patched as") for fate in fates.values()) >= 3, fates
""",
        mode,
    )
