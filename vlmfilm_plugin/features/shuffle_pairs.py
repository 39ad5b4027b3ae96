"""The file that mode `shuffle` writes its pairing to: one line `image,donor,step` for each conditioned image, as CSV without a header."""

from __future__ import annotations

import csv
import io
import threading
from collections.abc import Iterable

from vlmfilm_plugin.errors import StoreError
from vlmfilm_plugin.log import is_rank_zero


class PairsFile:
    """Append pairs to a file; rank zero alone. Without a path it writes nothing.

    Every batch is one write to the operating system, with nothing kept back: a run that is killed loses no line and cuts none.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = path
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[object, ...]:
        return PairsFile, (self.path,)

    def write(self, pairs: Iterable[tuple[object, object]], step: int) -> None:
        """Append (image, donor) pairs of a step.

        Raises:
            StoreError: the file cannot be written.
        """
        if self.path is None or not is_rank_zero():
            return
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows((image, donor, step) for image, donor in pairs)
        try:
            with self._lock, open(self.path, "ab") as file:
                file.write(text.getvalue().encode("utf-8", "surrogatepass"))
        except OSError as error:
            facts = {"file": self.path, "system said": error.strerror or str(error), "expected": "a file in a folder that exists and can be written"}
            raise StoreError("cannot write the pairs of mode shuffle", facts, "correct `shuffle_pairs_file`, or take it out") from error
