"""A fork of the zygote behaves as a process that was started does: what the tests that use it prove, a user's process would show."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import Fork, environment, forked, succeed

ENDS = {
    "returns": "print('out'); import sys; print('err', file=sys.stderr)",
    "exits with a number": "import sys; sys.exit(3)",
    "exits with a text": "raise SystemExit('vlmfilm: said at the end')",
    "exits with nothing": "raise SystemExit",
    "raises": "1 / 0",
    "raises, and a function at exit reads what": "import atexit, sys; atexit.register(lambda: print(repr(sys.last_value))); [][1]",
    "is killed": "import os, signal; print('lost?', flush=True); os.kill(os.getpid(), signal.SIGKILL)",
    "exits at once": "import atexit, os; atexit.register(print, 'never'); os._exit(7)",
    "waits for its threads": "import threading, time; threading.Thread(target=lambda: (time.sleep(0.2), print('thread'))).start(); print('main')",
    "speaks at exit": "import atexit; atexit.register(print, 'first'); atexit.register(print, 'last'); print('now')",
}


def real(*arguments: str, cwd: Path, **variables: str | None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment(**variables), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)


def outcome(result: subprocess.CompletedProcess[str]) -> tuple[int, str, str]:
    # A traceback's last line; those before it name this file's frames.
    return result.returncode, result.stdout, "".join(result.stderr.splitlines()[-1:])


@pytest.mark.parametrize("code", ENDS.values(), ids=ENDS)
def test_a_fork_ends_as_a_process_does(code: str, tmp_path: Path) -> None:
    assert outcome(forked("-c", code, cwd=tmp_path)) == outcome(real("-c", code, cwd=tmp_path))


SELF = """
import json, os, sys
names = "GIVEN", "HOME", "OMP_NUM_THREADS", "VLM_FILM_COND_DIM"
facts = [{name: os.environ.get(name) for name in names}, os.getcwd(), sys.argv, __name__, sys.path[:2], os.read(0, 1).decode(), sys.stdout.isatty()]
print(json.dumps(facts), sorted(name for name in globals() if not name.startswith("__")))
"""


@pytest.mark.parametrize("arguments", [["script.py", "--a", "b"], ["-m", "script", "x"], ["-c", SELF, "--a"]], ids=["script", "-m", "-c"])
def test_a_fork_has_the_environment_folder_arguments_and_path_of_a_process(tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "script.py").write_text(SELF)
    (tmp_path / "given").mkdir()
    variables = {"GIVEN": "yes", "PYTHONPATH": str(tmp_path / "given"), "HOME": None}
    expected = succeed(real(*arguments, cwd=tmp_path, **variables))
    assert str(tmp_path / "given") in expected
    # Once more after another: nothing of a command is left for the next.
    assert [succeed(forked(*arguments, cwd=tmp_path, **variables)) for _ in range(2)] == [expected, expected]


STATE = """
import json, sys, threading, torch
ours = sorted(name for name in sys.modules if name.startswith(("vlmfilm", "src")))
activation = sys.modules.get("vlmfilm_plugin.hosts.activation")
state = None if activation is None else [activation.current().mode, sorted(activation.current().late), activation.current().seen]
print(json.dumps([ours, state, threading.active_count(), torch.get_num_threads()]))
"""


@pytest.mark.parametrize("mode", [None, "shuffle"])
def test_a_fork_is_activated_or_dormant_as_a_process_that_has_just_imported_torch(tmp_path: Path, mode: str | None) -> None:
    expected, found = (json.loads(succeed(run("-c", STATE, cwd=tmp_path, VLM_FILM_MODE=mode))) for run in (real, forked))
    assert found == expected
    assert expected[1] == (None if mode is None else [mode, [], {}])


def test_two_forks_draw_other_numbers_as_two_processes_do() -> None:
    code = "import numpy, random, torch; print([torch.initial_seed(), torch.rand(1).item(), numpy.random.rand(), random.random()])"
    one, other = (json.loads(succeed(forked("-c", code))) for _ in range(2))
    assert not set(one) & set(other)


def test_forks_run_side_by_side_and_one_that_does_not_end_is_ended(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    # Each waits for what the other writes.
    wait = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).touch()\nwhile not pathlib.Path(sys.argv[2]).exists(): time.sleep(0.01)"
    forks = [Fork(["-c", wait, f"{own}/is", f"{other}/is"], tmp_path / own, tmp_path) for own, other in (("a", "b"), ("b", "a"))]
    assert [fork.wait(60) for fork in forks] == [0, 0]
    endless = Fork(["-c", "import time; print('here', flush=True); time.sleep(600)"], tmp_path, tmp_path)
    while not endless.stdout.exists() or endless.stdout.read_text() != "here\n":
        with pytest.raises(TimeoutError):
            endless.wait(0.01)
    endless.kill()
    assert endless.wait(0) == -signal.SIGKILL
    with pytest.raises(subprocess.TimeoutExpired):
        forked("-c", "import time; time.sleep(600)", timeout=0.1)
    assert succeed(forked("-c", "print(1)")) == "1\n"


def test_a_variable_that_was_read_before_the_fork_is_refused() -> None:
    with pytest.raises(ValueError, match="HF_HOME: read before the fork"):
        forked("-c", "", HF_HOME="/elsewhere")
