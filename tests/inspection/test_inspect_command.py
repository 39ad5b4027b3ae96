"""`vlmfilm inspect` on a repo that nobody described: its table, and the host adapter it writes, which must run at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import environment
from torch import nn

import vlmfilm_plugin

NET = """
import torch
from torch import nn


class Pair(nn.Module):
    def __init__(self, before, after):
        super().__init__()
        self.a, self.b = nn.Conv2d(before, after, 3, padding=1), nn.Conv2d(after, after, 3, padding=1)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


class Net(nn.Module):
    # The decoder is numbered from full resolution: names would give the wrong order.
    def __init__(self):
        super().__init__()
        self.down1, self.down2, self.middle = Pair(1, 8), Pair(8, 16), Pair(16, 16)
        self.up1, self.up2, self.out = Pair(16, 8), Pair(32, 8), nn.Conv2d(8, 1, 1)

    def forward(self, x):
        half, twice = nn.functional.avg_pool2d, lambda t: nn.functional.interpolate(t, scale_factor=2)
        a = self.down1(x)
        b = self.down2(half(a, 2))
        c = self.up2(torch.cat([twice(self.middle(half(b, 2))), b], 1))
        return self.out(self.up1(torch.cat([twice(c), a], 1)))
"""

SCRIPT = """
from pathlib import Path

import numpy as np
import torch
from net import Net
from PIL import Image
from torch.utils.data import DataLoader, Dataset


class Pictures(Dataset):
    files = sorted(Path("pictures").glob("*.png"))

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        return torch.from_numpy(np.asarray(Image.open(self.files[index]), dtype="float32"))[None] / 255


torch.manual_seed(0)
net = Net()
optimizer = torch.optim.SGD(net.parameters(), 1e-2)
for x in DataLoader(Pictures(), batch_size=4, shuffle=True):
    optimizer.zero_grad()
    ((net(x) - x) ** 2).mean().backward()
    optimizer.step()
torch.save(net.state_dict(), "last.pt")
"""


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """A repo with a net, a script and twelve pictures."""
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "pictures").mkdir()
    draw = np.random.default_rng(0)
    for number in range(12):
        Image.fromarray(draw.integers(0, 256, (32, 32), dtype="uint8")).save(tmp_path / "pictures" / f"{number}.png")
    return tmp_path


def _run(repo: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=repo, capture_output=True, text=True, env=environment(**variables), check=False)


def test_the_adapter_of_an_unknown_repo_trains_at_once_and_off_is_plain_to_the_bit(repo: Path) -> None:
    looked = _run(repo, "-m", "vlmfilm_plugin", "inspect", "-o", "host.py", "--", sys.executable, "train.py")
    assert looked.returncode == 0, looked.stderr
    assert not (repo / "last.pt").exists()  # it stopped at the first forward
    rows = [line.split() for line in looked.stdout.splitlines() if line[:1].isdigit()]
    assert rows == [["0", "16x16", "8", "up2"], ["1", "32x32", "8", "up1"]]

    again = _run(repo, "-m", "vlmfilm_plugin", "inspect", "-o", "host.py", "--", sys.executable, "train.py")
    assert again.returncode != 0
    assert "host.py" in again.stderr

    weights = {}
    for mode in ("plain", "off", "on"):
        variables = {} if mode == "plain" else {"VLM_FILM_MODE": mode, "VLM_FILM_HOSTS": "host.py", "VLM_FILM_ENCODER": "descriptor"}
        done = _run(repo, "train.py", **variables)
        assert done.returncode == 0, done.stderr
        assert ("FiLM attached: mode=on" in done.stdout) == (mode == "on")
        weights[mode] = torch.load(repo / "last.pt", weights_only=False)
    assert all(torch.equal(value, weights["off"][name]) for name, value in weights["plain"].items())
    assert any(".heads.1." in name for name in weights["on"])


def test_a_class_of_the_script_itself_gets_no_host_adapter_that_would_wait_for_ever(repo: Path) -> None:
    (repo / "train.py").write_text(NET + SCRIPT.replace("from net import Net\n", ""))
    done = _run(repo, "-m", "vlmfilm_plugin", "inspect", "-o", "host.py", "--", sys.executable, "train.py")
    assert done.returncode == 1
    assert "Net is defined in the script itself" in done.stderr
    assert not (repo / "host.py").exists()


def test_json_of_a_factory_has_the_documented_shape_and_repeats(repo: Path) -> None:
    command = ("-m", "vlmfilm_plugin", "inspect", "net:Net", "--input", "1,1,32,32", "--json")
    first, second = _run(repo, *command), _run(repo, *command)
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout
    (unet,) = json.loads(first.stdout)["unets"]
    stages = [{name: stage[name] for name in ("index", "paths", "channels", "size")} for stage in unet["stages"]]
    assert stages == [
        {"index": 0, "paths": ["up2"], "channels": 8, "size": [16, 16]},
        {"index": 1, "paths": ["up1"], "channels": 8, "size": [32, 32]},
    ]
    assert isinstance(unet["warnings"], list)


def test_a_script_without_any_forward_is_an_error(repo: Path) -> None:
    (repo / "train.py").write_text("import torch\nprint('nothing')\n")
    done = _run(repo, "-m", "vlmfilm_plugin", "inspect", "-o", "host.py", "--", sys.executable, "train.py")
    assert done.returncode == 1
    assert not (repo / "host.py").exists()


@pytest.mark.parametrize("dims", [2, 3])
def test_stages_of_monai_follow_the_forward_and_not_the_names(dims: int) -> None:
    nets = pytest.importorskip("monai.networks.nets")
    net = nets.BasicUNet(spatial_dims=dims, in_channels=1, out_channels=2, features=(4, 4, 8, 16, 32, 4)).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    found = vlmfilm_plugin.inspect(net, torch.rand(1, 1, *[32] * dims, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules() if isinstance(module, nn.Module))
    (unet,) = found.unets
    assert [path.split(".")[0] for stage in unet.stages for path in stage.paths] == ["upcat_4", "upcat_3", "upcat_2", "upcat_1"]
    assert [stage.channels for stage in unet.stages] == [(16,), (8,), (4,), (4,)]
