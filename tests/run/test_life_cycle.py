"""What happens over a process's life: attached again and again, two hosts at once, modules reloaded, notebook cells run twice."""

from __future__ import annotations

import contextlib
import copy
import shutil
from importlib.util import find_spec

import pytest
import torch
from processes import DEMO_HOST, SCENARIO, forked, verdicts_of
from small_unet import SmallUNet, inputs, randomise
from torch import Tensor, nn

from vlmfilm_plugin.errors import ConditionError, HostError, VlmFilmError
from vlmfilm_plugin.forward import context as conditioning
from vlmfilm_plugin.forward.attach import attach
from vlmfilm_plugin.forward.handle import FilmHandle

SETTINGS = {"VLM_FILM_ENCODER": "descriptor", "VLM_FILM_COND_DIM": "16", "VLM_FILM_TEXT_MLP_HIDDEN_DIM": "16", "VLM_FILM_FEATURE_TRANSFORM": "none"}
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
    assert not conditioning.stacks.contexts and not conditioning.stacks.conditions


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
    assert hooks_of(unet) == {} and not conditioning.stacks.contexts and not conditioning.stacks.conditions


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
    with contextlib.suppress(VlmFilmError):
        handle.remove()
    handle.remove()
    assert hooks_of(unet) == {}
    unet(*inputs(3))


# The rest runs in forks of one process that has imported torch and Lightning, but no host; cells are `exec` in one namespace.

NOTEBOOK = """
import gc, importlib
import lightning.pytorch, torch
import vlmfilm_plugin
torch.set_num_threads(1)
space = {"__name__": "__main__", "torch": torch, "os": os, "vlmfilm_plugin": vlmfilm_plugin}

def cell(text):
    exec(compile(text, "<cell>", "exec"), space)

def attempt(text):
    "Run a cell; return the error's name, or None."
    try:
        cell(text)
    except BaseException as error:
        print("said", type(error).__name__, error)
        return type(error).__name__

def activate(mode):
    return f'os.environ["VLM_FILM_MODE"] = {mode!r}; vlmfilm_plugin.activate()'

IMPORT = '''
from src.archs.flow_model import FlowModel
from src.archs.components.diffusion_unet import MedSegDiffUNet
'''
BUILD = '''
torch.manual_seed(0)
model = FlowModel(arch_name="medsegdiff_flow", image_size=16, timesteps=2, model_channels=8, channel_mult=[1, 2], attn_resolutions=[])
'''
STEP = '''
def batch(rows=2):
    label = (torch.rand(rows, 1, 16, 16) > 0.5).float()
    return {"image": torch.rand(rows, 1, 16, 16) * 2 - 1, "label": label, "geometry": label * 2 - 1}
model.training_step(batch(), 0).backward()
'''
UNET = "unet = MedSegDiffUNet(8, 16, dim_mult=(1, 2), full_self_attn=(False, False))"

def films(name="model"):
    return [path for path, module in space[name].named_modules() if type(module).__name__ == "FilmModule"]

def is_trained():
    "Tell whether FiLM took part in the last backward."
    film = space["model"].unet.base_unet.vlm_film
    return all(head.mlp[2].weight.grad is not None and float(head.mlp[2].weight.grad.norm()) > 0 for head in film.heads)

def hooks_a_block(unet):
    return [len(stage[1]._forward_hooks) for stage in unet.ups]

"""

