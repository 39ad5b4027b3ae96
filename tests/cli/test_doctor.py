"""`vlmfilm doctor`: its line, its exit code and what really happens agree."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import python, succeed

from vlmfilm_plugin.cli import doctor, main


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("VLM_FILM_MODE", "TORCH_DEVICE_BACKEND_AUTOLOAD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("variables", "state", "problem"),
    [
        ({}, "dormant", None),
        ({"VLM_FILM_MODE": "shuffle"}, "active, mode shuffle", None),
        ({"VLM_FILM_ENCODER": "descriptor"}, "dormant", None),
        ({"VLM_FILM_MODE": "on", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}, "NOT active, although VLM_FILM_MODE is set", "vlmfilm run"),
        ({"VLM_FILM_MODE": "on", "TORCH_DEVICE_BACKEND_AUTOLOAD": "true"}, "NOT active, although VLM_FILM_MODE is set", "AUTOLOAD=true"),
        ({"VLM_FILM_MODE": "on", "TORCH_DEVICE_BACKEND_AUTOLOAD": ""}, "NOT active, although VLM_FILM_MODE is set", "vlmfilm run"),
        ({"VLM_FILM_MODE": "on", "TORCH_DEVICE_BACKEND_AUTOLOAD": "1"}, "active, mode on", None),
        ({"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}, "dormant (TORCH_DEVICE_BACKEND_AUTOLOAD=0 keeps torch from starting the plugin", None),
        ({"VLM_FILM_MODE": "yes"}, "NOT active, although VLM_FILM_MODE is set", "not a mode"),
        ({"VLM_FILM_MODE": ""}, "NOT active, although VLM_FILM_MODE is set", "not a mode"),
        ({"VLM_FILM_MOD": "on"}, "dormant", "did you mean VLM_FILM_MODE?"),
        ({"VLM_FILM_MODE": "on", "vlm_film_encoder": "hf"}, "active, mode on", "did you mean VLM_FILM_ENCODER?"),
    ],
)
def test_the_line_and_the_exit_code_agree(
    variables: dict[str, str], state: str, problem: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code = main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(f"activation: {state}") for line in lines), lines
    said = "\n".join(lines[next(number for number, line in enumerate(lines) if line.startswith("problems:")) :])
    assert (code == 0) is ("problems:   none" in said) is (problem is None)
    assert problem is None or problem in said


@pytest.mark.parametrize("value", ["0", "true", ""])
def test_what_torch_takes_for_off_starts_nothing(value: str) -> None:
    code = "import sys, torch; print([name for name in sys.modules if 'vlmfilm' in name])"
    assert succeed(python("-c", code, VLM_FILM_MODE="on", TORCH_DEVICE_BACKEND_AUTOLOAD=value)) == "[]\n"


def test_metadata_that_a_killed_pip_left_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor.sysconfig, "get_path", lambda _: str(tmp_path))
    assert doctor.examine()["problems"] == []
    (tmp_path / "~lmfilm_plugin-0.1.0.dist-info").mkdir()
    (problem,) = doctor.examine()["problems"]
    assert "delete this folder" in problem
