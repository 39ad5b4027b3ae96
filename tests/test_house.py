"""The rules of the house (`house_rules`): each holds for every file, and each can fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import house_rules as rules
import pytest
from processes import python, run_code, succeed

import vlmfilm_plugin

ROOT = Path(__file__).parents[1]
CORE = ROOT / "vlmfilm_plugin"
# The demo's host is a host: it is not ours to write otherwise than hosts are.
OURS = [path for path in sorted([*CORE.rglob("*.py"), *(ROOT / "hooks").glob("*.py")]) if "host" not in path.relative_to(ROOT).parts[2:-1]]
INSIDE = [path for path in OURS if CORE in path.parents and path != CORE / "__init__.py" and "_startup" not in path.parts]
HOOKS = [path for path in OURS if CORE not in path.parents]


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def folder_of(path: Path) -> str:
    return path.relative_to(CORE).parts[0].removesuffix(".py")


def module_of(path: Path) -> str:
    inside = path.relative_to(ROOT) if CORE in path.parents else Path(rules.PACKAGE) / path.relative_to(ROOT)
    return ".".join(inside.with_suffix("").parts).removesuffix(".__init__")


def broken(rule: Callable[[str], list[str]], paths: list[Path]) -> dict[str, list[str]]:
    found = {path.relative_to(ROOT).as_posix(): rule(text_of(path)) for path in paths}
    return {name: wrong for name, wrong in found.items() if wrong}


# 1. The order of folders


def test_a_folder_imports_only_what_stands_above_it() -> None:
    found = {path.relative_to(ROOT).as_posix(): rules.wrong_imports(folder_of(path), text_of(path)) for path in INSIDE}
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


def test_the_order_names_every_folder_and_no_other() -> None:
    folders = {folder_of(path) for path in INSIDE}
    assert folders <= set(rules.FOLDERS)
    assert set(rules.FOLDERS) - folders <= rules.PLANNED
    assert len(INSIDE) > 60 and len(HOOKS) >= 3


def test_host_adapters_import_the_contract_alone() -> None:
    assert broken(rules.wrong_hook_imports, HOOKS) == {}


def test_the_gate_and_the_package_root_import_the_standard_library_alone() -> None:
    import sys

    for path in [CORE / "__init__.py", *(CORE / "_startup").glob("*startup.py")]:
        outside = {name for name in rules.imports(text_of(path)) if name.split(".")[0] not in sys.stdlib_module_names}
        assert outside <= {
            "vlmfilm_plugin.hosts.activation.activate",
            "vlmfilm_plugin.inspection.host_run.start",
            "vlmfilm_startup.torch_backend",
        }, path


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("errors", "from vlmfilm_plugin.settings.layers import resolve"),
        ("film", "def f():\n    from vlmfilm_plugin import forward"),
        ("film", "class A:\n    def f(self):\n        if x:\n            import vlmfilm_plugin.hosts.registry"),
        ("encoders", "from vlmfilm_plugin.features.provider import FeatureProvider"),
        ("film", "from .forward import attach"),
        ("run", "from vlmfilm_plugin.hooks import sofl_seg"),
        ("run", "import hooks.sofl_seg"),
        ("film", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from vlmfilm_plugin.hosts.registry import HostAdapters"),
        ("encoders", "FACTORY = 'vlmfilm_plugin.features.provider:FeatureProvider'"),
        ("features", "import_module('vlmfilm_plugin.cli.cache')"),
        ("film", "from vlmfilm_plugin.nowhere import x"),
    ],
)
def test_an_import_from_below_is_found(folder: str, source: str) -> None:
    assert rules.wrong_imports(folder, source)


def test_imports_from_above_are_let_pass() -> None:
    assert rules.wrong_imports("film", "import torch\nfrom vlmfilm_plugin import errors, __version__\nfrom vlmfilm_plugin.film import layers") == []
    assert rules.wrong_hook_imports("import os\nfrom vlmfilm_plugin.host_spec import UNet\nfrom vlmfilm_plugin.settings.mode import read_mode") == []
    assert rules.wrong_hook_imports("import torch") == ["torch"]
    assert rules.wrong_hook_imports("from vlmfilm_plugin import film") == ["vlmfilm_plugin.film"]
    assert rules.wrong_hook_imports("from vlmfilm_plugin.run.runtime import Runtime")
    assert rules.wrong_hook_imports("from vlmfilm_plugin.settings.layers import resolve")


# 2. No circle of files


def test_no_files_import_each_other_in_a_circle() -> None:
    edges = rules.graph({module_of(path): text_of(path) for path in OURS})
    assert sum(map(len, edges.values())) > 200
    assert rules.circles(edges) == []


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ({"p.a": "from p.b import x", "p.b": "def f():\n    import p.a"}, [["p.a", "p.b"]]),
        (
            {"p.a": "from p import b", "p.b": "if TYPE_CHECKING:\n    from p.c import y", "p.c": "import p.a", "p.d": "import p.a"},
            [["p.a", "p.b", "p.c"]],
        ),
        ({"p.a": "import p.a"}, [["p.a"]]),
        ({"p.a": "import p.b", "p.b": "import p.c", "p.c": ""}, []),
    ],
)
def test_a_circle_is_found(sources: dict[str, str], expected: list[list[str]]) -> None:
    assert rules.circles(rules.graph(sources)) == expected


# 3. What is free of torch

WITHOUT_TORCH = ("errors", "log", "host_spec", "settings/", "features/batch_names", "features/content_hash", "features/store/", "hosts/", "cli/")
# Imports each module of a list and says which heavy module it asked for; none is really imported, so one does not hide another.
HEAVY_IMPORTS = """
import importlib, importlib.abc, json, sys, traceback

