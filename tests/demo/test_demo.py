"""The learning proof: FiLM from the encoder solves a task that the host alone cannot, and only with the right image's feature."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

import pytest
from processes import forked, python, succeed

from vlmfilm_plugin.demo import run as demo
from vlmfilm_plugin.demo.run import DemoError, run_demo


def prove(on: float, shuffle: float) -> None:
    assert on >= 0.9 and on - shuffle >= 0.3, (on, shuffle)


def test_on_solves_the_task_and_clearly_beats_shuffle(tmp_path: Path) -> None:
    """The demo's FiLM run, of half its steps, in a process of its own, and two of its evaluations in forks."""
    demo._prepare(tmp_path, seed=0, steps=200, quick=False)
    host, variables = tmp_path / "host", {"VLM_FILM_ENCODER": "descriptor", "VLM_FILM_CACHE_DIR": str(tmp_path / "cache")}
    succeed(python("scripts/train.py", "--config", tmp_path / "film.yaml", cwd=host, timeout=1200, VLM_FILM_MODE="on", **variables))
    arguments = ["--data", "angio", "--models", demo.ARCH, "--checkpoint", tmp_path / "runs" / "film" / "checkpoints" / "last.ckpt", "--output"]
    dice = {}
    for mode in ("on", "shuffle"):
        succeed(forked("scripts/evaluate.py", *arguments, tmp_path / mode, cwd=host, VLM_FILM_MODE=mode, **variables))
        dice[mode] = json.loads((tmp_path / mode / "metrics.json").read_text())["dice"]
    prove(dice["on"], dice["shuffle"])


def test_the_whole_demo_runs_every_script_as_a_user_would_and_leaves_the_host_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command that the demo starts runs in a fork; `.ci/run` starts the same ones as processes."""
    commands, said = [], list[str]()

    def run(command: list[str], *, cwd: Path, env: dict[str, str], stdout: IO[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[0] == sys.executable
        ours = {name: value for name, value in env.items() if name.startswith("VLM_F")}
        commands.append((Path(command[1]).stem, ours.get("VLM_FILM_MODE")))
        done = forked(*command[1:], cwd=cwd, **ours)
        stdout.write(done.stdout + done.stderr)
        return done

    monkeypatch.setenv("VLM_FILM_COND_DIM", "the user's own settings are another experiment's")
    monkeypatch.setattr("vlmfilm_plugin.demo.scripts.subprocess.run", run)
    result = run_demo(tmp_path / "demo", quick=True, say=said.append)
    assert sorted(commands, key=str) == sorted(
        [("train", None), ("evaluate", None), ("train", "on"), ("evaluate", "on"), ("evaluate", "off"), ("evaluate", "shuffle")], key=str
    )
    assert list(result.scores) == ["plain", "on", "off", "shuffle"] and all(0 <= score.iou <= score.dice <= 1 for score in result.scores.values())
    assert [line.split()[0] for line in result.table().splitlines()] == ["mode", *result.scores]
    assert result.digest == demo.digest(demo.HOST) and len(result.seconds) == 6 and any("host unmodified" in line for line in said)
    assert "FiLM attached" in (tmp_path / "demo" / "logs" / "train_film.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_on_beats_shuffle_over_three_seeds(tmp_path: Path, seed: int) -> None:
    scores = run_demo(tmp_path / "demo", seed=seed).scores
    prove(scores["on"].dice, scores["shuffle"].dice)


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(DemoError, match="folder is in use"):
        run_demo(tmp_path)
