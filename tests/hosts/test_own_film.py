"""Hosts that apply FiLM themselves are left to their owners: no attachment, no change, one line; and never two FiLMs at once."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from processes import run_code
from torch import nn
from vlmfilm_plugin.hooks import sofl_seg

from vlmfilm_plugin.errors import HostError
from vlmfilm_plugin.film.module import film_modules
from vlmfilm_plugin.forward import context as conditioning
from vlmfilm_plugin.host_spec import HostSpec, Model, Steps, UNet
from vlmfilm_plugin.hosts.patches import patch_host
from vlmfilm_plugin.run.runtime import Runtime

SOURCE = '''
import torch
from torch import nn
from small_unet import Block

calls = []

class Net(nn.Module):
    """Takes a condition of its own, as later commits of the main host do, and ignores None."""

    def __init__(self, width=4):
        super().__init__()
        self.stem = nn.Conv2d(2, width, 3, padding=1)
        self.ups = nn.ModuleList(nn.ModuleList([Block(width, width), Block(width, width)]) for _ in range(2))
        self.final = nn.Conv2d(width, 1, 1)

    def forward(self, x, time, cond, own=None):
        h = self.stem(torch.cat([x, cond], 1))
        for block1, block2 in self.ups:
            h = block2(block1(h, time), time)
            h = h if own is None else h * own
        return self.final(h)

class NetFiLM(Net):
    def forward(self, x, time, cond, own=None):
        return super().forward(x, time, cond, own=2.0 if own is None else own)

class Model(nn.Module):
    global_step = 0

    def __init__(self, use_own=False, cls=Net):
        super().__init__()
        self.use_own = use_own
        self.own_weight = nn.Parameter(torch.ones(1)) if use_own else None
        self.net = cls()

    def training_step(self, batch, batch_idx=0):
        image = batch["image"]
        arguments = (torch.randn_like(image), torch.rand(len(image)), image)
        out = self.net(*arguments, own=self.own_weight) if self.use_own else self.net(*arguments)
        return out.square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_save_checkpoint(self, checkpoint):
        calls.append("save")

    def on_load_checkpoint(self, checkpoint):
        calls.append("load")

    def on_validation_end(self):
        calls.append("validated")

    def on_fit_end(self):
        calls.append("end")

    @classmethod
    def load_from_checkpoint(cls, path, **kwargs):
        return cls(**kwargs)
'''


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("VLM_FILM_MODE", raising=False)
    yield
    assert (conditioning.stacks.contexts, conditioning.stacks.conditions) == ([], [])
    sys.modules.pop("own_film_host", None)


def make(patch: bool, tmp_path: Path, mode: str = "on", **settings: str) -> tuple[Any, Runtime, Callable[[], None]]:
    host: Any = ModuleType("own_film_host")
    sys.modules["own_film_host"] = host
    exec(compile(SOURCE, "own_film_host", "exec"), host.__dict__)
    # A setting that the plugin does not know: nothing of it may be read for a model that is left to its owner.
    environ = {"VLM_FILM_ENCODER": "descriptor", "VLM_FILM_CACHE_DIR": "cache", "VLM_FILM_COND_DIM": "4", **settings}
    run = Runtime(mode, environ, str(tmp_path))
    spec = HostSpec(
        name="with FiLM of its own",
        unets=[
            UNet(
                cls=host.Net,
                targets={"post_block2": "ups.*.1"},
                own_condition="own",
                own_film=lambda unet: "build Net" if type(unet) is host.NetFiLM else None,
            )
        ],
        models=[Model(cls=host.Model, own_film=lambda arguments: "take `use_own` out" if arguments["use_own"] else None)],
        steps=[Steps(cls=host.Model, phases={"training_step": "train"}, value_range=(0.0, 1.0))],
    )
    return host, run, patch_host(host, spec, run) if patch else lambda: None


def a_run(host: Any, model: Any) -> tuple[list[float], dict[str, torch.Tensor], dict[str, Any]]:
    torch.manual_seed(1)
    optimizer, losses = model.configure_optimizers(), []
    for seed in range(3):
        loss = model.training_step({"image": torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(seed))}, seed)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    checkpoint: dict[str, Any] = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)
    model.on_load_checkpoint(checkpoint)
    model.on_validation_end()
    model.on_fit_end()
    return losses, model.state_dict(), checkpoint


@pytest.mark.parametrize("mode", ["on", "off", "shuffle"])
def test_a_model_with_film_of_its_own_runs_as_without_the_plugin(mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = []
    for patch in (False, True):
        host, run, _ = make(patch, tmp_path, mode, VLM_FILM_NO_SUCH_SETTING="1", VLM_FILM_FREEZE_HOST="true")
        torch.manual_seed(0)
        model = host.Model(use_own=True)
        results.append((*a_run(host, model), list(model.net._forward_hooks), host.calls))
        said = capsys.readouterr().out
        assert said.count("the host's own FiLM is active, not the plugin's: Model ") == int(patch)
        assert ("take `use_own` out" in said) == patch
    plain, left = results
    assert plain[0] == left[0] and plain[3:] == left[3:]
    assert list(plain[1]) == list(left[1]) and all(torch.equal(value, left[1][name]) for name, value in plain[1].items())
    assert plain[2].keys() == left[2].keys()
    assert run.attached == 0 and run.left and not film_modules(model)


def test_the_same_class_without_film_of_its_own_is_conditioned_by_the_plugin(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Six images: too few for the mean of a host that lists none.
    host, run, _ = make(True, tmp_path, VLM_FILM_FEATURE_TRANSFORM="none")
    model = host.Model()
    a_run(host, model)
    assert run.attached == 1 and run.left == 0
    assert "own FiLM" not in capsys.readouterr().out
    assert all(head.mlp[2].weight.abs().sum() > 0 for head in model.net.vlm_film.heads)


def test_a_class_with_film_in_its_forward_is_left_alone_where_no_model_says_otherwise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    host, run, _ = make(True, tmp_path)
    unet = host.NetFiLM()
    assert not film_modules(unet) and (run.attached, run.left) == (0, 1)
    assert capsys.readouterr().out.count("NetFiLM applies FiLM itself") == 1
    x = torch.rand(1, 1, 8, 8)
    unet(x, torch.zeros(1), x)
    # Inside a model that says it applies none the plugin's acts: a run that was asked to be FiLM is no baseline.
    assert film_modules(host.Model(cls=host.NetFiLM))


def test_two_films_at_once_are_refused(tmp_path: Path) -> None:
    host, _, _ = make(True, tmp_path)
    model = host.Model()
    model.use_own, model.own_weight = True, nn.Parameter(torch.ones(1))
    with pytest.raises(HostError, match="two FiLMs would act in this Net"):
        a_run(host, model)


def test_copies_of_a_model_that_is_left_alone_are_left_alone(tmp_path: Path) -> None:
    host, _, _ = make(True, tmp_path, VLM_FILM_NO_SUCH_SETTING="1")
    model = host.Model(use_own=True)
    a_run(host, copy.deepcopy(model))
    a_run(host, pickle.loads(pickle.dumps(model)))


def test_a_subclass_that_switches_the_hosts_film_on_is_left_alone_and_a_failing_one_leaves_no_trace(tmp_path: Path) -> None:
    host, run, _ = make(True, tmp_path)

    class Mine(host.Model):  # type: ignore[misc]
        def __init__(self, fail: bool = False) -> None:
            super().__init__(use_own=True)
            if fail:
                raise KeyError

    with pytest.raises(KeyError):
        Mine(fail=True)
    assert film_modules(host.Model()) and not film_modules(Mine())
    assert run.left >= 1


def test_the_undo_of_a_patched_host_gives_it_back(tmp_path: Path) -> None:
    host, run, undo = make(True, tmp_path)
    plain, _, _ = make(False, tmp_path)

    class Later(host.Net):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()

    undo()
    undo()
    for name in ("Net", "Model"):
        ours = {key for key in vars(getattr(host, name)) if key != "__vlmfilm_patched__"}
        assert ours == set(vars(getattr(plain, name))), name
        assert not any("FunctionWrapper" in type(value).__name__ for value in vars(getattr(host, name)).values())
    assert not film_modules(Later()) and not film_modules(host.Model()) and run.attached == 0


# The adapter of the main host


class FlowModel:
    def __init__(self, arch_name: str, use_vlm_film: bool = False) -> None: ...

    def training_step(self, batch: Any) -> None: ...

    load_from_checkpoint = None


def test_the_main_hosts_models_say_by_their_arguments_whether_film_is_theirs() -> None:
    for name in ("src.archs.flow_model", "src.archs.flow_model_vlm_film"):
        module = ModuleType(name)
        cls: Any = type("AnyName", (FlowModel,), {"__module__": name})
        module.AnyName = cls  # type: ignore[attr-defined]
        spec = sofl_seg.vlmfilm_host(module)
        assert spec is not None
        (model,) = spec.models
        assert isinstance(model, Model) and model.cls is cls and model.own_film is not None
        assert model.own_film({"arch_name": "x", "use_vlm_film": True}) and model.own_film({"arch_name": "x"}) is None


def test_a_process_in_which_the_hosts_own_film_acted_does_not_say_not_active(tmp_path: Path) -> None:
    package = tmp_path / "src" / "archs"
    (package / "components").mkdir(parents=True)
    for folder in (tmp_path / "src", package, package / "components"):
        (folder / "__init__.py").touch()
    (package / "components" / "diffusion_unet.py").write_text(
        "from torch import nn\n"
        "class ResnetBlock(nn.Module):\n    def forward(self, x, t): return x\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, dim=4, image_size=8, mask_channels=1, input_img_channels=1, dim_mult=(1,)):\n        super().__init__()\n"
        "    def forward(self, x, time, cond, vlm_cond=None): return x\n"
    )
    (package / "flow_model.py").write_text(
        "from torch import nn\nfrom src.archs.components.diffusion_unet import Net\n"
        "class FlowModel(nn.Module):\n"
        "    def __init__(self, arch_name, use_vlm_film=False):\n        super().__init__()\n        self.unet = Net()\n"
        "    @classmethod\n    def load_from_checkpoint(cls): ...\n"
    )
    done = run_code("from src.archs.flow_model import FlowModel\nFlowModel('a', use_vlm_film=True)", cwd=tmp_path, VLM_FILM_MODE="on")
    assert done.returncode == 0 and done.stderr == "" and done.stdout.count("own FiLM is active") == 1
    refused = run_code("from src.archs.flow_model import FlowModel\nFlowModel('a')", cwd=tmp_path, VLM_FILM_MODE="on")
    assert refused.returncode != 0
