"""Activation: dormant, asked for, broken, late, half-imported.

In real processes where `import torch` itself, the interpreter's start or its exit is what activates or speaks; elsewhere in a fork of one that has
imported torch, for which the gate is called as torch would call it.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from processes import DEMO_HOST, forked_code, python, run_code, succeed

# A host module by name and structure, as small as recognition allows; it is the one that imports torch first.
UNET = """
import torch
from torch import nn

class ResnetBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)
    def forward(self, x, time_emb=None):
        return self.conv(x)

class MedSegDiffUNet(nn.Module):
    def __init__(self, dim, image_size, mask_channels=1, input_img_channels=1, dim_mult=(1, 2)):
        super().__init__()
        self.ups = nn.ModuleList(nn.ModuleList([ResnetBlock(dim), ResnetBlock(dim)]) for _ in dim_mult)
    def forward(self, x, time, cond):
        for a, b in self.ups:
            x = b(a(x))
        return x
LAST_LINE = True
"""
SETTINGS = {"VLM_FILM_ENCODER": "descriptor"}


@pytest.fixture
def host(tmp_path: Path) -> Path:
    components = tmp_path / "src" / "archs" / "components"
    components.mkdir(parents=True)
    for folder in (components, components.parent, components.parent.parent):
        (folder / "__init__.py").touch()
    (components / "diffusion_unet.py").write_text(UNET)
    return tmp_path


BUILD = """
from src.archs.components.diffusion_unet import MedSegDiffUNet
unet = MedSegDiffUNet(8, 16)
print(sorted(n for n, _ in unet.named_children()))
"""


def test_dormant_process_holds_the_gate_alone(host: Path) -> None:
    output = succeed(run_code(BUILD + "import sys; print(sorted(m for m in sys.modules if 'vlmfilm' in m))", cwd=host))
    assert output.splitlines() == ["['ups']", "['vlmfilm_startup']"]


def test_the_host_module_that_imports_torch_first_is_patched_at_its_end(host: Path) -> None:
    assert "['ups', 'vlm_film']" in succeed(run_code(BUILD, cwd=host, VLM_FILM_MODE="on", **SETTINGS))


def test_a_host_imported_after_torch_is_patched(host: Path) -> None:
    assert "['ups', 'vlm_film']" in succeed(run_code("import torch\n" + BUILD, cwd=host, VLM_FILM_MODE="on", **SETTINGS))


def test_isolated_mode_still_activates(host: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(host)!r})\n{BUILD}"
    assert "['ups', 'vlm_film']" in succeed(python("-I", "-c", code, cwd=host, VLM_FILM_MODE="on", **SETTINGS))


def test_spawned_workers_are_activated_too(host: Path) -> None:
    (host / "main.py").write_text(
        "import multiprocessing as mp\n"
        "def work(_):\n"
        "    from src.archs.components.diffusion_unet import MedSegDiffUNet\n"
        "    return hasattr(MedSegDiffUNet(8, 16), 'vlm_film')\n"
        "if __name__ == '__main__':\n"
        "    with mp.get_context('spawn').Pool(1) as pool:\n"
        "        print(pool.map(work, [0]))\n"
    )
    assert "[True]" in succeed(python("main.py", cwd=host, VLM_FILM_MODE="on", **SETTINGS))


@pytest.mark.parametrize("value", ["onn", "", "ON", "true"])
def test_a_wrong_mode_stops_a_recognised_host_even_on_retry(host: Path, value: str) -> None:
    code = "try:\n    import src.archs.components.diffusion_unet\nexcept Exception:\n    import src.archs.components.diffusion_unet\nprint('TRAINED')"
    # One in a real process: its exit code, too, is the interpreter's own.
    run = run_code if value == "onn" else forked_code
    result = run(code, cwd=host, VLM_FILM_MODE=value)
    assert result.returncode == 1 and "TRAINED" not in result.stdout
    assert f"found:    {value!r}" in result.stderr and "on, off or shuffle" in result.stderr


def test_a_wrong_mode_leaves_a_process_without_a_host_alone(host: Path) -> None:
    result = run_code("import torch; print('fine')", cwd=host, VLM_FILM_MODE="onn")
    assert succeed(result) == "fine\n" and result.stderr.count("\n") == 1 and "not a mode" in result.stderr


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("VLM_FILM_GAMMA_SCAEL", "0.2", ["unknown name", "VLM_FILM_GAMMA_SCALE"]),
        ("VLM_FILM_COND_DIM", "many", ["bad value", "a whole number >= 1"]),
        ("VLM_FILM_CONFIG", "absent.yaml", ["cannot read the file", "absent.yaml"]),
        ("VLM_FILM_DECODER_STAGES", "0,7", ["no such stage", "[7]", "0 (next to the bottleneck) to 1"]),
        ("VLM_FILM_TARGETS", "up.*.1", ["matched the FiLM targets", "closest", "ups.0.1"]),
        ("VLM_FILM_ENCODER", "qwen", ["unknown name", "qwen2_5_vl"]),
    ],
)
def test_a_wrong_setting_stops_the_build_and_names_itself(host: Path, variable: str, value: str, words: list[str]) -> None:
    result = forked_code(BUILD, cwd=host, VLM_FILM_MODE="on", **{**SETTINGS, variable: value})
    assert result.returncode == 1 and "['ups" not in result.stdout
    for word in words:
        assert word in result.stderr


def test_a_missing_model_is_an_error_that_says_what_to_do(host: Path) -> None:
    result = forked_code(BUILD, cwd=host, VLM_FILM_MODE="on", VLM_FILM_MODEL_NAME="./no/such/folder")
    assert result.returncode == 1 and "EncoderError" in result.stderr and "no/such/folder" in result.stderr and "fix:" in result.stderr


def test_no_network_is_an_error_that_says_what_to_do(host: Path) -> None:
    result = run_code(BUILD, cwd=host, VLM_FILM_MODE="on", HF_HUB_OFFLINE="1", HF_HOME=str(host / "hub"))
    assert result.returncode == 1 and "EncoderError" in result.stderr and "Qwen/Qwen2.5-VL-3B-Instruct" in result.stderr and "fix:" in result.stderr


def test_an_unrelated_repo_with_the_same_module_name_is_left_alone_and_reported(host: Path) -> None:
    module = host / "src" / "archs" / "components" / "diffusion_unet.py"
    module.write_text("import torch\nclass MedSegDiffUNet(torch.nn.Module):\n    def __init__(self, width):\n        super().__init__()\n")
    result = forked_code(
        "from src.archs.components.diffusion_unet import MedSegDiffUNet as U; print(type(U.__init__).__name__, dict(U(3).named_children()))",
        cwd=host,
        VLM_FILM_MODE="on",
        **SETTINGS,
    )
    assert succeed(result) == "function {}\n"
    assert "VLM-FiLM was NOT active" in result.stderr and "src.archs.components.diffusion_unet" in result.stderr


def test_a_process_that_imports_a_host_but_builds_nothing_says_so_at_exit(host: Path) -> None:
    result = run_code("import src.archs.components.diffusion_unet", cwd=host, VLM_FILM_MODE="on", **SETTINGS)
    assert result.returncode == 0 and "VLM-FiLM was NOT active" in result.stderr


def test_activated_later_in_a_notebook_patches_what_was_imported(host: Path) -> None:
    code = "import os, torch\nimport src.archs.components.diffusion_unet\nos.environ['VLM_FILM_MODE'] = 'on'\n"
    code += "import vlmfilm_plugin; vlmfilm_plugin.activate()\n"
    assert "['ups', 'vlm_film']" in succeed(forked_code(code + BUILD, cwd=host, **SETTINGS))


def test_activated_after_a_unet_was_built_is_refused(host: Path) -> None:
    code = BUILD + "import os; os.environ['VLM_FILM_MODE'] = 'on'\nimport vlmfilm_plugin; vlmfilm_plugin.activate()\n"
    result = forked_code(code, cwd=host, **SETTINGS)
    assert result.returncode == 1 and "HostError" in result.stderr and "before VLM-FiLM was activated" in result.stderr


def test_relative_cache_folder_is_that_of_the_start(host: Path) -> None:
    elsewhere = host / "elsewhere"
    elsewhere.mkdir()
    code = "import os, torch; os.chdir('elsewhere')\nimport sys; sys.path.insert(0, '..')\n" + BUILD
    code += "from vlmfilm_plugin.hosts import activation; print(activation.current().runtime.settings.cache_dir)"
    assert str(host / "mine") in succeed(forked_code(code, cwd=host, VLM_FILM_MODE="on", VLM_FILM_CACHE_DIR="mine", **SETTINGS))


def test_a_host_that_fails_to_import_is_patched_at_its_successful_retry(host: Path) -> None:
    module = host / "src" / "archs" / "components" / "diffusion_unet.py"
    module.write_text("import os, torch\nif 'READY' not in os.environ:\n    raise RuntimeError('not yet')\n" + UNET)
    code = (
        "import os\ntry:\n    import src.archs.components.diffusion_unet\nexcept RuntimeError as e:\n    print(e)\nos.environ['READY'] = '1'\n"
        + BUILD
    )
    output = succeed(forked_code(code, cwd=host, VLM_FILM_MODE="on", **SETTINGS))
    assert output.splitlines()[0] == "not yet" and "['ups', 'vlm_film']" in output


def test_a_broken_plugin_cannot_break_import_torch_but_stops_a_host(host: Path) -> None:
    broken = host / "broken"
    broken.mkdir()
    shutil.copytree(Path(__file__).parents[2] / "vlmfilm_plugin", broken / "vlmfilm_plugin", ignore=shutil.ignore_patterns("host", "__pycache__"))
    (broken / "vlmfilm_plugin" / "hosts" / "activation.py").write_text("raise ImportError('half an install')\n")
    variables = {"PYTHONPATH": str(broken), "VLM_FILM_MODE": "on"}
    fine = run_code("import torch; print('fine')", cwd=host, **variables)
    assert succeed(fine) == "fine\n" and "half an install" in fine.stderr
    stopped = run_code("import torch\n" + BUILD, cwd=host, **variables)
    assert stopped.returncode == 1 and "['ups" not in stopped.stdout and "half an install" in stopped.stderr


def test_vlmfilm_run_sets_the_mode_and_works_where_autoload_is_off(host: Path) -> None:
    (host / "main.py").write_text(BUILD)
    command = ["-m", "vlmfilm_plugin", "run", "--mode", "shuffle", "--", sys.executable, "main.py"]
    output = succeed(python(*command, cwd=host, TORCH_DEVICE_BACKEND_AUTOLOAD="0", **SETTINGS))
    assert "['ups', 'vlm_film']" in output and "mode=shuffle" in output


def test_demo_host_is_no_part_of_the_package() -> None:
    assert (DEMO_HOST / "src").is_dir()
    assert not (DEMO_HOST / "__init__.py").exists()
