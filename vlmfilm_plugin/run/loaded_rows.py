"""The files of a batch's rows as the row ledger knows them, and the rule that one run has one kind of feature.

A feature of a whole file and a feature of the pixels a host passes are of different kinds: trained on one and evaluated on the other, FiLM
is no experiment.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from torch import Tensor

from vlmfilm_plugin.errors import ConditionError
from vlmfilm_plugin.features.samples import Sample
from vlmfilm_plugin.rows.data_set_items import VOLUMES
from vlmfilm_plugin.rows.ledger import Ledger, RowFiles

FILE, CONTENT = "file", "content"
_KINDS = {FILE: "of whole image files", CONTENT: "of the pixels that the host passes"}


class LoadedRows:
    """What the ledger says of one batch, asked once, and only where the batch itself does not say enough.

    Args:
        tensor: the images as the data loader gave them (B, ...).
    """

    def __init__(self, ledger: Ledger, tensor: Tensor) -> None:
        self._ledger, self._tensor = ledger, tensor

    @cached_property
    def found(self) -> RowFiles:
        found = self._ledger.files_of(self._tensor)
        volume = next((path for path in found.paths if path is not None and path.name.lower().endswith(VOLUMES)), None)
        if volume is None:
            return found
        why = f"{volume} is a volume or an array: which pixels of it an encoder shall see is for the host adapter to say"
        return RowFiles(tuple([None if path is None or path.name.lower().endswith(VOLUMES) else path for path in found.paths]), why)

    def paths(self) -> Sequence[Path | None]:
        """Return the image file of each row, or None."""
        return self.found.paths

    @property
    def is_expected(self) -> bool:
        """Tell whether rows should have files: data loaders gave batches in this process."""
        return self._ledger.is_used


class RowKinds:
    """Which kind of feature each FiLM module, its copies included, is trained and evaluated on."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[str, bool], str] = {}

    def trained_on(self, film_id: str) -> str | None:
        """Return the kind of feature that a module was trained on, or None."""
        return self._kinds.get((film_id, True))

    def recorded(self, film_id: str, kind: object) -> None:
        """Take over what a checkpoint says its FiLM was trained on."""
        if kind in _KINDS:
            self._kinds[film_id, True] = str(kind)

    def check(self, film_id: str, phase: str, samples: Sequence[Sample], loaded: LoadedRows, *, is_content_fine: bool) -> None:
        """Note the kind of feature of a batch, and check it.

        Args:
            is_content_fine: whether rows without a file were asked for, by `unnamed_rows` or by a host adapter.

        Raises:
            ConditionError: rows that a data loader gave have no file and nobody asked for that; some rows of the batch have a file and others
                have none; or evaluation has the other kind than training.
        """
        is_train = phase == "train"
        is_file = [sample.path is not None for sample in samples]
        if self._kinds.get((film_id, is_train)) == FILE and all(is_file):
            return
        if not all(is_file) and loaded.is_expected and not is_content_fine:
            raise ConditionError(
                f"cannot tell which file each row of this {phase} batch is",
                {
                    "found": loaded.found.reason or "the rows have names, but no files",
                    "expected": "a file, or a name that leads to one, for each row",
                },
                "name the files in the batch (`filepath`), or set `unnamed_rows` to content: then FiLM sees the pixels as the host passes them",
            )
        if any(is_file) and not all(is_file):
            facts = {"found": f"{sum(is_file)} of {len(is_file)} rows with a file", "expected": "all, or none"}
            raise ConditionError(f"cannot condition this {phase} batch: it would have two kinds of feature", facts, "name the file of every row")
        kind = FILE if all(is_file) else CONTENT
        other = self._kinds.get((film_id, not is_train))
        before = self._kinds.get((film_id, True)) if is_train else None
        for place, known in ((f"{'evaluation' if is_train else 'training'} so far", other), ("training so far", before)):
            if known is not None and known != kind:
                raise ConditionError(
                    f"cannot condition this {phase} batch: training and evaluation would have features of two kinds",
                    {place: _KINDS[known], f"this {phase} batch": f"{_KINDS[kind]}{_because(loaded, kind)}", "expected": "one kind"},
                    "name the files of all rows, in training and in evaluation (`filepath` in the batch, or `dataset_root`)",
                )
        self._kinds[film_id, is_train] = kind


def _because(loaded: LoadedRows, kind: str) -> str:
    return f" ({loaded.found.reason})" if kind == CONTENT and loaded.is_expected and loaded.found.reason else ""
