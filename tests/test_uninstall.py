"""pip killed while it removes or replaces the package: `import torch` goes on working, in that environment, for everyone.

What pip does, and in which order, is its own: it is watched at every file (`pip_watch`), and killed for good at some.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from processes import environment
from test_packaging import ROOT, build, see_outside

WATCH = Path(__file__).with_name("pip_watch.py")
# What torch does at the end of its import, without the seconds before.
TORCH = """
from importlib.metadata import entry_points
for backend in entry_points(group="torch.backends"):
    try:
        backend.load()()
    except Exception as err:
        raise RuntimeError(f"Failed to load the backend extension: {backend.name}.") from err
"""

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="the tests were taken out of their checkout")

Moment = tuple[str, str, list[str]]


class Installed:
    """An environment with a stand-in for torch and, once it is installed, this package."""

    def __init__(self, root: Path) -> None:
        self.root, self.python = root, root / "bin" / "python"
        self.site = next((root / "lib").glob("python*/site-packages"))

    @classmethod
    def make(cls, root: Path) -> Installed:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", root], check=True)
        made = cls(root)
        (made.site / "torch").mkdir()
        (made.site / "torch" / "__init__.py").write_text(TORCH)
        return made

    def copy(self, root: Path) -> Installed:
        shutil.copytree(self.root, root, symlinks=True)
        return Installed(root)

    def see_outside(self) -> None:
        """Let it see this test's own packages behind its own: the real torch, and another installation of this package."""
        see_outside(self.site)

    def pip(self, *arguments: str | Path, kill: int = -1) -> list[Moment]:
        """Run pip; return what was seen of it, nothing where it was killed."""
        command = [self.python, WATCH, self.site, kill, sysconfig.get_paths()["purelib"], *arguments]
        env = environment(PIP_CONSTRAINT=None, PYTHONDONTWRITEBYTECODE=None, PIP_NO_INDEX="1", PIP_QUIET="1")
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=env, check=False)
        if kill >= 0:
            assert done.returncode == -signal.SIGKILL, done.stderr
            return []
        assert done.returncode == 0, done.stderr
        found: list[Moment] = json.loads(done.stdout.splitlines()[-1])
        return found

    def install(self, wheel: Path, kill: int = -1) -> list[Moment]:
        return self.pip("install", "--no-deps", "--force-reinstall", wheel, kill=kill)

    def uninstall(self, kill: int = -1) -> list[Moment]:
        return self.pip("uninstall", "-y", "vlmfilm-plugin", kill=kill)

    def imports_torch(self) -> bool:
        done = subprocess.run([self.python, "-c", "import torch"], capture_output=True, text=True, env=environment(), check=False)
        assert done.returncode == 0 or "Failed to load the backend extension" in done.stderr, done.stderr
        return done.returncode == 0


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    checkout = folder / "checkout"
    ignored = shutil.ignore_patterns("__pycache__", ".*", "tests")
    shutil.copytree(ROOT, checkout, ignore=ignored)
    return build(checkout, "wheel", folder / "dist")