SCENARIOS = """
@scenario
def same_cell_again():
    for run in range(3):
        cell(activate("on") + "; assert vlmfilm_plugin.activate() is vlmfilm_plugin.activate()")
        cell(IMPORT + BUILD + STEP)
        unet = space["model"].unet.base_unet
        assert films() == ["unet.base_unet.vlm_film"] and is_trained() and hooks_a_block(unet) == [1, 1]
        assert float(unet.vlm_film.heads[0].mlp[2].weight.norm()) == 0

@scenario
def classes_of_a_cell():
    cell(activate("on") + IMPORT)
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
        assert type(space["model"]).__name__ == "Mine" and films() == ["unet.base_unet.vlm_film"] and is_trained()
        cell(UNET.replace("MedSegDiffUNet(", "Wider("))
        assert films("unet") == ["vlm_film"] and hooks_a_block(space["unet"]) == [1, 1]

@scenario
def imported_before_activation():
    cell(IMPORT)
    cell(activate("on") + "; vlmfilm_plugin.activate()")
    cell(BUILD + STEP)
    assert films() == ["unet.base_unet.vlm_film"] and is_trained()

@scenario
def refused_activation_again():
    cell(IMPORT + BUILD)
    assert attempt(activate("on")) == "HostError"
    if attempt(activate("on")) is None:
        # The second run of the cell looks like a success: then later models must not be plain.
        failed = attempt(IMPORT + BUILD + STEP)
        assert failed or films(), "the cell succeeded, and the model built after it is a plain baseline"

@scenario
def refused_activation_after_the_model_is_gone():
    cell(IMPORT + BUILD)
    assert attempt(activate("on")) == "HostError"
    del space["model"]
    gc.collect()
    failed = attempt(activate("on")) or attempt(BUILD + STEP)
    assert failed or (films() and is_trained()), "the cell succeeded, and the model built after it is a plain baseline"

@scenario
def another_mode_later():
    cell(activate("on") + IMPORT + BUILD)
    wrong = {}
    for later in ("off", "shuffle", "nonsense"):
        failed = attempt(activate(later)) or attempt(IMPORT + BUILD)
        found = space["model"].unet.base_unet.vlm_film.mode
        if not failed and found != later:
            wrong[later] = found
        cell(activate("on"))
    assert not wrong, f"mode set in a later cell -> mode of a model built after it, and nothing was said: {wrong}"

def reload(*names):
    cell(activate("on"))
    cell(IMPORT + BUILD + STEP + UNET)
    for turn in range(2):
        try:
            for name in names:
                importlib.reload(sys.modules["src.archs." + name])
            cell(IMPORT + UNET)
            assert films("unet"), "the reloaded UNet is plain"
            assert hooks_a_block(space["unet"]) == [1, 1], "FiLM is there twice"
            cell(BUILD)
            assert films(), "the reloaded host built a plain baseline"
            cell(STEP)
            assert is_trained(), "FiLM took no part"
        except (Exception, SystemExit) as error:
            if type(error).__name__ not in ("HostError", "ConditionError", "SystemExit"):
                raise
            print("stopped", type(error).__name__, error)

@scenario
def reload_unet(): reload("components.diffusion_unet")

@scenario
def reload_model(): reload("flow_model")

@scenario
def reload_all(): reload("components.diffusion_unet", "components.medsegdiff_flow", "flow_model")
"""

