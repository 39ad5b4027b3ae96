"""The package is typed: a host adapter passes `mypy --strict`, and what an editor sees at the root is what is there."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import vlmfilm_plugin

ROOT = Path(__file__).parents[2]
PACKAGE = Path(vlmfilm_plugin.__file__).parent


def strict(path: Path) -> str:
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", sys.executable, "--config-file=", path.name]
    return subprocess.run(command, cwd=path.parent, capture_output=True, text=True, check=False).stdout


def test_the_readmes_adapter_passes_mypy_strict_and_a_wrong_one_does_not(tmp_path: Path) -> None:
    (source,) = re.findall(r"^```python\n(# tinyhost_adapter.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S | re.M)
    path = tmp_path / "tinyhost_adapter.py"
    path.write_text(source + "\n\nreveal_type(vlmfilm_host)\n")
    said = strict(path)
    assert "Success" in said and "def (module: types.ModuleType) -> vlmfilm_plugin.host_spec.HostSpec | None" in said, said
    path.write_text(source.replace('name="tinyhost"', "name=1").replace("value_range=(0.0, 1.0)", "value_rang=(0.0, 1.0)"))
    said = strict(path)
    assert '"name"' in said and "value_rang" in said


def test_the_marker_ships_and_the_typed_names_are_the_public_ones() -> None:
    assert (PACKAGE / "py.typed").is_file()
    tree = ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf-8"))
    found = {alias.asname: f"{node.module}" for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert found == {name: f"vlmfilm_plugin.{home}" for name, home in vlmfilm_plugin._HOME.items()}
