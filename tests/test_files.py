"""Files that are written: whole under their name or not there, never over another file or an input, readable as the umask says."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import environment

from vlmfilm_plugin import files
from vlmfilm_plugin.errors import CheckpointError, StoreError
from vlmfilm_plugin.files import new_file, refuse_to_replace

WAYS = ["nameless", "hidden", "no links"]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the file system can do: files without a name, or hidden ones with or without a second name."""
    way: str = request.param
    if way != "nameless":
        monkeypatch.setattr(files, "_NAMELESS", 0)
    if way == "no links":

        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
    return way


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def write(path: Path, data: bytes = b"new", **options: object) -> None:
    with new_file(path, "the thing", **options) as file:  # type: ignore[arg-type]
        file.write(data)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_there_when_the_block_ends_and_not_before(way: str, tmp_path: Path) -> None:
    target = tmp_path / "out"
    with new_file(target, "the thing") as file:
        file.write(b"half")
        assert not target.exists()
        assert names(tmp_path) == [] or way != "nameless"
    assert (target.read_bytes(), names(tmp_path)) == (b"half", ["out"])


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, ZeroDivisionError, OSError(errno.ENOSPC, "No space left on device")])
def test_a_block_that_is_left_by_an_exception_leaves_nothing(way: str, tmp_path: Path, stop: BaseException) -> None:
    (tmp_path / "old").write_bytes(b"old")
    for name, force in (("new", False), ("old", True)):
        with pytest.raises(BaseException) as caught, new_file(tmp_path / name, "the thing", force=force, error=StoreError) as file:
            file.write(b"half")
            raise stop
        # What is no error of a writer passes as it is.
        assert caught.type is (stop if stop in (KeyboardInterrupt, SystemExit) else StoreError)
    assert names(tmp_path) == ["old"] and (tmp_path / "old").read_bytes() == b"old"


def test_an_existing_file_stays_unless_forced(way: str, tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"old")
    with pytest.raises(CheckpointError, match="the file exists") as caught:
        write(tmp_path / "out", error=CheckpointError)
    assert "--force" in str(caught.value.fix) and (tmp_path / "out").read_bytes() == b"old"
    write(tmp_path / "out", force=True)
    assert (tmp_path / "out").read_bytes() == b"new" and names(tmp_path) == ["out"]


def test_a_file_that_appears_meanwhile_stays(way: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="the file exists"), new_file(tmp_path / "out", "the thing", error=StoreError) as file:
        file.write(b"new")
        (tmp_path / "out").write_bytes(b"another process")
    assert (tmp_path / "out").read_bytes() == b"another process" and names(tmp_path) == ["out"]


@pytest.mark.parametrize("spelt", ["same", "dots", "symlink", "hard link", "linked folder"])
@pytest.mark.parametrize("force", [False, True])
def test_an_input_is_never_replaced_however_it_is_spelt(tmp_path: Path, spelt: str, force: bool) -> None:
    source = tmp_path / "in" / "last.ckpt"
    source.parent.mkdir()
    source.write_bytes(b"precious")
    (tmp_path / "symlink").symlink_to(source)
    (tmp_path / "hard").hardlink_to(source)
    (tmp_path / "folder").symlink_to(source.parent)
    path = {
        "same": source,
        "dots": tmp_path / "in" / ".." / "in" / "last.ckpt",
        "symlink": tmp_path / "symlink",
        "hard link": tmp_path / "hard",
        "linked folder": tmp_path / "folder" / "last.ckpt",
    }[spelt]
    with pytest.raises(CheckpointError, match="its input would be lost"):
        write(path, inputs=[tmp_path / "other", source], force=force, error=CheckpointError)
    # And the other way round: the input is the link.
    with pytest.raises(CheckpointError, match="its input would be lost"):
        write(source, inputs=[path], force=force, error=CheckpointError)
    assert source.read_bytes() == b"precious"


def test_a_link_is_followed_when_forced(way: str, tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "far" / "real")
    with pytest.raises(StoreError, match="exists"):
        write(tmp_path / "link", error=StoreError)
    write(tmp_path / "link", force=True)
    assert (tmp_path / "far" / "real").read_bytes() == b"new" and (tmp_path / "link").is_symlink()
    (tmp_path / "dangling").symlink_to(tmp_path / "far" / "nothing")
    with pytest.raises(StoreError, match="exists"):
        write(tmp_path / "dangling", error=StoreError)
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(StoreError):
        write(tmp_path / "circle", error=StoreError)
    assert names(tmp_path / "far") == ["real"]