TWO_HOSTS = """
from vlmfilm_plugin.forward import context as conditioning
from vlmfilm_plugin.encoders.descriptor import DescriptorEncoder
from vlmfilm_plugin.features.images import from_tensor

def two_hosts(mode):
    cell(activate(mode))
    cell(IMPORT + BUILD + STEP)
    from med_seg_diff_pytorch import MedSegDiff, Unet
    other = Unet(dim=16, image_size=16, mask_channels=1, input_img_channels=3, dim_mults=(1, 2), full_self_attn=(False, False),
                 conditioning_kwargs=dict(dim_head=8, heads=2, depth=1, patch_size=8))
    model, diffusion = space["model"], MedSegDiff(other, timesteps=4)
    ours, theirs = model.unet.base_unet.vlm_film, other.vlm_film
    assert ours.film_id != theirs.film_id and {ours.mode, theirs.mode} == {mode}
    used = {}
    for film, unet in ((ours, model.unet.base_unet), (theirs, other)):
        for i, head in enumerate(film.heads):
            torch.nn.init.normal_(head.mlp[2].weight, std=0.5)
            # What a block is modulated with, read off the tensors around FiLM's hook: y = gamma x + beta.
            block = unet.ups[i][1]
            block.register_forward_hook(lambda m, a, y, key=(film.film_id, i): used.__setitem__((key, "x"), y.detach().clone()), prepend=True)
            block.register_forward_hook(lambda m, a, y, key=(film.film_id, i): used.__setitem__((key, "y"), y.detach().clone()))
    a, b = space["batch"](2), torch.rand(3, 3, 16, 16)
    mask = (torch.rand(3, 1, 16, 16) > 0.5).float()
    for turn in range(2):
        # Interleaved: both forwards, then one backward.
        model.zero_grad(); diffusion.zero_grad(); used.clear()
        (model.training_step(a, turn) + diffusion(mask, b)).backward()
        for film, image, value_range in ((ours, a["image"], (-1, 1)), (theirs, b, (0, 1))):
            feature = DescriptorEncoder().encode([from_tensor(row, value_range) for row in image]).half().float()
            for i, head in enumerate(film.heads):
                x, y = (used[((film.film_id, i), which)] for which in "xy")
                if mode == "off":
                    assert torch.equal(x, y)
                else:
                    with torch.no_grad():
                        gamma, beta = head(film.project(feature))
                    assert not torch.allclose(x, y, atol=1e-3)
                    torch.testing.assert_close(y, gamma * x + beta, rtol=1e-4, atol=1e-4)
            assert all((p.grad is None) if mode == "off" else float(p.grad.norm()) > 0 for p in film.parameters())
    assert not conditioning.stacks.contexts and not conditioning.stacks.conditions

@scenario
def two_hosts_on(): two_hosts("on")

@scenario
def two_hosts_off(): two_hosts("off")
"""
HAS_OTHER_HOST = find_spec("med_seg_diff_pytorch") is not None


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return how each scenario ended, in a copy of the demo's host."""
    root = tmp_path_factory.mktemp("life")
    shutil.copytree(DEMO_HOST, root / "host", ignore=shutil.ignore_patterns("__pycache__"))
    script = root / "notebook.py"
    script.write_text(SCENARIO + NOTEBOOK + SCENARIOS + (TWO_HOSTS if HAS_OTHER_HOST else ""))
    result = forked(script, cwd=root / "host", PYTHONPATH=str(root / "host"), VLM_FILM_CACHE_DIR=str(root / "cache"), **SETTINGS)
    return verdicts_of(result)


def test_one_cell_run_again_and_again_gives_a_fresh_model_with_film_once(verdicts: dict[str, str]) -> None:
    assert verdicts["same_cell_again"] == "ok"


def test_classes_defined_in_a_cell_carry_film_each_time_the_cell_runs(verdicts: dict[str, str]) -> None:
    assert verdicts["classes_of_a_cell"] == "ok"


def test_a_host_imported_before_activation_carries_film_in_models_built_after(verdicts: dict[str, str]) -> None:
    assert verdicts["imported_before_activation"] == "ok"


@pytest.mark.parametrize("name", ["refused_activation_again", "refused_activation_after_the_model_is_gone"])
def test_an_activation_that_was_refused_does_not_look_like_a_success_when_its_cell_runs_again(verdicts: dict[str, str], name: str) -> None:
    assert verdicts[name] == "ok"


def test_another_mode_in_a_later_cell_takes_effect_or_is_refused(verdicts: dict[str, str]) -> None:
    assert verdicts["another_mode_later"] == "ok"


@pytest.mark.parametrize("name", ["reload_unet", "reload_model", "reload_all"])
def test_a_reloaded_host_carries_film_or_stops(verdicts: dict[str, str], name: str) -> None:
    assert verdicts[name] == "ok"


@pytest.mark.skipif(not HAS_OTHER_HOST, reason="med-seg-diff-pytorch is not installed (pip install --no-deps)")
@pytest.mark.parametrize("mode", ["on", "off"])
def test_two_hosts_in_one_process_are_each_conditioned_on_their_own_images(verdicts: dict[str, str], mode: str) -> None:
    assert verdicts[f"two_hosts_{mode}"] == "ok"
