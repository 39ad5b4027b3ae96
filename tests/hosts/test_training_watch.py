"""A process that was asked for FiLM and trains, or evaluates, without it: it stops before the first update, or says so at its end."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import forked_code, run_code, succeed

# A repo that nobody knows: the network, its loop, and what it would print had it trained.
TRAIN = """
import torch
from torch import nn
class MyUNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)
    def forward(self, x):
        return self.up(self.down(x).relu())
unet = MyUNet()
OPTIMIZER
for _ in range(2):
    optimizer.zero_grad()
    unet(torch.rand(2, 1, 8, 8)).square().mean().backward()
    STEP
print('TRAINED')
"""
SETTINGS = {"VLM_FILM_ENCODER": "descriptor"}
SCALED = "scaler.scale(torch.zeros(1)); scaler.unscale_(optimizer); scaler.step(optimizer)"


def code(optimizer: str = "optimizer = torch.optim.AdamW(unet.parameters())", step: str = "optimizer.step()") -> str:
    return TRAIN.replace("OPTIMIZER", optimizer).replace("STEP", step)


@pytest.mark.parametrize("mode", ["on", "off", "shuffle", "onn"])
def test_an_unknown_repo_stops_at_its_first_update(tmp_path: Path, mode: str) -> None:
    run = run_code if mode == "on" else forked_code
    result = run(code(), cwd=tmp_path, VLM_FILM_MODE=mode, **SETTINGS)
    assert result.returncode == 1 and "TRAINED" not in result.stdout
    if mode == "onn":
        assert "not a mode" in result.stderr
        return
    assert f"VLM_FILM_MODE={mode} asks for FiLM" in result.stderr and "AdamW over 4 parameters" in result.stderr
    assert "__main__.MyUNet" in result.stderr and "fix:" in result.stderr and "VLM_FILM_STRICT=0" in result.stderr
    # It has said all there is to say.
    assert "NOT active" not in result.stderr


@pytest.mark.parametrize(
    ("optimizer", "step"),
    [
        ("optimizer = torch.optim.SGD(unet.parameters(), lr=.1, foreach=True)", "optimizer.step()"),
        ("optimizer = torch.optim.Adam(unet.parameters(), fused=True)", "optimizer.step()"),
        (
            "class Mine(torch.optim.Optimizer):\n    def __init__(self, p): super().__init__(p, {})\n    def step(self): pass\n"
            "optimizer = Mine(unet.parameters())",
            "optimizer.step()",
        ),
        ("optimizer = torch.optim.SGD(unet.parameters(), lr=.1)\nstep = torch.compile(lambda: optimizer.step(), backend='eager')", "step()"),
        ("optimizer = torch.optim.SGD(unet.parameters(), lr=.1); scaler = torch.amp.GradScaler('cpu')", SCALED),
        (
            "from accelerate import Accelerator; unet, optimizer = Accelerator(cpu=True).prepare(unet, torch.optim.SGD(unet.parameters(), lr=.1))",
            None,
        ),
    ],
)
def test_whatever_optimizer_it_has(tmp_path: Path, optimizer: str, step: str | None) -> None:
    result = forked_code(code(optimizer, step or "optimizer.step()"), cwd=tmp_path, VLM_FILM_MODE="on", **SETTINGS)
    assert result.returncode == 1 and "TRAINED" not in result.stdout and "about to train a plain baseline" in result.stderr


def test_a_loop_that_catches_exceptions_does_not_go_on(tmp_path: Path) -> None:
    step = "try:\n        optimizer.step()\n    except Exception:\n        print('batch skipped')"
    result = forked_code(code(step=step), cwd=tmp_path, VLM_FILM_MODE="on", **SETTINGS)
    assert result.returncode == 1 and "TRAINED" not in result.stdout and "skipped" not in result.stdout


def test_an_interactive_session_is_refused_again(tmp_path: Path) -> None:
    step = "\n    try:\n        optimizer.step()\n    except SystemExit:\n        print('REFUSED')"
    assert "REFUSED\nREFUSED\nTRAINED" in forked_code(code(step=step), cwd=tmp_path, VLM_FILM_MODE="on", **SETTINGS).stdout


def test_a_thread_cannot_swallow_it(tmp_path: Path) -> None:
    script = code().replace("for _ in range(2):", "import threading\ndef loop():").replace("print('TRAINED')", "    print('TRAINED')\n")
    result = forked_code(script + "t = threading.Thread(target=loop); t.start(); t.join()", cwd=tmp_path, VLM_FILM_MODE="on", **SETTINGS)
    assert "TRAINED" not in result.stdout and "about to train a plain baseline" in result.stderr


def test_strict_0_makes_it_one_warning(tmp_path: Path) -> None:
    result = forked_code(code(), cwd=tmp_path, VLM_FILM_MODE="on", VLM_FILM_STRICT="0", **SETTINGS)
    assert succeed(result) == "TRAINED\n" and result.stderr.count("about to train a plain baseline") == 1
    bad = forked_code("import torch; print('fine')", cwd=tmp_path, VLM_FILM_MODE="on", VLM_FILM_STRICT="no")
    assert "cannot use VLM_FILM_STRICT" in bad.stderr


def test_without_the_variable_nothing_watches(tmp_path: Path) -> None:
    result = forked_code(code() + "\nimport sys; print(any(m.startswith('vlmfilm_plugin') for m in sys.modules))", cwd=tmp_path)
    assert succeed(result) == "TRAINED\nFalse\n" and not result.stderr


def test_film_attached_by_hand_trains(tmp_path: Path) -> None:
    by_hand = "import vlmfilm_plugin\nhandle = vlmfilm_plugin.attach(unet, feature_dim=4, targets='down')\n"
    script = code(by_hand + "optimizer = torch.optim.SGD(unet.parameters(), lr=.1)").replace(
        "    unet(torch", "    with handle.condition(features=torch.rand(2, 4)): unet(torch"
    )
    script = script.replace(".square().mean().backward()", ".square().mean().backward()")
    assert "TRAINED" in succeed(forked_code(script, cwd=tmp_path, VLM_FILM_MODE="on", **SETTINGS))


def test_plain_tensors_are_no_model(tmp_path: Path) -> None:
    script = "import torch\nx = torch.rand(3, requires_grad=True)\no = torch.optim.SGD([x], lr=.1)\nx.sum().backward()\no.step()\nprint('fine')"
    result = forked_code(script, cwd=tmp_path, VLM_FILM_MODE="on", **SETTINGS)
    assert succeed(result) == "fine\n" and not result.stderr


def adapter(folder: Path, module: str, text: str) -> None:
    """Install a host adapter for `module` beside the repo."""
    info = folder / "their_adapter-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-adapter\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[vlmfilm.hosts]\n{module} = their_adapter\n")
    (folder / "their_adapter.py").write_text(text)


HOST_MODULE = code().split("unet = MyUNet()")[0]
RUN = "from mine.unets import MyUNet\nimport torch\n" + code()[code().index("unet = MyUNet()") :]


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").touch()
    (tmp_path / "mine" / "unets.py").write_text(HOST_MODULE)
    return tmp_path


def test_a_typo_in_an_adapters_entry_point_is_named(repo: Path) -> None:
    adapter(repo, "mine.unet", "")
    result = forked_code(RUN, cwd=repo, VLM_FILM_MODE="on", **SETTINGS, PYTHONPATH=str(repo))
    assert result.returncode == 1 and "TRAINED" not in result.stdout
    assert "their-adapter knows" in result.stderr and "mine.unet (did you mean mine.unets, which was imported?)" in result.stderr


@pytest.mark.parametrize("fault", ["import no_such_module_of_theirs", "1 / 0", "raise SystemExit(0)", "pass"])
def test_an_adapter_that_fails_stops_its_host_at_the_import(repo: Path, fault: str) -> None:
    adapter(repo, "mine.unets", fault)
    result = forked_code(RUN, cwd=repo, VLM_FILM_MODE="on", **SETTINGS, PYTHONPATH=str(repo))
    assert result.returncode == 1 and "TRAINED" not in result.stdout
    assert "the host adapter of mine.unets cannot be loaded" in result.stderr and "mine.unets = their_adapter" in result.stderr
    # Its failure is no affair of a process that imports something else.
    assert succeed(forked_code("import torch; print('fine')", cwd=repo, VLM_FILM_MODE="on", PYTHONPATH=str(repo))) == "fine\n"


def test_an_import_that_was_refused_is_refused_again(repo: Path) -> None:
    adapter(repo, "mine.unets", "1 / 0")
    cell = "try:\n    from mine.unets import MyUNet\n    print('IMPORTED')\nexcept SystemExit as e:\n"
    cell += "    print('REFUSED', 'cannot be loaded' in str(e))\n"
    script = cell * 3 + "import mine\ntry:\n    import mine.unets\n    print('IMPORTED')\nexcept SystemExit:\n    print('REFUSED')"
    result = forked_code(script, cwd=repo, VLM_FILM_MODE="on", **SETTINGS, PYTHONPATH=str(repo))
    assert result.stdout == "REFUSED True\n" * 3 + "REFUSED\n"


def test_also_where_the_hosts_own_module_imports_torch_first(repo: Path) -> None:
    adapter(repo, "mine.unets", "1 / 0")
    cell = "try:\n    import mine.unets\n    print('IMPORTED')\nexcept SystemExit as e:\n    print('REFUSED')\n"
    result = run_code(cell * 3, cwd=repo, VLM_FILM_MODE="on", **SETTINGS, PYTHONPATH=str(repo))
    assert result.stdout == "REFUSED\n" * 3


EVALUATE = code().split("OPTIMIZER")[0].split("optimizer = ")[0] + "with torch.no_grad():\n    CALL\nprint('EVALUATED')\n"


@pytest.mark.parametrize("call", ["unet(torch.rand(1, 1, 8, 8))", "torch.compile(unet, backend='eager')(torch.rand(1, 1, 8, 8))"])
def test_an_evaluation_without_film_says_so_at_its_end(tmp_path: Path, call: str) -> None:
    result = forked_code(EVALUATE.replace("CALL", call), cwd=tmp_path, VLM_FILM_MODE="on", **SETTINGS)
    assert succeed(result) == "EVALUATED\n"
    assert "VLM-FiLM was NOT active" in result.stderr and "__main__.MyUNet ran" in result.stderr


SILENT = """
import torch, transformers
from torch import nn
config = transformers.Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=28, patch_size=14)
class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = transformers.Dinov2Model(config)
    def forward(self, x):
        return self.encoder(x).last_hidden_state
Wrapped()(torch.rand(1, 3, 28, 28))
nn.Linear(2, 2)(torch.rand(1, 2))
print('fine')
"""


def test_a_process_that_runs_encoders_alone_is_silent(tmp_path: Path) -> None:
    result = forked_code(SILENT, cwd=tmp_path, VLM_FILM_MODE="on", **SETTINGS)
    assert succeed(result) == "fine\n" and "vlmfilm" not in result.stderr


LOADER = """
import torch
from torch.utils.data import DataLoader, Dataset
from mine.unets import MyUNet
class Data(Dataset):
    def __len__(self): return 4
    def __getitem__(self, i):
        with torch.no_grad(): return MyUNet()(torch.rand(1, 1, 8, 8))[0]
if __name__ == '__main__':
    for _ in DataLoader(Data(), num_workers=1, multiprocessing_context='spawn'): pass
    print('fine')
"""


def test_a_data_loaders_worker_is_silent(repo: Path) -> None:
    (repo / "load.py").write_text(LOADER)
    from processes import python

    result = python("load.py", cwd=repo, VLM_FILM_MODE="on", **SETTINGS)
    assert succeed(result) == "fine\n" and "vlmfilm" not in result.stderr
