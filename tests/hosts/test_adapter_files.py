"""Adapters named by `VLM_FILM_HOSTS`: a file is enough, from any folder, in children too; one that cannot be used stops the run by name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from processes import run_code, succeed

NET = """
import torch
from torch import nn
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
    def forward(self, x):
        return self.conv(x)
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.ups = nn.ModuleList([Block(), Block()])
    def forward(self, x, cond):
        for up in self.ups:
            x = up(x)
        return x
"""
ADAPTER = """
from vlmfilm_plugin import hookimpl
from vlmfilm_plugin.host_spec import HostSpec, UNet
vlmfilm_modules = ["own_net"]
@hookimpl
def vlmfilm_host(module):
    return HostSpec(name="own", unets=[UNet(cls=module.Net, targets={"post_block2": "ups.*"})])
"""
BUILD = "import torch, own_net; print(sum('vlm_film' in n for n, _ in own_net.Net().named_parameters()) > 0)"
CHILD = "import os, subprocess, sys, torch; sub = os.getcwd() + '/sub'; os.chdir(sub); sys.path.insert(0, '..')\n"


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "own_net.py").write_text(NET)
    (tmp_path / "adapter.py").write_text(ADAPTER)
    (tmp_path / "sub").mkdir()
    return tmp_path


def test_an_adapter_file_attaches_and_a_child_in_another_folder_finds_it(own: Path) -> None:
    child = CHILD + f"print(subprocess.run([sys.executable, '-c', {'import sys; sys.path.insert(0, chr(46) * 2); ' + BUILD!r}], "
    child += "capture_output=True, text=True).stdout)"
    settings = {"VLM_FILM_MODE": "on", "VLM_FILM_ENCODER": "descriptor", "VLM_FILM_HOSTS": "adapter.py"}
    assert "True" in succeed(run_code(BUILD, cwd=own, **settings))
    assert "True" in succeed(run_code(child, cwd=own, **settings))


def test_without_a_mode_the_file_is_not_even_looked_for(own: Path) -> None:
    assert "False" in succeed(run_code(BUILD, cwd=own, VLM_FILM_HOSTS="absent.py"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no such file"),
        ("def (", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError"),
        ("x = 1", "vlmfilm_modules"),
        ("vlmfilm_modules = 'own_net'", "own_net"),
    ],
)
def test_a_file_that_cannot_be_used_stops_the_run_and_is_named(own: Path, text: str | None, said: str) -> None:
    if text is not None:
        (own / "bad.py").write_text(text)
    result = run_code("import torch; print('went on')", cwd=own, VLM_FILM_MODE="on", VLM_FILM_HOSTS=os.pathsep.join(["adapter.py", "bad.py"]))
    assert result.returncode != 0 and "went on" not in result.stdout
    assert "bad.py" in result.stderr and said in result.stderr


@pytest.mark.parametrize(("returned", "said"), [("{'name': 'own'}", "returned {'name': 'own'}"), ("missing(module)", "NameError")])
def test_an_adapter_that_returns_the_wrong_record_or_fails_stops_the_run(own: Path, returned: str, said: str) -> None:
    head = ADAPTER.split("    return")[0]
    (own / "bad.py").write_text(f"{head}    return {returned}\n")
    result = run_code(BUILD, cwd=own, VLM_FILM_MODE="on", VLM_FILM_HOSTS="bad.py")
    assert result.returncode != 0 and result.stdout == "" and said in result.stderr


def test_a_file_without_hookimpl_stops_the_run(own: Path) -> None:
    (own / "bad.py").write_text(ADAPTER.replace("@hookimpl\n", ""))
    result = run_code(BUILD, cwd=own, VLM_FILM_MODE="on", VLM_FILM_HOSTS="bad.py")
    assert result.returncode != 0 and result.stdout == "" and "hook" in result.stderr and "bad.py" in result.stderr


def test_the_end_of_a_run_whose_host_never_came_names_the_file(own: Path) -> None:
    code = "import torch; w = torch.nn.Linear(2, 2); o = torch.optim.SGD(w.parameters(), 0.1); w(torch.ones(1, 2)).sum().backward(); o.step()"
    result = run_code(code, cwd=own, VLM_FILM_MODE="on", VLM_FILM_HOSTS="adapter.py")
    assert "adapter.py knows" in result.stderr and "AttributeError" not in result.stderr
