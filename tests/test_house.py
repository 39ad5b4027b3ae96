"""The rules of the house: imports go to lower layers only, importing is light, public names exist, and the core names no host."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vlmfilm_plugin

ROOT = Path(__file__).parents[1]
CORE = ROOT / "vlmfilm_plugin"
# Lowest first: a folder imports only what stands above it in this list.
FOLDERS = [
    "errors",
    "log",
    "host_spec",
    "settings",
    "encoders",
    "film",
    "features",
    "checkpoints",
    "forward",
    "run",
    "hosts",
    "soft_seg",
    "warmup",
    "demo",
    "cli",
    "__main__",
]
LAYER = {name: number for number, name in enumerate(FOLDERS)}
HEAVY = {"torch", "transformers", "accelerate", "lightning"}
TORCHLESS = {"errors", "log", "host_spec", "settings", "hosts"}
HOOKS_MAY = {"host_spec", "settings", "errors", "wrapt", "pluggy"}
PACKAGE = "vlmfilm_plugin"
SOURCES = [path for path in sorted([*CORE.rglob("*.py"), *(ROOT / "hooks").glob("*.py")]) if "host" not in path.relative_to(ROOT).parts[2:-1]]


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def walk(node: ast.AST) -> Iterator[ast.AST]:
    """Yield every node below, without the bodies of `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            continue
        yield child
        yield from walk(child)


def imports(source: str) -> Iterator[str]:
    """Yield the dotted name of everything imported, at any level; `from a import b` as `a.b`."""
    for node in walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def part_of(dotted: str) -> str | None:
    """Return the part of the package that a dotted name belongs to: `film`, `encoders`, ..., or None."""
    parts = dotted.split(".")
    return parts[1] if parts[0] == PACKAGE and len(parts) > 1 else None


def violations(part: str, source: str) -> list[str]:
    """Return what `source`, as a file of `part` of the package, must not import."""
    wrong = []
    for name in imports(source):
        target, top = part_of(name), name.split(".")[0]
        if name.startswith("."):
            wrong.append(f"{name}: relative import")
        elif target is not None and target != "__version__" and LAYER[target] > LAYER[part]:
            wrong.append(f"{name}: layer {LAYER[target]} from layer {LAYER[part]}")
        elif part in TORCHLESS and top in HEAVY:
            wrong.append(f"{name}: heavy")
        elif top == "hooks" or (target == "hooks"):
            wrong.append(f"{name}: the core names no host adapter")
    return wrong


def hook_violations(source: str) -> list[str]:
    """Return what a host adapter must not import."""
    allowed = HOOKS_MAY | set(sys.stdlib_module_names)
    return [name for name in imports(source) if (part_of(name) or name.split(".")[0]) not in allowed]


def identifier(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


CORE_SOURCES = [path for path in SOURCES if CORE in path.parents and path not in (CORE / "__init__.py",) and "_startup" not in path.parts]


@pytest.mark.parametrize("path", CORE_SOURCES, ids=identifier)
def test_imports_go_to_lower_layers_only(path: Path) -> None:
    part = path.relative_to(CORE).parts[0].removesuffix(".py")
    assert part in LAYER, f"{part} has no layer: add it to LAYERS"
    assert violations(part, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", sorted((ROOT / "hooks").glob("*.py")), ids=identifier)
def test_adapters_import_the_contract_alone(path: Path) -> None:
    assert hook_violations(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", [CORE / "__init__.py", *(CORE / "_startup").glob("*.py")], ids=identifier)
def test_the_gate_and_the_package_root_import_the_standard_library_alone(path: Path) -> None:
    names = set(imports(path.read_text(encoding="utf-8")))
    assert {name for name in names if name.split(".")[0] not in sys.stdlib_module_names} <= {"vlmfilm_plugin.hosts.activation.activate"}


def test_the_layers_cover_the_whole_house() -> None:
    files = {path.relative_to(CORE).parts[0].removesuffix(".py") for path in CORE_SOURCES}
    assert files == set(LAYER)
    assert len(CORE_SOURCES) > 25


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("errors", "from vlmfilm_plugin.settings.layers import resolve"),
        ("settings", "def f():\n    import torch.nn as nn"),
        ("film", "def f():\n    from vlmfilm_plugin import forward"),
        ("film", "class A:\n    def f(self):\n        if x:\n            import vlmfilm_plugin.hosts.registry"),
        ("settings", "try:\n    import transformers\nexcept ImportError:\n    pass"),
        ("hosts", "from torch import Tensor"),
        ("encoders", "from vlmfilm_plugin.features.provider import FeatureProvider"),
        ("film", "from .forward import attach"),
        ("run", "from vlmfilm_plugin.hooks import sofl_seg"),
        ("film", "if TYPE_CHECKING:\n    pass\nelse:\n    pass\nimport vlmfilm_plugin.cli.run"),
    ],
)
def test_the_checker_finds_a_violation(part: str, source: str) -> None:
    LAYER.setdefault("hooks", 0)
    try:
        assert violations(part, source)
    finally:
        LAYER.pop("hooks")


def test_the_checker_lets_type_checking_and_lower_layers_pass() -> None:
    source = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from vlmfilm_plugin.hosts.registry import AdapterRegistry\n"
    source += "import torch\nfrom vlmfilm_plugin import errors"
    assert violations("film", source) == []
    assert hook_violations("import torch") == ["torch"]
    assert hook_violations("from vlmfilm_plugin import film") == ["vlmfilm_plugin.film"]
    assert hook_violations("from vlmfilm_plugin.run.runtime import Runtime")


FORBIDDEN = ("sofl", "med_seg_diff", "src.")


def host_names(source: str) -> list[str]:
    literals = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [text for text in literals if any(word in text.lower() for word in FORBIDDEN)]


@pytest.mark.parametrize("path", [path for path in SOURCES if CORE in path.parents and "demo" not in path.parts], ids=identifier)
def test_the_core_names_no_host(path: Path) -> None:
    assert host_names(path.read_text(encoding="utf-8")) == []


def test_the_search_for_host_names_finds_one() -> None:
    assert host_names('x = f"src.archs.{y}"')
    assert host_names("'sofl-seg'")


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True).stdout


def heavy_after(statement: str) -> list[str]:
    return run(f"import sys; {statement}; print(*sorted(set(sys.modules) & {HEAVY | {'numpy', 'PIL', 'yaml'}!r}))").split()


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert heavy_after("import vlmfilm_plugin") == []
    assert "torch" in heavy_after("import vlmfilm_plugin.film.layers")


@pytest.mark.parametrize(
    "statement", ["import vlmfilm_plugin.cli", "import vlmfilm_plugin.hooks.sofl_seg, vlmfilm_plugin.hooks.med_seg_diff_pytorch"]
)
def test_the_command_line_and_the_adapters_import_without_torch(statement: str) -> None:
    assert not {"torch", "transformers", "accelerate", "lightning"} & set(heavy_after(statement))


def test_every_public_name_resolves_and_is_listed_once() -> None:
    assert vlmfilm_plugin.__all__ == sorted(set(vlmfilm_plugin.__all__))
    assert dir(vlmfilm_plugin) == vlmfilm_plugin.__all__
    for name in vlmfilm_plugin.__all__:
        value = getattr(vlmfilm_plugin, name)
        assert name in {"__version__", "hookimpl"} or value.__module__.startswith(PACKAGE)
        assert getattr(value, "__name__", name) in {name, "VLMConditioner"}


def test_an_unknown_name_is_an_attribute_error_that_names_it() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = vlmfilm_plugin.no_such_name
    with pytest.raises(ImportError):
        exec("from vlmfilm_plugin import no_such_name")
