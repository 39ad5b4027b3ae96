"""The README runs: its adapter, its Python, its commands, its names."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from processes import environment, forked, forked_code, python, run_code, succeed

from vlmfilm_plugin.settings.record import Settings

README = Path(__file__).parents[1] / "README.md"
HOST = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.block1, self.block2 = nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, c, 3, padding=1)
    def forward(self, x):
        return self.block2(self.block1(x))

class TinyUNet(nn.Module):
    def __init__(self, c=4):
        super().__init__()
        self.inp, self.decoder, self.out = nn.Conv2d(2, c, 1), nn.ModuleList([Block(c), Block(c)]), nn.Conv2d(c, 1, 1)
    def forward(self, noisy, image):
        x = self.inp(torch.cat([noisy, image], 1))
        for block in self.decoder:
            x = block(x)
        return self.out(x)

class Trainer:
    def __init__(self):
        self.unet = TinyUNet()
        self.optimizer = torch.optim.Adam(self.unet.parameters(), lr=1e-2)
    def train_step(self, images, files=None):
        loss = self.unet(torch.randn_like(images), images).square().mean()
        self.optimizer.zero_grad(); loss.backward(); self.optimizer.step()
        return loss.item()
    def predict(self, images):
        with torch.no_grad():
            return self.unet(torch.zeros_like(images), images)
"""
RUN = """
import torch
from tinyhost.model import Trainer
trainer = Trainer()
for _ in range(4):
    images = torch.rand(3, 1, 16, 16)
    trainer.train_step(images)
film = trainer.unet.vlm_film
print([s.path for s in film.architecture.stages], bool(film.heads[0].mlp[2].weight.abs().sum() > 0), tuple(trainer.predict(images).shape))
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(encoding="utf-8"), re.S | re.M)


def block(language: str, word: str) -> str:
    (found,) = [text for text in blocks(language) if word in text]
    return found


def test_the_adapter_example_is_complete_and_trains_its_host(tmp_path: Path) -> None:
    (tmp_path / "tinyhost").mkdir()
    (tmp_path / "tinyhost" / "__init__.py").touch()
    (tmp_path / "tinyhost" / "model.py").write_text(HOST)
    (tmp_path / "tinyhost_adapter.py").write_text(block("python", "vlmfilm_host"))
    # What pip would write for the entry point of the README's pyproject.toml.
    entry = re.search(r'"(tinyhost[^"]+)" = "([^"]+)"', block("toml", "vlmfilm.hosts"))
    assert entry is not None
    info = tmp_path / "tinyhost_adapter-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tinyhost-adapter\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[vlmfilm.hosts]\n{entry.group(1)} = {entry.group(2)}\n")
    variables = {"PYTHONPATH": str(tmp_path), "VLM_FILM_ENCODER": "descriptor"}
    output = succeed(run_code(RUN, cwd=tmp_path, VLM_FILM_MODE="on", **variables))
    assert "['decoder.0.block2', 'decoder.1.block2'] True (3, 1, 16, 16)" in output.splitlines()
    plain = forked_code("from tinyhost.model import Trainer; print(hasattr(Trainer().unet, 'vlm_film'))", cwd=tmp_path, **variables)
    assert succeed(plain) == "False\n"


def test_the_example_by_hand_runs(tmp_path: Path) -> None:
    setup = """
import numpy as np, torch
from PIL import Image
from small_unet import SmallUNet
for name in "ab":
    Image.fromarray((np.random.default_rng(ord(name)).random((32, 32)) * 255).astype("uint8")).save(f"{name}.png")
unet = SmallUNet()
x, time, cond = torch.randn(2, 1, 16, 16), torch.zeros(2), torch.randn(2, 1, 16, 16)
"""
    succeed(forked_code(setup + block("python", "vlmfilm_plugin.attach"), cwd=tmp_path, PYTHONPATH=str(Path(__file__).parent)))


def test_every_command_of_the_command_line_has_help_and_stands_in_the_readme() -> None:
    text = README.read_text(encoding="utf-8")
    help_text = succeed(python("-m", "vlmfilm_plugin", "--help"))
    commands = re.findall(r"^    (\w+) ", help_text, re.M)
    assert {"run", "doctor", "demo"} <= set(commands)
    for command in commands:
        assert f"vlmfilm {command}" in text, command
        assert f"usage: vlmfilm {command}" in succeed(forked("-m", "vlmfilm_plugin", command, "--help"))


def test_every_setting_stands_in_the_readme() -> None:
    text = README.read_text(encoding="utf-8")
    missing = [name for name in Settings().as_dict() if f"`{name}`" not in text and name not in {"use_vlm_film"}]
    known_elsewhere = {"verbose", "verbose_debug", "log_every_n_steps", "update_interval_steps_eval", "film_log_every_n_steps_val"}
    assert set(missing) <= known_elsewhere


def test_doctor_names_settings_and_their_origins(tmp_path: Path) -> None:
    import json

    result = python("-m", "vlmfilm_plugin", "doctor", "--json", cwd=tmp_path, VLM_FILM_MODE="off", VLM_FILM_COND_DIM="64")
    report = json.loads(result.stdout)
    assert report["activation"]["state"] == "active, mode off"
    assert report["settings"]["cond_dim"] == {"value": 64, "from": "environment: VLM_FILM_COND_DIM"}
    wrong = forked("-m", "vlmfilm_plugin", "doctor", cwd=tmp_path, VLM_FILM_COND_DIMM="64")
    assert wrong.returncode == 1 and "VLM_FILM_COND_DIM" in wrong.stdout


@pytest.mark.parametrize("tool", [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]])
def test_static_checks_are_clean(tool: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *tool], cwd=README.parent, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_claim_of_reliability_names_tests_that_are_there() -> None:
    section = README.read_text(encoding="utf-8").split("## Reliability")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ") and "`" in line]
    assert len(rows) >= 10
    for row in rows:
        named = re.findall(r"`(tests/[^`]+)`", row)
        assert named, row
        for name in named:
            path = README.parent / name
            files = [path] if path.suffix else sorted(path.glob("test_*.py"))
            assert files and all("def test_" in file.read_text(encoding="utf-8") for file in files), name
