"""The one order of precedence: it decides, the README says it, and nothing else puts layers together."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from vlmfilm_plugin import VLMConditioner, attach, warmup_vlm_cache
from vlmfilm_plugin.settings.arguments import SettingsArguments
from vlmfilm_plugin.settings.layers import ORDER, layers_of, resolve
from vlmfilm_plugin.settings.record import ALIASES, FIELDS, PRESETS, Settings

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "vlmfilm_plugin"
LEVELS = [level.name for level in ORDER]


@dataclass(frozen=True)
class Recorded:
    origin: str = "checkpoint x.ckpt"
    encoder: Mapping[str, object] = field(default_factory=dict)
    gate: Mapping[str, object] = field(default_factory=dict)
    architecture: Mapping[str, object] = field(default_factory=dict)


def with_levels(names: list[str], folder: Path) -> Settings:
    """Resolve a run in which each named level says its own number for one setting."""
    value = {name: {"update_interval_steps_train": 10 + LEVELS.index(name)} for name in names if name not in {"default", "preset"}}
    if "preset" in names:
        value.setdefault("host config", {})["preset"] = "soft-seg"  # type: ignore[assignment]
    environ: dict[str, str] = {}
    if "file" in names:
        (folder / "film.yaml").write_text(f"update_interval_steps_train: {value['file']['update_interval_steps_train']}\n", encoding="utf-8")
        environ["VLM_FILM_CONFIG"] = "film.yaml"
    if "environment" in names:
        environ["VLM_FILM_UPDATE_INTERVAL_STEPS_TRAIN"] = str(value["environment"]["update_interval_steps_train"])
    recorded = Recorded(encoder=value.get("checkpoint's encoder", {}), architecture=value.get("checkpoint's architecture", {}))
    layers = layers_of(environ, folder, recorded=recorded, host=value.get("host config"), arguments=value.get("argument"))
    return resolve(layers, folder)


def test_each_level_wins_over_all_before_it(tmp_path: Path) -> None:
    assert LEVELS[:2] == ["default", "preset"] and len(set(LEVELS)) == len(LEVELS)
    for count in range(len(LEVELS), 2, -1):
        assert with_levels(LEVELS[:count], tmp_path).update_interval_steps_train == 10 + count - 1, LEVELS[count - 1]
    preset = with_levels(["default", "preset"], tmp_path)
    assert preset.batch_strategy == "first" and preset.update_interval_steps_train == PRESETS["soft-seg"]["update_interval_steps_train"]
    assert with_levels(["default"], tmp_path) == resolve([], tmp_path)


def test_the_readme_says_the_order_in_its_words() -> None:
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split("## Settings")[1].split())
    text = text[: text.index("|")]
    places = [text.find(level.words, text.index("Weakest first")) for level in ORDER]
    assert -1 not in places and places == sorted(places), list(zip(LEVELS, places, strict=True))


def test_nothing_else_puts_layers_of_a_run_together() -> None:
    """A second list of layers would be a second order: only lists of one given layer may stand outside `layers`."""
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        if path.name == "layers.py" or "host" in path.relative_to(PACKAGE).parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "resolve" and node.args:
                first = node.args[0]
                is_list = isinstance(first, ast.List) and (len(first.elts) != 1 or isinstance(first.elts[0], ast.Starred))
                is_sum = isinstance(first, ast.BinOp)
                if (is_list or is_sum) and "settings" in path.read_text(encoding="utf-8"):
                    wrong.append(f"{path.name}:{node.lineno} {ast.unparse(node)}")
    assert [item for item in wrong if "Path" not in item and ".resolve()" not in item] == []


@pytest.mark.parametrize(
    ("word", "owner"), [(r"entry_points\(", "entry_points.py"), (r"yaml\.(safe_load|load|SafeLoader)\b", "settings/yaml_file.py")]
)
def test_entry_points_and_yaml_have_one_reader(word: str, owner: str) -> None:
    files = {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    # The start-up gate runs where this package may not be importable; the demo's host is a host.
    assert {name for name, text in files.items() if re.search(word, text) and not name.startswith(("_startup/", "demo/host/"))} == {owner}


# Arguments


def test_the_arguments_are_the_record() -> None:
    assert set(SettingsArguments.__annotations__) == set(FIELDS) | set(ALIASES)
    for name, annotation in SettingsArguments.__annotations__.items():
        own = str(FIELDS[ALIASES.get(name, name)].type)
        given = annotation if isinstance(annotation, str) else annotation.__forward_arg__
        parts = {part.strip() for part in re.split(r"\|(?![^\[]*\])", given)}
        missing = {part.strip() for part in re.split(r"\|(?![^\[]*\])", own)} - parts - {"tuple[int, ...]", "tuple[str, ...]"}
        assert not missing, (name, given, own)


@pytest.mark.parametrize("function", [attach, warmup_vlm_cache])
def test_an_editor_sees_every_setting_of_a_function(function: Any) -> None:
    parameters = inspect.signature(function).parameters
    assert set(FIELDS) <= set(parameters)
    assert not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    assert parameters["cond_dim"].default == Settings().cond_dim and parameters["cond_dim"].kind is inspect.Parameter.KEYWORD_ONLY


def test_the_ports_conditioner_has_settings_and_their_defaults_for_arguments() -> None:
    given = {name: parameter.default for name, parameter in inspect.signature(VLMConditioner).parameters.items()}
    # The port used features as they are.
    assert given["feature_transform"] == "none"
    of_its_own = {"enabled", "value_range", "feature_transform"}
    assert set(given) - of_its_own <= set(FIELDS)
    assert {name: value for name, value in given.items() if name not in of_its_own} == {
        name: getattr(Settings(), name) for name in set(given) - of_its_own
    }


def test_a_type_checker_finds_a_misspelt_setting_and_a_wrong_value(tmp_path: Path) -> None:
    api = pytest.importorskip("mypy.api")
    source = "from torch import nn\nfrom vlmfilm_plugin.forward.attach import attach\nunet = nn.Identity()\n"
    right = 'attach(unet, encoder="descriptor", decoder_stages=[0], gamma_scale=None, junction_gating_config={"enabled": True})\n'
    (tmp_path / "call.py").write_text(source + right + 'attach(unet, encodr="descriptor")\nattach(unet, cond_dim="8")\n', encoding="utf-8")
    out, _, _ = api.run(["--follow-imports=silent", "--ignore-missing-imports", "--cache-dir", str(tmp_path / "cache"), str(tmp_path / "call.py")])
    lines = {int(line.split(":")[1]) for line in out.splitlines() if ": error:" in line}
    assert lines == {5, 6}, out
