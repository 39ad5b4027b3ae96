"""Which file is the image of an item: what was opened for it, over all items of its data set that were seen. Decided when it is asked."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vlmfilm_plugin.rows.leaves import LeafPath
from vlmfilm_plugin.rows.recording import MadeItem

# Given several files that may each be an item's image (modalities, say): the one that is, or None. A host adapter's statement.
Choice = Callable[[Sequence[str]], str | None]

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".pgm", ".ppm", ".jp2")
VOLUMES = (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".dcm", ".npy", ".npz", ".mat", ".h5", ".hdf5")
# What is opened beside data: code, lists, settings.
_NO_DATA = (".py", ".pyc", ".so", ".txt", ".csv", ".tsv", ".json", ".yaml", ".yml", ".xml", ".toml", ".cfg", ".ini", ".log", ".lock", ".pkl", ".pt")
_MASK_PARTS = ("mask", "label", "annot", "segm", "groundtruth")
_MASK_WORDS = frozenset({"seg", "gt", "anno", "lbl", "manual", "truth", "target", "targets", "ho", "stho", "ndho", "roi", "contour", "contours"})
_CONFLICT = ""


class DataSetItems:
    """The items of one data set, as far as loaders have made them."""

    def __init__(self, name: str, choices: Sequence[Choice] = ()) -> None:
        self.name, self._choices = name, choices
        self._indices: set[Any] = set()
        self._opened_by: dict[str, tuple[Any, int]] = {}
        # The image of an index, for caches that open nothing a second time; forgotten for good where one index ever has another.
        self._known: dict[Any, str] = {}

    def note(self, item: MadeItem) -> None:
        """Take in an item that has just been made."""
        if item.index not in self._indices:
            self._indices.add(item.index)
            for file in item.opened or ():
                first, count = self._opened_by.get(file, (item.index, 0))
                self._opened_by[file] = first, count + 1

    def image_of(self, item: MadeItem, place: LeafPath) -> tuple[Path | None, str]:
        """Return the file of the image at a place of an item, or None and the reason.

        The tensor's own statement first; else the one file that was opened for it and is neither opened for every item nor, by its path, a
        mask or label; else the file that was opened for this index before.
        """
        stated = item.stated.get(place)
        if stated is not None and os.path.isfile(stated):
            return Path(os.path.abspath(stated)), ""
        opened = self._data_files(item.opened or ())
        if len(opened) == 1:
            return self._remembered(item.index, opened[0]), ""
        for choose in self._choices:
            if opened and (chosen := choose(opened)) is not None:
                return self._remembered(item.index, chosen), ""
        if opened:
            return None, f"item {item.index} of {self.name} opened several files that may be its image: {', '.join(opened[:6])}"
        if known := self._known.get(item.index):
            return Path(known), ""
        if item.opened is None:
            return None, f"{self.name} makes whole batches at once (`__getitems__`): which file is whose cannot be seen"
        if item.opened:
            return None, f"of the files that item {item.index} of {self.name} opened none looks like an image: {', '.join(item.opened[:6])}"
        return None, f"{self.name} opened no file for item {item.index} (data in memory, a cache, or a file that stays open)"

    def _remembered(self, index: Any, file: str) -> Path:
        if index is not None and self._known.setdefault(index, file) != file:
            self._known[index] = _CONFLICT
        return Path(file)

    def _data_files(self, opened: Sequence[str]) -> list[str]:
        files = [file for file in opened if file.lower().endswith(IMAGES + VOLUMES)] or [
            file for file in opened if not file.lower().endswith(_NO_DATA) and os.path.isfile(file)
        ]
        everywhere = len(self._indices)
        own = [file for file in files if everywhere < 2 or self._opened_by.get(file, (None, 0))[1] < everywhere] or files
        return [file for file, is_mask in zip(own, masks_among(own), strict=True) if not is_mask] if len(own) > 1 else own


def masks_among(files: Sequence[str]) -> list[bool]:
    """Tell which of several files are masks or labels by their paths, judged by what tells the paths apart."""
    shared = len(os.path.commonpath(files)) if len(files) > 1 else 0
    return [_is_mask(file[shared:]) for file in files]


def _is_mask(text: str) -> bool:
    parts = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", text)
    joined = re.sub(r"[^a-z]", "", text.lower())
    return any(part in joined for part in _MASK_PARTS) or any(part.lower() in _MASK_WORDS for part in parts)