def test_what_is_no_file_is_refused_forced_or_not(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path(os.devnull)):
        for force in (False, True):
            with pytest.raises(StoreError, match="its path is"):
                write(path, force=force, error=StoreError)
    with pytest.raises(StoreError, match="No such file"):
        write(tmp_path / "no" / "out", error=StoreError)
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="Not a directory"):
        refuse_to_replace(tmp_path / "file" / "out", "the thing", error=StoreError)
    with pytest.raises(StoreError, match="cannot write the thing"):
        write(tmp_path / ("x" * 300), error=StoreError)
    write(tmp_path / ("x" * 255))


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600), (0o000, 0o666)])
def test_the_umask_decides_who_may_read(way: str, tmp_path: Path, umask: None, mask: int, mode: int) -> None:
    os.umask(mask)
    write(tmp_path / "new")
    (tmp_path / "old").touch(0o600)
    write(tmp_path / "old", force=True)
    assert [oct(stat.S_IMODE((tmp_path / name).stat().st_mode)) for name in ("new", "old")] == [oct(mode)] * 2


def test_a_full_disk_and_a_folder_without_rights_are_our_error(way: str, tmp_path: Path) -> None:
    """In a child: a limit of the file size stands for the full disk, and another user for the missing right."""
    import resource

    (tmp_path / "closed").mkdir()
    (tmp_path / "closed").chmod(0o555)
    said, out = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        os.chdir(tmp_path)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        os.write(out, _said(Path("big"), b"x" * 5000).encode())
        if os.getuid() == 0:
            os.setuid(65534)
        os.write(out, _said(Path("closed") / "new", b"x").encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(out)
    lines = os.read(said, 10_000).decode().splitlines()
    os.close(said)
    assert [line for line in lines if line.startswith("StoreError")] == ["StoreError: cannot write the thing"] * 2
    assert any("File too large" in line for line in lines) and any("free space" in line for line in lines)
    assert any("Permission denied" in line for line in lines) and any("that you can write" in line for line in lines)
    assert names(tmp_path) == ["closed"] and names(tmp_path / "closed") == []


def _said(path: Path, data: bytes) -> str:
    try:
        write(path, data, error=StoreError)
    except Exception as error:
        return f"{type(error).__name__}: {error}\n"
    return "written\n"


KILLED = """
import sys, time
from vlmfilm_plugin.files import new_file
with new_file(sys.argv[1], "the thing", force=True) as file:
    file.write(b"new" * 100_000)
    file.flush()
    print("half", flush=True)
    time.sleep(60)
"""


def test_a_killed_process_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"old")
    with subprocess.Popen([sys.executable, "-c", KILLED, tmp_path / "out"], stdout=subprocess.PIPE, env=environment()) as process:
        assert process.stdout is not None and process.stdout.readline() == b"half\n"
        process.kill()
    assert (tmp_path / "out").read_bytes() == b"old"
    if sys.platform == "linux" and files._open(tmp_path / "probe")[1] is None:
        assert names(tmp_path) == ["out"]


REPEATED = """
import sys, itertools
from vlmfilm_plugin.files import new_file
print("go", flush=True)
for number in itertools.count():
    with new_file(sys.argv[1], "the thing", force=True) as file:
        file.write(str(number).encode() * 20_000)
"""


def test_killed_at_any_moment_the_file_is_an_old_or_a_new_one_and_whole(tmp_path: Path) -> None:
    target = tmp_path / "out"
    for delay in (0.0, 0.001, 0.003, 0.01, 0.02, 0.05):
        with subprocess.Popen([sys.executable, "-c", REPEATED, target], stdout=subprocess.PIPE, env=environment()) as process:
            assert process.stdout is not None and process.stdout.readline() == b"go\n"
            time.sleep(delay)
            process.kill()
        if target.exists():
            data = target.read_bytes()
            number = data[: len(data) // 20_000]
            assert data == number * 20_000 and number
