"""Every file that this package writes is whole under its name, or not there: written beside its place, flushed to the disk, then named.

Where the system can, the unfinished file has no name at all, so that a process that is killed leaves nothing. The user's umask decides
who may read it. Standard library only.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from vlmfilm_plugin.errors import VlmFilmError

_MODE = 0o666  # less the umask
_DESCRIPTORS = "/proc/self/fd"
_NAMELESS = getattr(os, "O_TMPFILE", 0)
# What file systems answer that know no nameless files, or no second name for a file.
_NOT_KNOWN = frozenset({errno.EOPNOTSUPP, errno.EINVAL, errno.EISDIR, errno.ENOENT, errno.ENOSYS, errno.EPERM, errno.EMLINK, errno.EXDEV})
_FREE_SPACE = "free space on the disk, or give another path"
_FIXES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _FREE_SPACE),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "give a path in a folder that you can write"),
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR), "make the folder, or give another path"),
}


@contextmanager
def new_file(
    path: str | os.PathLike[str],
    what: str,
    *,
    inputs: Iterable[str | os.PathLike[str]] = (),
    force: bool = False,
    error: type[VlmFilmError] = VlmFilmError,
) -> Iterator[BinaryIO]:
    """Yield a file that becomes `path` when the block ends; where the block raises, or the process dies, nothing is left and nothing is lost.

    Args:
        path: a symbolic link is followed.
        what: what is written, for messages: "the FiLM weights".
        inputs: the files it is made from; none of them is ever replaced, forced or not.
        force: replace a file that exists.
        error: the class of what is raised.

    Raises:
        `error`: the file exists, is one of `inputs`, or cannot be written (no folder, no right, a full disk).
    """
    refuse_to_replace(path, what, inputs=inputs, force=force, error=error)
    target = _target(path)
    partial: Path | None = None
    try:
        handle, partial = _open(target)
        with os.fdopen(handle, "w+b") as file:
            yield file
            file.flush()
            os.fsync(handle)
            if partial is None and force:
                named = _hidden(target)
                _link(handle, named)
                partial = named
            if partial is None:
                _link(handle, target)
            else:
                _name(partial, target, force)
                partial = None
        _sync_folder(target.parent)
    except VlmFilmError:
        raise
    except Exception as problem:  # writers have errors of their own for a disk that is full
        raise cannot_write(path, what, problem, error) from problem
    finally:
        if partial is not None:
            # What is reported is why the file could not be written.
            with suppress(OSError):
                partial.unlink(missing_ok=True)


def refuse_to_replace(
    path: str | os.PathLike[str],
    what: str,
    *,
    inputs: Iterable[str | os.PathLike[str]] = (),
    force: bool = False,
    error: type[VlmFilmError] = VlmFilmError,
) -> None:
    """Refuse, before any work, a place where `new_file` will not write.

    Raises:
        `error`: as for `new_file`.
    """
    for source in inputs:
        if os.path.exists(path) and os.path.exists(source) and os.path.samefile(path, source):
            facts = {"file": path, "found": f"the same file as {source}, which it is made from", "expected": "another file"}
            raise error(f"cannot write {what}: its input would be lost", facts, "give another path")
    if os.path.exists(path) and not os.path.isfile(path):
        found = "a folder" if os.path.isdir(path) else "a device or a pipe"
        raise error(f"cannot write {what}: its path is {found}", {"file": path, "expected": "a new file"}, "give the path of a file")
    if not force and os.path.lexists(path):
        raise _exists(path, what, error)
    try:
        # Of a folder alone can this be said.
        os.stat(os.path.join(_target(path).parent, os.curdir))
    except OSError as problem:
        raise cannot_write(path, what, problem, error) from problem


def cannot_write(path: object, what: str, problem: Exception, error: type[VlmFilmError] = VlmFilmError) -> VlmFilmError:
    """Return the error that says why a file, or a folder, cannot be written."""
    if isinstance(problem, FileExistsError):
        return _exists(path, what, error)
    system = _from_system(problem)
    said = (system.strerror if system is not None else None) or " ".join(f"{type(problem).__name__}: {problem}".split())
    fix = _FIXES.get((system.errno if system is not None else None) or 0, "look at the disk and the folder, or give another path")
    return error(f"cannot write {what}", {"file": path, "system said": said, "expected": "a place that can be written"}, fix)


def _from_system(problem: BaseException) -> OSError | None:
    """Return what the system said, which a writer's own error may stand before."""
    found: BaseException | None = problem
    while found is not None and not isinstance(found, OSError):
        found = found.__cause__ or found.__context__
    return found


def touch(path: Path) -> None:
    """Make an empty file where there is none, as the umask says; one that cannot be made is left to whoever opens it."""
    with suppress(OSError):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _MODE))


def _exists(path: object, what: str, error: type[VlmFilmError]) -> VlmFilmError:
    return error(
        f"cannot write {what}: the file exists", {"file": path, "expected": "a new file"}, "give another path, or say `--force` (`force=True`)"
    )


def _target(path: str | os.PathLike[str]) -> Path:
    # As it was given, where that will do: a folder may be reached from the working directory alone.
    return Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)


def _hidden(target: Path) -> Path:
    return target.with_name(f".vlmfilm-{secrets.token_hex(8)}.partial")


def _open(target: Path) -> tuple[int, Path | None]:
    """Open a new file in the folder of `target`: without a name, or else hidden under the name that is returned."""
    if _NAMELESS and os.path.isdir(_DESCRIPTORS):
        try:
            return os.open(target.parent, os.O_RDWR | _NAMELESS, _MODE), None
        except OSError as problem:
            if problem.errno not in _NOT_KNOWN:
                raise
    partial = _hidden(target)
    return os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, _MODE), partial


def _link(handle: int, name: Path) -> None:
    """Give a nameless file its name; FileExistsError where that is taken."""
    # With a folder's descriptor, even one that is not needed, the system follows the link to the file itself.
    folder = os.open(name.parent, os.O_RDONLY)
    try:
        os.link(f"{_DESCRIPTORS}/{handle}", name.name, src_dir_fd=folder, dst_dir_fd=folder)
    finally:
        os.close(folder)


def _name(partial: Path, target: Path, force: bool) -> None:
    """Give a hidden file its name; unless forced, FileExistsError where that was taken meanwhile."""
    if force:
        os.replace(partial, target)
        return
    try:
        os.link(partial, target)
    except OSError as problem:
        if problem.errno not in _NOT_KNOWN:
            raise
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from problem
        os.replace(partial, target)
        return
    partial.unlink()


def _sync_folder(folder: Path) -> None:
    # The file is whole and has its name; some systems cannot flush a folder.
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