class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in HEAVY:
            asked.setdefault(module, set()).add(name.split(".")[0])
            raise ImportError(f"{name} asked for")

HEAVY, modules = set(json.loads(sys.argv[1])), json.loads(sys.argv[2])
asked = {}
sys.meta_path.insert(0, Watch())
for module in modules:
    try:
        importlib.import_module(module)
    except ImportError:
        if module not in asked:
            raise
print(json.dumps({name: sorted(heavy) for name, heavy in asked.items()}))
"""


def heavy_imports(*modules: str, heavy: set[str] = rules.HEAVY) -> dict[str, list[str]]:
    """Return which heavy modules each module imports, itself or through others; in one process."""
    found: dict[str, list[str]] = json.loads(succeed(python("-c", HEAVY_IMPORTS, json.dumps(sorted(heavy)), json.dumps(modules))))
    return found


def test_what_must_be_free_of_torch_is() -> None:
    modules = [module_of(path) for path in INSIDE if path.relative_to(CORE).as_posix().startswith(WITHOUT_TORCH)]
    for name in WITHOUT_TORCH:
        assert any(module.startswith(f"{rules.PACKAGE}.{name}".replace("/", ".").rstrip(".")) for module in modules), name
    modules += [module_of(path) for path in HOOKS]
    assert len(modules) > 30
    # The last one shows that a module through which torch comes is found.
    through = "vlmfilm_plugin.film.layers", "vlmfilm_plugin.forward.handle"
    assert heavy_imports(*modules, *through) == {name: ["torch"] for name in through}


def test_importing_the_package_imports_nothing_but_itself() -> None:
    assert heavy_imports("vlmfilm_plugin", heavy=rules.HEAVY | {"numpy", "PIL", "yaml", "wrapt", "pluggy"}) == {}


DYNAMO = """
import json, sys
import torch
from small_unet import SmallUNet, inputs, randomise
def there():
    return "torch._dynamo" in sys.modules
seen = {"torch": there()}
import vlmfilm_plugin.hosts.activation, vlmfilm_plugin.run.runtime, vlmfilm_plugin.hooks.sofl_seg, vlmfilm_plugin.hooks.med_seg_diff_pytorch
seen["imports"] = there()
handle = vlmfilm_plugin.attach(SmallUNet(), feature_dim=3, cond_dim=4)
randomise(handle.film)
with handle.condition(torch.ones(2, 3)):
    handle.unet(*inputs(2)).sum().backward()
copied = __import__("copy").deepcopy(handle.unet)
seen["forward and backward"] = there()
with handle.condition(torch.ones(2, 3)):
    torch.compile(handle.unet, backend="eager")(*inputs(2))
