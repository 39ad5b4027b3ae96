"""Ctrl-C: one line that says what is stored and how to go on, exit code 130, and the next run goes on."""

from __future__ import annotations

import os
import pty
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import environment

from vlmfilm_plugin.demo.folder import UNFINISHED

PATIENCE = 120


class Command:
    """A running `vlmfilm` command."""

    def __init__(self, folder: Path, *arguments: str, **variables: str) -> None:
        command = [sys.executable, "-u", "-m", "vlmfilm_plugin", *arguments]
        env = environment(**variables)
        # A suite that runs in the background ignores Ctrl-C, and so would its children.
        before = signal.signal(signal.SIGINT, signal.SIG_DFL)
        try:
            self.process = subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        finally:
            signal.signal(signal.SIGINT, before)

    def wait_for(self, happened: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE
        while not happened():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < end
            time.sleep(0.01)

    def end(self, number: int = signal.SIGINT) -> tuple[int, str, list[str]]:
        self.process.send_signal(number)
        stdout, stderr = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, stdout, stderr.splitlines()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    started: list[Command] = []

    def start(*arguments: str, **variables: str) -> Command:
        started.append(Command(tmp_path, *arguments, **variables))
        return started[-1]

    yield start
    for command in started:
        if command.process.poll() is None:
            command.process.kill()
        command.process.communicate()


def stored(folder: Path) -> int:
    file = folder / "cache" / "features.sqlite"
    if not file.is_file():
        return 0
    try:
        with sqlite3.connect(file) as connection:
            (count,) = connection.execute("SELECT count(*) FROM features").fetchone()
            return int(count)
    except sqlite3.OperationalError:  # its tables are not made yet, or it is locked
        return 0


def test_a_warm_up_says_what_is_stored_and_the_next_one_goes_on(tmp_path: Path, start: Callable[..., Command]) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number, picture in enumerate(np.random.default_rng(0).integers(0, 256, (400, 48, 48), dtype=np.uint8)):
        Image.fromarray(picture).save(images / f"{number}.png")
    arguments = ("warmup", "images", "--batch-size", "4", "--no-progress", "--set", "encoder=descriptor", "--set", "cache_dir=cache")
    command = start(*arguments)
    command.wait_for(lambda: stored(tmp_path) > 40)
    code, stdout, stderr = command.end()
    assert (code, stdout) == (130, "")
    (line,) = stderr
    found = re.fullmatch(r"vlmfilm warmup: interrupted: (\d+) of 400 images are stored in (\S+); the same command goes on from there", line)
    assert found is not None and Path(found[2]) == tmp_path / "cache" / "features.sqlite"
    count = stored(tmp_path)
    assert 40 < count < 400 and count - 4 <= int(found[1]) <= count
    again = start(*arguments, "--json")
    stdout, stderr = again.process.communicate(timeout=PATIENCE)
    assert again.process.returncode == 0 and f'"hits": {count}' in stdout and f'"encoded": {400 - count}' in stdout, stderr


def test_a_command_interrupted_before_it_did_anything_says_so_too(tmp_path: Path, start: Callable[..., Command]) -> None:
    os.mkfifo(tmp_path / "list.csv")  # it waits for its list
    command = start("warmup", "list.csv", "--set", "encoder=descriptor")
    command.wait_for(lambda: "pipe" in os.readlink(f"/proc/{command.process.pid}/fd/1") and _waits(command.process.pid))
    code, stdout, stderr = command.end()
    assert (code, stdout) == (130, "")
    assert stderr == ["vlmfilm warmup: interrupted: what was encoded is stored; the same command goes on from there"]


def _waits(pid: int) -> bool:
    return Path(f"/proc/{pid}/wchan").read_text().startswith("wait_for_partner")


def test_an_interrupted_demo_is_run_again_and_two_never_share_a_folder(tmp_path: Path, start: Callable[..., Command]) -> None:
    log = tmp_path / "demo" / "logs" / "train_plain.log"
    arguments = ("demo", "--folder", "demo", "--quick")
    first = start(*arguments)
    first.wait_for(log.exists)
    second = start(*arguments)
    assert second.process.wait(PATIENCE) == 1
    assert "another demo that is running" in second.process.communicate()[1]
    code, _, stderr = first.end()
    assert code == 130
    assert stderr == ["vlmfilm demo: interrupted: what there is lies in demo; the same command starts over there"]
    # Killed outright, too: but while its training goes on the folder is in use.
    (tmp_path / "demo" / "runs").mkdir(exist_ok=True)
    (tmp_path / "demo" / "runs" / "old").touch()
    third = start(*arguments)
    third.wait_for(lambda: not (tmp_path / "demo" / "runs" / "old").exists() and log.exists())
    third.end(signal.SIGKILL)
    fourth = start(*arguments)
    if fourth.process.wait(PATIENCE) == 1:  # the orphan was still at it
        assert "another demo that is running" in fourth.process.communicate()[1]
    (tmp_path / "demo" / "mine.txt").touch()
    fifth = start(*arguments)
    assert fifth.process.wait(PATIENCE) == 1
    assert "mine.txt" in fifth.process.communicate()[1] and (tmp_path / "demo" / UNFINISHED).exists()


SLEEP = "import time; print('ready', flush=True); time.sleep(100)"


def test_run_passes_signals_and_exit_codes_on(tmp_path: Path, start: Callable[..., Command]) -> None:
    def run(code: str, **variables: str) -> Command:
        return start("run", "--", sys.executable, "-u", "-c", code, **variables)

    command = run(SLEEP)
    assert command.process.stdout is not None and command.process.stdout.readline() == "ready\n"
    code, _, stderr = command.end()
    assert code == 130 and stderr[-1].startswith("vlmfilm run: interrupted: features that were encoded are stored")
    assert len([line for line in stderr if line.startswith("vlmfilm")]) == 1 and stderr[-2] == "KeyboardInterrupt"
    command = run(SLEEP)
    assert command.process.stdout is not None and command.process.stdout.readline() == "ready\n"
    assert command.end(signal.SIGTERM) == (143, "", [])
    assert run("raise SystemExit(3)").process.wait(PATIENCE) == 3
    # A command that took Ctrl-C and ended well was not ended by it.
    command = run(f"try:\n    {SLEEP.replace('; ', chr(10) + '    ')}\nexcept KeyboardInterrupt:\n    pass")
    assert command.process.stdout is not None and command.process.stdout.readline() == "ready\n"
    assert command.end() == (0, "", [])
    # Nothing of it outlives a kill.
    command = run(f"import os; print(os.getpid(), flush=True); {SLEEP}")
    assert command.process.stdout is not None
    child = int(command.process.stdout.readline())
    assert child != command.process.pid
    command.end(signal.SIGKILL)
    end = time.monotonic() + PATIENCE
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text():
        assert time.monotonic() < end
        time.sleep(0.01)
    # A scheduler signals every process of a job by itself: there it becomes the command.
    command = run("import os; print(os.getpid())", SLURM_JOB_ID="1")
    assert int(command.process.communicate(timeout=PATIENCE)[0]) == command.process.pid
    assert start("run", "--", str(tmp_path / "none")).process.wait(PATIENCE) == 127


COUNT = """
import signal, time
seen = []
signal.signal(signal.SIGINT, lambda *_: seen.append(1))
print("ready", flush=True)
end = time.monotonic() + 100
while not seen and time.monotonic() < end:
    time.sleep(0.01)
time.sleep(0.5)
print("seen", len(seen), flush=True)
raise SystemExit(7)
"""


def test_ctrl_c_at_a_terminal_reaches_the_command_once() -> None:
    child, terminal = pty.fork()
    if child == 0:
        os.execve(sys.executable, [sys.executable, "-m", "vlmfilm_plugin", "run", "--", sys.executable, "-c", COUNT], environment())
    said = b""
    while b"ready" not in said:
        said += os.read(terminal, 1000)
    os.write(terminal, b"\x03")
    try:
        while data := os.read(terminal, 1000):
            said += data
    except OSError:  # the terminal's other end is closed
        pass
    _, status = os.waitpid(child, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 130
    assert b"seen 1\r\n" in said and said.count(b"vlmfilm run: interrupted") == 1
