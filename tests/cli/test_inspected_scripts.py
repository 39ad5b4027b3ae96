"""`vlmfilm inspect` on scripts of a repo that nobody knows: what is said, what is left behind, and the host adapter that it writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import environment, python

sys.path.append(str(Path(__file__).parents[1] / "inspection"))
import small_repo

PYTHON = sys.executable


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_repo.make(tmp_path_factory.mktemp("repo"))


def inspect(repo: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return python("-m", "vlmfilm_plugin", "inspect", *arguments, cwd=repo, **variables)


def seen(repo: Path, *command: str) -> dict[str, Any]:
    done = inspect(repo, "--json", "--", PYTHON, *command)
    assert done.returncode == 0, done.stderr
    content: dict[str, Any] = json.loads(done.stdout)
    return content


def left_in(repo: Path) -> set[str]:
    return {path.name for path in repo.iterdir() if path.suffix in (".txt", ".pt")}


@pytest.mark.parametrize("arguments", [("0",), ("2",), ("0", "noise")])
def test_a_script_is_ended_after_its_first_real_forward_and_nothing_of_it_runs_any_more(repo: Path, arguments: tuple[str, ...]) -> None:
    before = left_in(repo)
    found = seen(repo, "loop.py", *arguments)
    # What it wrote until then is there; no `finally`, no `except`, no handler at exit has run.
    assert left_in(repo) - before <= {"started.txt"}
    (unet,) = found["unets"]
    assert unet["class"] == "nets:Net"
    assert [(stage["paths"], stage["channels"], stage["size"]) for stage in unet["stages"]] == [(["up.0"], 6, [16, 16]), (["up.1"], 4, [32, 32])]
    run = found["run"]
    assert run["rows"]["named_by"] == "file" and "data/image" in run["rows"]["why"]
    assert run["condition"] == {"in": "x", "proved": True}
    assert run["callers"][-1]["name"] == "__main__:main"
    assert run["optimizers"][0].startswith("torch.optim.adam.Adam at loop.py:")


def test_images_among_the_channels_of_a_tensor_are_found_in_the_step_and_in_the_unet(repo: Path) -> None:
    run = seen(repo, "diffusion.py")["run"]
    assert run["step"]["name"] == "trainer:Trainer.step" and run["step"]["phases"] == {"step": "train"}
    assert (run["image"], run["condition"]) == ("both[:, 0:3]", {"in": "x[:, 0:3]", "proved": True})


def test_the_steps_of_a_lightning_module_are_found_in_its_sanity_check(repo: Path) -> None:
    run = seen(repo, "lightning_run.py")["run"]
    assert run["step"]["name"] == "lit:Lit.validation_step"
    assert run["step"]["phases"] == {"training_step": "train", "validation_step": "val"}
    assert run["image"] == "batch[0]" and not (repo / "lit_runs").exists()


def test_a_process_that_a_script_spawned_ends_the_script_as_well(repo: Path) -> None:
    assert seen(repo, "spawned.py")["unets"][0]["class"] == "nets:Net"
    assert not (repo / "after.txt").exists() and not (repo / "net.pt").exists()


def test_a_compiled_net_is_seen_uncompiled(repo: Path) -> None:
    assert seen(repo, "compiled.py")["unets"][0]["class"] == "nets:Net"
    assert not (repo / "after.txt").exists()


@pytest.mark.parametrize(("script", "step"), [("loop.py", "in_call"), ("diffusion.py", "module.Trainer"), ("lightning_run.py", "module.Lit")])
def test_the_written_host_adapter_runs_at_once_and_off_is_the_plain_script(repo: Path, tmp_path: Path, script: str, step: str) -> None:
    command = [PYTHON, script, *(["0"] if script == "loop.py" else [])]
    out = tmp_path / "vlmfilm_adapter.py"
    written = inspect(repo, "-o", str(out), "--", *command)
    assert written.returncode == 0, written.stderr
    assert step in out.read_text() and f"VLM_FILM_HOSTS={out}" in written.stderr
    weights = {}
    for mode in ("plain", "off", "on"):
        film = {"VLM_FILM_MODE": mode, "VLM_FILM_HOSTS": str(out), "VLM_FILM_CACHE_DIR": str(tmp_path / mode)} if mode != "plain" else {}
        # Statistics of features need eight images; without them FiLM acts from the first step on.
        more = {"VLM_FILM_ENCODER": "descriptor", "VLM_FILM_FEATURE_TRANSFORM": "none", "VLM_FILM_GAMMA_SCALE": "null"} if film else {}
        done = subprocess.run(command, cwd=repo, env=environment(**film, **more), capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        if mode != "plain":
            assert "[VLM] FiLM attached" in done.stdout and "stages=0 (up.0, 6), 1 (up.1, 4)" in done.stdout
        if mode == "on":
            assert "cache_key_source: file" in done.stdout
        found = [*repo.glob("net.pt"), *repo.rglob("lit_runs/**/*.ckpt")]
        assert len(found) == 1, found
        weights[mode] = torch.load(found[0], weights_only=False)
        found[0].unlink()
    plain, off, on = (each.get("state_dict", each) for each in weights.values())
    assert all(torch.equal(plain[name], off[name]) for name in plain)
    assert any(not torch.equal(plain[name], on[name]) for name in plain)


def test_a_file_is_never_written_over_and_the_script_not_run_for_it(repo: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine.py"
    out.write_text("# mine\n")
    (repo / "started.txt").unlink(missing_ok=True)
    done = inspect(repo, "-o", str(out), "--", PYTHON, "loop.py", "0")
    assert done.returncode == 2 and "the file exists" in done.stderr
    assert out.read_text() == "# mine\n" and not (repo / "started.txt").exists()
    assert inspect(repo, "-o", str(tmp_path / "a.yaml"), "--", PYTHON, "loop.py", "0").returncode == 2


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("raises.py", ["which raised ValueError: no data today", "exit code 1"]),
        ("ends.py", ["up to its end", "no UNet was called"]),
        ("no_torch.py", ["which never imported torch"]),
        ("classifier.py", ["before the first update of SGD", "seen in Sequential"]),
    ],
)
def test_a_script_without_a_unet_says_what_was_seen_and_exits_with_1(repo: Path, script: str, words: list[str]) -> None:
    done = inspect(repo, "--", PYTHON, script)
    assert done.returncode == 1
    assert all(word in done.stdout for word in words), done.stdout
    assert not (repo / "updated.txt").exists()


def test_the_mode_of_the_shell_does_not_reach_the_script(repo: Path) -> None:
    done = inspect(repo, "--json", "--", PYTHON, "loop.py", "0", VLM_FILM_MODE="on")
    assert done.returncode == 0 and "FiLM" not in done.stderr
    assert "is no variable" not in done.stderr


def test_a_factory_is_looked_at_twice_alike_and_makes_a_host_adapter_of_the_unet_alone(repo: Path, tmp_path: Path) -> None:
    first, again = (inspect(repo, "nets:build", "--input", "1,3,32,32", "--json") for _ in range(2))
    assert first.returncode == 0 and first.stdout == again.stdout
    assert json.loads(first.stdout)["unets"][0]["stages"][1] == {"index": 1, "paths": ["up.1"], "channels": 4, "size": [32, 32]}
    out = tmp_path / "a.py"
    named = inspect(repo, "nets:build", "--input", "x=1,3,32,32", "--input", "t=1:int64", "-o", str(out))
    assert named.returncode == 0 and "0      16x16" in named.stdout
    assert "steps=" not in out.read_text()
    compile(out.read_text(), out, "exec")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nets:buidl", "--input", "1,3,32,32"), ["cannot find the factory", "build"]),
        (("no_such_module:build",), ["cannot import", "no_such_module"]),
        (("nets:nothing",), ["returned no module", "a int"]),
        (("nets:broken",), ["the factory raised", "no weights here"]),
        (("nets:build", "--input", "1,2,32,32"), ["forward raised", "expected input[1, 2, 32, 32] to have 3 channels", "(1, 2, 32, 32) float32"]),
        (("nets:build", "--input", "1;3"), ["cannot read --input", "'1;3'"]),
        (("nets:build", "--input", "1,3:int7"), ["cannot read --input"]),
        ((), ["nothing to inspect"]),
        (("--input", "1,1", "--", PYTHON, "loop.py"), ["cannot use --input"]),
        (("--", "no-such-program"), ["cannot run the command"]),
    ],
)
def test_bad_input_is_an_error_that_says_what_and_what_to_do(repo: Path, arguments: tuple[str, ...], words: list[str]) -> None:
    done = inspect(repo, *arguments)
    assert done.returncode == 2 and "fix:" in done.stderr
    assert all(word in done.stderr for word in words), done.stderr


def test_help_has_examples() -> None:
    assert "vlmfilm inspect -o vlmfilm_adapter.py -- python train.py" in python("-m", "vlmfilm_plugin", "inspect", "--help").stdout
