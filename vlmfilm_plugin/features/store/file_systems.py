"""What the file system under a store can do: grant locks, share memory between processes, and whether other machines see the same files.

SQLite reports a file system that grants no locks as another process that holds one; only a lock that is tried tells them apart.
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: its locks are part of every open file
    fcntl = None  # type: ignore[assignment]

# SQLite's readers lock bytes of this range; one of them alone stops no other reader.
_SHARED_BYTE = 0x4000_0002
_HELD_BY_ANOTHER = frozenset({errno.EACCES, errno.EAGAIN})
# Memory that is mapped on one machine is not seen on the next.
_SHARED_BETWEEN_MACHINES = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "gpfs", "beegfs", "ceph", "afs", "orangefs", "pvfs2", "panfs", "9p", "virtiofs", "vboxsf"}
)
_MOUNTS = Path("/proc/self/mountinfo")


def lock_problem(handle: int) -> OSError | None:
    """Return why the system grants no lock on an open file, or None where it does, or another process holds it."""
    if fcntl is None:
        return None
    try:
        fcntl.lockf(handle, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, _SHARED_BYTE)
        fcntl.lockf(handle, fcntl.LOCK_UN, 1, _SHARED_BYTE)
    except OSError as problem:
        return None if problem.errno in _HELD_BY_ANOTHER else problem
    return None


def lock_problem_in(folder: Path) -> OSError | None:
    """Return why no file of a folder can be locked; None where one can, or nothing can be tried."""
    # On a file of its own: to close a second handle of the store's file would end all locks that this process has on it.
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return lock_problem(file.fileno())
    except OSError:
        return None


def shares_memory(folder: Path) -> bool:
    """Tell whether all processes that use files of a folder see each other's mapped memory, as SQLite's write-ahead log needs."""
    if type_of(folder) in _SHARED_BETWEEN_MACHINES or type_of(folder).startswith("fuse"):
        return False
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.truncate(mmap.PAGESIZE)
            mmap.mmap(file.fileno(), mmap.PAGESIZE).close()
    except PermissionError:
        return True  # nothing can be tried, and nothing will be written
    except OSError:
        return False
    return True


def type_of(folder: Path) -> str:
    """Return the type of the file system that a folder is on, such as `ext4` or `nfs4`; empty where the system does not say."""
    try:
        lines = _MOUNTS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    place, found, longest = os.path.realpath(folder), "", -1
    for line in lines:
        head, _, tail = line.partition(" - ")
        try:
            point, kind = head.split()[4].replace("\\040", " "), tail.split()[0]
        except IndexError:
            continue
        # Of two mounts at one place the later one is seen.
        if len(point) >= longest and (place == point or place.startswith(point.rstrip("/") + "/")):
            found, longest = kind, len(point)
    return found
