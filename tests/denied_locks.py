"""A process in which every lock on a file is answered with ENOLCK by the kernel itself, as some network file systems do."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _FILTER = 38, 22, 2
_LOAD, _EQUALS, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _ERROR = 0x7FFF_0000, 0x0005_0000
_FCNTL, _LOCKS = 72, (6, 7)  # F_SETLK, F_SETLKW
_NUMBER, _SECOND_ARGUMENT = 0, 24


def deny_locks() -> bool:
    """Deny locks to this process for good; False where that cannot be done."""
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        return False
    program = [
        (_LOAD, 0, 0, _NUMBER),
        (_EQUALS, 0, 3, _FCNTL),
        (_LOAD, 0, 0, _SECOND_ARGUMENT),
        (_EQUALS, 2, 0, _LOCKS[0]),
        (_EQUALS, 1, 0, _LOCKS[1]),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _ERROR | errno.ENOLCK),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
    filters = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))
    system = ctypes.CDLL(None)
    return system.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 and system.prctl(_PR_SET_SECCOMP, _FILTER, filters, 0, 0) == 0
