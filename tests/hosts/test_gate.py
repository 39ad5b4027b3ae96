"""The gate: names variables that were meant for the plugin and are none, in one line each; imports nothing of ours; never raises."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import vlmfilm_startup as gate  # the module that torch's entry point names
from processes import environment, python, succeed

from vlmfilm_plugin.settings.mode import NOT_SETTINGS
from vlmfilm_plugin.settings.port_names import ACCEPTED
from vlmfilm_plugin.settings.record import ALIASES, FIELDS

CALL = "import vlmfilm_startup; vlmfilm_startup.torch_backend(); vlmfilm_startup.torch_backend()"


def call(code: str = CALL, cwd: Path | None = None, **variables: str) -> list[str]:
    done = python("-c", code, cwd=cwd, **variables)
    succeed(done)
    return done.stderr.splitlines()


def test_it_knows_every_setting_and_every_other_variable_without_importing_them() -> None:
    assert gate.settings_names() == {*FIELDS, *ALIASES, *ACCEPTED}
    assert set(gate.OTHERS) >= NOT_SETTINGS
    done = python("-c", "import sys, vlmfilm_startup as gate; gate.settings_names(); print([n for n in sys.modules if 'vlmfilm_plugin' in n])")
    assert succeed(done) == "[]\n"


@pytest.mark.parametrize(
    ("name", "closest"),
    [
        ("VLM_FILM_MOD", "VLM_FILM_MODE"),
        ("VLM_FILM_MODES", "VLM_FILM_MODE"),
        ("vlm_film_mode", "VLM_FILM_MODE"),
        ("Vlm_Film_Mode", "VLM_FILM_MODE"),
        ("VLMFILM_MODE", "VLM_FILM_MODE"),
        ("VLMFILMMODE", "VLM_FILM_MODE"),
        ("VLM-FILM-MODE", "VLM_FILM_MODE"),
        ("VML_FILM_MODE", "VLM_FILM_MODE"),
        ("VLM_FLIM_MODE", "VLM_FILM_MODE"),
        ("VLM_FILM_ENCODR", "VLM_FILM_ENCODER"),
        ("vlm_film_encoder", "VLM_FILM_ENCODER"),
        ("VLMFILM_CACHE_DIR", "VLM_FILM_CACHE_DIR"),
        ("VLM_FORCE_NO_ACCELERAT", "VLM_FORCE_NO_ACCELERATE"),
        ("VLM_FILM_XYZZYPLUGH", None),
        ("VLM_FILM_", None),
        ("VLM_FILM_\udcff", None),
    ],
)
def test_a_variable_that_looks_like_ours_is_named_with_the_closest_legal_name(name: str, closest: str | None) -> None:
    assert gate.strangers({name: "on", "PATH": "/bin"}) == {name: closest}


def test_what_is_ours_and_what_is_anothers_is_silent() -> None:
    ours = {f"VLM_FILM_{name.upper()}" for name in (*FIELDS, *ALIASES, *ACCEPTED)} | set(gate.OTHERS) | {"VLM_FILM_encoder"}
    others = {"VLM_MODEL", "VLM_MODE", "VLLM_MODE", "FILM_MODE", "FILMSTRIP", "VLM_ENDPOINT", "MODE", "LD_LIBRARY_PATH", "VLM", "FILM", ""}
    assert gate.strangers(dict.fromkeys(ours - {"VLM_FILM_MODE"} | others, "1")) == {}
    assert gate.strangers(dict.fromkeys(ours | others, "1")) == {}
    # With the mode set, the settings refuse an unknown name behind the right prefix; other spellings they never see.
    assert gate.strangers({"VLM_FILM_MODE": "on", "VLM_FILM_ENCODR": "hf", "vlmfilm_encoder": "hf"}) == {"vlmfilm_encoder": "VLM_FILM_ENCODER"}


def test_import_torch_says_it_in_one_line_each_and_stays_dormant() -> None:
    code = "import sys, torch; print([name for name in sys.modules if 'vlmfilm' in name])"
    done = python("-c", code, VLM_FILM_MOD="on", vlm_film_mode="on", VLM_FILM_ENCODER="descriptor")
    assert succeed(done) == "['vlmfilm_startup']\n"
    assert sorted(done.stderr.splitlines()) == [
        f"vlmfilm: {name} is no variable of vlmfilm-plugin, and without VLM_FILM_MODE VLM-FiLM is not active; did you mean VLM_FILM_MODE?"
        for name in ("VLM_FILM_MOD", "vlm_film_mode")
    ]


def test_only_the_process_that_its_user_started_says_it(tmp_path: Path) -> None:
    assert len(call(VLMFILM_MODE="on")) == 1
    assert len(call(VLMFILM_MODE="on", RANK="0", LOCAL_RANK="0")) == 1
    assert call(VLMFILM_MODE="on", LOCAL_RANK="1") == [] and call(VLMFILM_MODE="on", SLURM_PROCID="3") == []
    assert call(VLM_FILM_ENCODER="descriptor", VLM_FILM_CACHE_DIR="x") == []
    spawning = """
import multiprocessing
def work():
    import vlmfilm_startup
    vlmfilm_startup.torch_backend()
    assert vlmfilm_startup.strangers({"VLMFILM_MODE": ""})
"""
    ending = "    child = multiprocessing.get_context('spawn').Process(target=work); child.start(); child.join(); assert child.exitcode == 0\n"
    script = tmp_path / "spawning.py"
    script.write_text(f"{spawning}\nif __name__ == '__main__':\n{ending}")
    done = python(script, VLMFILM_MODE="on")
    assert succeed(done) == "" and done.stderr == ""


def test_it_never_raises_whatever_is_wrong_with_the_process(tmp_path: Path) -> None:
    # Standard error closed, or gone; the package's source not there, or not readable as text.
    closed = subprocess.run(
        ["bash", "-c", f"{sys.executable} -c '{CALL}' 2>&-"], env=environment(VLMFILM_MODE="on"), check=False, capture_output=True, text=True
    )
    assert (closed.returncode, closed.stdout) == (0, "")
    assert call(f"import sys; sys.stderr = None\n{CALL}", VLMFILM_MODE="on") == []
    package = tmp_path / "vlmfilm_plugin"
    (package / "settings").mkdir(parents=True)
    (package / "__init__.py").touch()
    for content in (None, b"\xff\xfe", b""):
        if content is not None:
            (package / "settings" / "record.py").write_bytes(content)
        # What can still be told is.
        (line,) = call(cwd=tmp_path, VLM_FILM_ENCODER="x", VLM_FILM_MOD="on")
        assert line.startswith("vlmfilm: VLM_FILM_MOD is no variable")
    assert call("import os; os.environb[b'VLM_FILM_\\xff'] = b'on'\n" + CALL)[0].startswith(r"vlmfilm: VLM_FILM_\udcff is no variable")


def test_the_first_versions_name_leads_to_the_same_gate() -> None:
    code = "import _vlmfilm_startup as old, vlmfilm_startup as new; print(old.torch_backend is new.torch_backend)"
    assert succeed(python("-c", code)) == "True\n"