seen["compiled"] = there()
print(json.dumps(seen))
"""


def test_dynamo_is_imported_only_when_something_is_compiled() -> None:
    found = json.loads(succeed(run_code(DYNAMO, PYTHONPATH=str(ROOT / "tests"))))
    assert found == {"torch": False, "imports": False, "forward and backward": False, "compiled": True}


# 4. Hosts by name, and files that are not read safely


def test_no_module_of_a_host_is_named_outside_hooks_and_demo() -> None:
    assert broken(rules.host_names, [path for path in INSIDE if "demo" not in path.parts]) == {}


def test_nothing_unpickles_objects() -> None:
    assert broken(rules.unsafe_loads, OURS) == {}


def test_a_hosts_name_and_an_unsafe_load_are_found() -> None:
    assert rules.host_names('x = f"src.archs.{y}"') and rules.host_names("'sofl-seg'") and not rules.host_names("'a source'")
    assert rules.unsafe_loads("torch.load(p, weights_only=False)")
    assert rules.unsafe_loads("for safe in (True, False):\n    torch.load(p, weights_only=safe)")
    assert rules.unsafe_loads("torch.load(p)") and rules.unsafe_loads("pickle.loads(b)") and rules.unsafe_loads("M.load(p, weights_only=False)")
    assert rules.unsafe_loads("torch.load(p, weights_only=True)") == []


# 5. Types


def test_a_row_of_the_store_is_read_by_name() -> None:
    assert broken(rules.numbered_columns, [path for path in INSIDE if folder_of(path) in {"features", "run", "cli"}]) == {}


def test_no_call_has_more_arguments_by_position_than_one_can_read() -> None:
    # The one signature that is not ours: the port's callers may pass its arguments by position.
    of_the_port = CORE / "soft_seg" / "conditioner.py"
    assert broken(rules.crowded_calls, [path for path in OURS if path != of_the_port]) == {}
    assert len(rules.crowded_calls(of_the_port.read_text(encoding="utf-8"))) == 1


def test_settings_have_a_type() -> None:
    assert broken(rules.untyped_settings, OURS) == {}


def test_numbered_columns_crowded_calls_and_untyped_settings_are_found() -> None:
    for text in ("row[4]", "row[-1]", "row[:4]", "rows[0][4]", "self.rows[i][2]", "found.row[1]", "old_row[0]"):
        assert rules.numbered_columns(f"x = {text}"), text
    for text in ("row['a']", "rows[0]", "rows[1:]", "row.key", "narrow(0)"):
        assert rules.numbered_columns(f"x = {text}") == [], text
    assert rules.crowded_calls("def f(a, b, c, d, e, f, g, h, i): ...") and rules.crowded_calls("f(1, 2, 3, 4, 5, 6, 7, 8, 9)")
    assert rules.crowded_calls("class A:\n    def f(self, a, b, c, d, e, f, g, h, *, i, j): ...") == []
    assert rules.untyped_settings("def f(**settings: object): ...") and rules.untyped_settings("def f(settings: Any): ...")
    assert rules.untyped_settings("def f(settings: Settings): ...") == []


# Words


def test_no_identifier_holds_a_word_that_was_replaced() -> None:
    assert broken(rules.left_words, [path for path in OURS if "demo" not in path.parts]) == {}
    assert [path for path in OURS if set(rules.words_of(path.stem)) & set(rules.LEFT_WORDS)] == []


def test_an_adapter_is_always_a_host_adapter() -> None:
    assert broken(rules.lonely_adapters, OURS) == {}


def test_left_words_are_found() -> None:
    for text in (
        "frame = 1",
        "def pop_frame(): ...",
        "class FrameStack: ...",
        "x.slots",
        "import a as witness",
        "f(policy=1)",
        "def f(partners): ...",
    ):
        assert rules.left_words(text), text
    assert rules.left_words("reuse_policy = framework = slotted = is_explicit") == []
    assert (
        rules.lonely_adapters('"""Load an adapter."""')
        and rules.lonely_adapters("x = 1  # Adapters are loaded")
        and rules.lonely_adapters('f"no adapter {x}"')
    )
    assert rules.lonely_adapters('"""Host adapters, and the host\n    adapter."""\nadapter = f(adapter, "adapter")') == []


# The package root


def test_every_public_name_resolves_and_is_listed_once() -> None:
    assert vlmfilm_plugin.__all__ == sorted(set(vlmfilm_plugin.__all__))
    assert dir(vlmfilm_plugin) == vlmfilm_plugin.__all__
    for name in vlmfilm_plugin.__all__:
        value = getattr(vlmfilm_plugin, name)
        assert name in {"__version__", "hookimpl"} or value.__module__.startswith(rules.PACKAGE)
        assert getattr(value, "__name__", name) in {name, "VLMConditioner", "EncoderIdentity"}


def test_an_unknown_name_is_an_attribute_error_that_names_it() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = vlmfilm_plugin.no_such_name
    with pytest.raises(ImportError):
        exec("from vlmfilm_plugin import no_such_name")


# 6. Files that are written


# The one that writes, the demo's own folder, a file that lines are added to, and private copies that are gone again.
WRITERS = {
    *("files.py", "features/shuffle_pairs.py", "run/live_metrics.py", "features/store/snapshot.py"),
    *("demo/run.py", "demo/folder.py", "demo/scripts.py", "demo/pictures.py", "demo/real_weights.py"),
}


def test_files_are_written_in_one_place() -> None:
    assert (
        broken(rules.loose_writes, [path for path in OURS if path.relative_to(ROOT / path.relative_to(ROOT).parts[0]).as_posix() not in WRITERS])
        == {}
    )
    for name in WRITERS:
        assert rules.loose_writes(text_of(CORE / name)), f"{name} needs no exception"


@pytest.mark.parametrize(
    "source",
    [
        "open(path, 'w')",
        "open(path, mode='ab')",
        "path.open('r+b')",
        "Path(path).write_text(text)",
        "save_file(tensors, path)",
        "torch.save(content, out)",
        "torch.save(content, str(file))",
        "tempfile.mkstemp(dir=folder)",
        "os.open(path, os.O_WRONLY | os.O_CREAT)",
        "with os.fdopen(handle, 'w') as file:\n    pass",
    ],
)
def test_a_file_written_elsewhere_is_found(source: str) -> None:
    assert rules.loose_writes(source)


def test_reading_is_let_pass() -> None:
    assert rules.loose_writes("open(path, 'rb')\npath.open()\nopen('wax.txt')\nImage.open(path, formats=['w'])\ntorch.save(content, file)") == []
