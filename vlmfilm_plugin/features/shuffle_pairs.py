"""The file that mode `shuffle` writes its pairing to: one line `image,donor,step` for each conditioned image, as CSV without a header."""

from __future__ import annotations

import csv
import errno
import io
import os
import threading
from collections.abc import Iterable
from io import FileIO

from vlmfilm_plugin.errors import StoreError
from vlmfilm_plugin.log import is_rank_zero

_HEAD = 4096


class PairsFile:
    """Append pairs to a file; rank zero alone. Without a path it writes nothing.

    Every batch is one write to the operating system, with nothing kept back: a run that is killed loses no line and cuts none. A file that
    holds anything else, a checkpoint say, is never written to; what a full disk cut off is taken back.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = path
        self._is_checked = False
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[object, ...]:
        return PairsFile, (self.path,)

    def write(self, pairs: Iterable[tuple[object, object]], step: int) -> None:
        """Append (image, donor) pairs of a step.

        Raises:
            StoreError: the file holds something else than pairs, or cannot be written.
        """
        if self.path is None or not is_rank_zero():
            return
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows((image, donor, step) for image, donor in pairs)
        try:
            with self._lock, open(self.path, "ab", buffering=0) as file:
                self._check(self.path)
                _append(file, text.getvalue().encode("utf-8", "surrogatepass"))
        except OSError as error:
            facts = {"file": self.path, "system said": error.strerror or str(error), "expected": "a file in a folder that exists and can be written"}
            raise StoreError("cannot write the pairs of mode shuffle", facts, "correct `shuffle_pairs_file`, or take it out") from error

    def _check(self, path: str) -> None:
        if self._is_checked:
            return
        found = _first_strange(path)
        if found is not None:
            facts = {"file": path, "found": found, "expected": "no file, or lines `image,donor,step` that such a run wrote"}
            raise StoreError("cannot write the pairs of mode shuffle: the file holds something else", facts, "give `shuffle_pairs_file` another path")
        self._is_checked = True


def _append(file: FileIO, data: bytes) -> None:
    size = os.fstat(file.fileno()).st_size
    try:
        written = file.write(data)
        if written != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        os.ftruncate(file.fileno(), size)
        raise


def _first_strange(path: str) -> str | None:
    """Return what tells that a file is not one of pairs, or None: its beginning, or a last line that was never ended."""
    if not os.path.isfile(path):
        return "a device or a pipe"
    with open(path, "rb") as file:
        head = file.read(_HEAD)
        if not head:
            return None
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            return "a last line without an end"
    try:
        # A long name may be cut at the end of the head, within its quotes or a letter.
        lines = list(csv.reader(io.StringIO(head.decode("utf-8", "surrogatepass" if len(head) < _HEAD else "replace"), newline="")))
    except (csv.Error, UnicodeDecodeError):
        return "no text"
    whole = lines[:-1] if len(head) == _HEAD else lines
    strange = next((line for line in whole if len(line) != 3 or not line[-1].isdecimal()), None)
    return None if strange is None else f"the line {','.join(strange)[:80]!r}"
