"""Wheel, sdist and editable installs in fresh environments: what is importable, what a moved checkout does, what uninstall leaves."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from processes import environment

ROOT = Path(__file__).parents[1]
PROBE = """
import importlib.util as u, sys
import torch, vlmfilm_startup
print("gate", vlmfilm_startup.__file__)
print("modules", sorted(m for m in sys.modules if m.startswith("vlmfilm_plugin")))
print("bare", [name for name in ("hooks", "tests", "demo") if u.find_spec(name) and "vlmfilm" in str(u.find_spec(name).origin)])
import vlmfilm_plugin.hooks.sofl_seg as adapter
print("adapter", adapter.NAME)
"""

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="the tests were taken out of their checkout")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packaging") / "vlmfilm-checkout"
    names = ["pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "vlmfilm_plugin", "hooks", "tests", ".gitignore"]
    folder.mkdir()
    for name in names:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".*_cache"))
        else:
            shutil.copy(source, folder / name)
    return folder


def see_outside(site: Path) -> None:
    """Let an environment see the packages of this process behind its own."""
    places = [place for place in sys.path if Path(place).name == "site-packages"]
    (site / "outer.pth").write_text("".join(f"{place}\n" for place in places))


class Environment:
    """A fresh virtual environment that sees this one's packages behind its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", root], check=True)
        self.python = root / "bin" / "python"
        self.site = Path(self.output("import sysconfig; print(sysconfig.get_paths()['purelib'])").strip())
        see_outside(self.site)

    def pip(self, *arguments: str | Path) -> None:
        command = [sys.executable, "-m", "pip", "--python", self.python, "--quiet", *arguments]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment(PIP_CONSTRAINT=None), check=False)
        assert done.returncode == 0, done.stderr

    def install(self, *what: str | Path) -> None:
        # The outer environment holds this very package, too; ours must come first, whatever version that is.
        self.pip("install", "--no-deps", "--no-build-isolation", "--ignore-installed", *what)

    def output(self, code: str, **variables: str) -> str:
        done = subprocess.run([self.python, "-c", code], capture_output=True, text=True, cwd=self.root, env=environment(**variables), check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout


def build(checkout: Path, kind: str, out: Path) -> Path:
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", out], cwd=checkout, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl" if kind == "wheel" else "*.tar.gz"))


def facts(output: str) -> dict[str, str]:
    return dict(line.split(" ", 1) for line in output.splitlines())


def test_wheel_holds_gate_package_adapters_and_demo_host_alone(checkout: Path, tmp_path: Path) -> None:
    names = zipfile.ZipFile(build(checkout, "wheel", tmp_path)).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"vlmfilm_startup.py", "_vlmfilm_startup.py", "vlmfilm_plugin"}
    assert {"vlmfilm_plugin/hooks/sofl_seg.py", "vlmfilm_plugin/demo/host/scripts/train.py"} <= set(names)
    assert not any("_startup/" in name or "__pycache__" in name or "build_hook" in name for name in names)


@pytest.mark.parametrize("kind", ["wheel", "sdist", "editable"])
def test_install_is_dormant_and_complete(checkout: Path, tmp_path: Path, kind: str) -> None:
    env = Environment(tmp_path / "env")
    env.install(*(["-e", checkout] if kind == "editable" else [build(checkout, kind, tmp_path / "dist")]))
    found = facts(env.output(PROBE))
    # A real file of the environment, in an editable install too: a moved checkout cannot break `import torch`.
    assert Path(found["gate"]).parent == env.site
    assert found["modules"] == "[]" and found["adapter"] == "sofl-seg"
    if kind != "editable":
        assert found["bare"] == "[]"


def test_a_moved_checkout_of_an_editable_install_leaves_import_torch_alone(checkout: Path, tmp_path: Path) -> None:
    moving = tmp_path / "moving"
    shutil.copytree(checkout, moving)
    env = Environment(tmp_path / "env")
    env.install("-e", moving)
    see_outside(env.site)
    moving.rename(tmp_path / "moved")
    assert env.output("import torch; print('fine')") == "fine\n"


def test_uninstall_leaves_nothing(checkout: Path, tmp_path: Path) -> None:
    env = Environment(tmp_path / "env")
    before = set(os.listdir(env.site))
    env.install(build(checkout, "wheel", tmp_path / "dist"))
    assert set(os.listdir(env.site)) > before
    env.pip("uninstall", "--yes", "vlmfilm-plugin")
    assert set(os.listdir(env.site)) - {"__pycache__"} == before