@pytest.fixture(scope="module")
def first_wheel(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel as the first version's was: its gate has the name that pip removes first."""
    target = tmp_path_factory.mktemp("first") / wheel.name
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(target, "w") as made:
        for name in source.namelist():
            data = source.read(name)
            if name == "_vlmfilm_startup.py":
                data = source.read("vlmfilm_startup.py")
            if name.endswith(("entry_points.txt", "RECORD")):
                lines = [line for line in data.decode().splitlines() if not line.startswith("vlmfilm_startup.py")]
                data = "\n".join(lines).replace("= vlmfilm_startup:", "= _vlmfilm_startup:").encode() + b"\n"
            if name != "vlmfilm_startup.py":
                made.writestr(name, data)
    return target


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed.make(tmp_path_factory.mktemp("environment") / "env")


@pytest.fixture(scope="module")
def installed(fresh: Installed, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    made = fresh.copy(tmp_path_factory.mktemp("installed") / "env")
    made.install(wheel)
    return made


def broken(moments: list[Moment]) -> list[int]:
    """Return the moments in which `import torch` would fail; they are one stretch, or none."""
    found = [number for number, (_, _, missing) in enumerate(moments) if missing]
    assert found == list(range(found[0], found[0] + len(found))) if found else True
    return found


def moved(moments: list[Moment], site: Path) -> list[str]:
    """Return the names in the environment that pip moved away, in its order."""
    return [Path(path).name for event, path, _ in moments if event == "os.rename" and Path(path).parent == site]


def test_the_gate_is_the_last_thing_that_an_uninstall_moves(installed: Installed, tmp_path: Path) -> None:
    moments = installed.copy(tmp_path / "env").uninstall()
    names = moved(moments, tmp_path / "env" / installed.site.relative_to(installed.root))
    assert names[-1] == "vlmfilm_startup.py" and any(name.endswith(".dist-info") for name in names[:-1])
    # All that is left is to delete what was moved; Python finds its metadata there until then.
    stretch = broken(moments)
    last_move = max(number for number, (event, _, _) in enumerate(moments) if event == "os.rename")
    assert len(moments) > 200 and stretch[0] == last_move + 1 and len(stretch) <= 20


def test_the_first_versions_gate_was_gone_for_most_of_an_uninstall(fresh: Installed, first_wheel: Path, tmp_path: Path) -> None:
    env = fresh.copy(tmp_path / "env")
    env.install(first_wheel)
    moments = env.uninstall()
    names = moved(moments, env.site)
    assert names.index("_vlmfilm_startup.py") < next(number for number, name in enumerate(names) if name.endswith(".dist-info"))


@pytest.mark.parametrize("kind", ["same", "first", "editable"])
def test_an_upgrade_writes_the_gate_among_its_first_files(fresh: Installed, wheel: Path, first_wheel: Path, tmp_path: Path, kind: str) -> None:
    env = fresh.copy(tmp_path / "env")
    if kind == "editable":
        command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel:editable", "-d", tmp_path / "dist"]
        subprocess.run(command, cwd=wheel.parents[1] / "checkout", check=True, capture_output=True)
        (wheel_before,) = (tmp_path / "dist").glob("*.whl")
    else:
        wheel_before = {"same": wheel, "first": first_wheel}[kind]
    env.install(wheel_before)
    assert env.imports_torch()
    moments = env.install(wheel)
    written = [Path(moments[number][1]).name for number in broken(moments) if moments[number][0] == "open"]
    assert len(moments) > 500 and len(written) <= 20, written
    assert env.imports_torch()
    assert sorted(path.name for path in env.site.glob("*vlmfilm_startup.py")) == ["_vlmfilm_startup.py", "vlmfilm_startup.py"]
    env.uninstall()
    assert not [path.name for path in env.site.iterdir() if "lmfilm" in path.name]


def test_really_killed_at_each_move_torch_is_imported(installed: Installed, tmp_path: Path) -> None:
    moments = installed.copy(tmp_path / "watched").uninstall()
    stretch = set(broken(moments))
    moves = [number for number, (event, _, _) in enumerate(moments) if event == "os.rename"]
    for number in sorted({*moves, min(stretch), max(stretch), max(stretch) + 1}):
        env = installed.copy(tmp_path / str(number))
        env.uninstall(kill=number)
        assert env.imports_torch() is (number not in stretch), moments[number]
        shutil.rmtree(env.root)


def test_after_a_kill_torch_says_who_is_missing_and_an_install_mends_it(installed: Installed, wheel: Path, tmp_path: Path) -> None:
    moments = installed.copy(tmp_path / "watched").uninstall()
    env = installed.copy(tmp_path / "env")
    env.uninstall(kill=broken(moments)[0])
    assert not env.imports_torch()
    env.install(wheel)
    assert env.imports_torch()
    env.see_outside()
    doctor = subprocess.run([env.python, "-m", "vlmfilm_plugin", "doctor"], capture_output=True, text=True, env=environment(), check=False)
    assert doctor.returncode == 1 and "~lmfilm_plugin" in doctor.stdout, doctor.stdout + doctor.stderr


def test_the_real_torch_is_imported_in_an_environment_whose_uninstall_was_killed(installed: Installed, tmp_path: Path) -> None:
    moments = installed.copy(tmp_path / "watched").uninstall()
    env = installed.copy(tmp_path / "env")
    env.uninstall(kill=max(number for number, (event, _, _) in enumerate(moments) if event == "os.rename"))
    assert not (env.site / "vlmfilm_plugin").exists() and (env.site / "vlmfilm_startup.py").exists()
    shutil.rmtree(env.site / "torch")
    env.see_outside()
    code = "import torch, vlmfilm_startup; print(vlmfilm_startup.__file__)"
    done = subprocess.run([env.python, "-c", code], capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0 and Path(done.stdout.strip()).parent == env.site, done.stderr
