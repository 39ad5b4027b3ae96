"""The classes of images, for `shuffle_donor: other_class`: a CSV file `image,class`, where an image is named by its path, name or key."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from pathlib import Path

from vlmfilm_plugin.errors import ConditionError, SettingsError


class Classes:
    """The classes in a CSV file; a first line `image,class` is a header. Relative paths are also those from the file's own folder.

    Raises:
        SettingsError: it cannot be read, a line has no two columns, an image has two classes, or there is one class alone.
    """

    def __init__(self, path: str, origin: str) -> None:
        self.path, self._origin = path, origin
        self._of: dict[str, str | None] = {}
        listed: dict[str, str] = {}
        for number, image, name in self._lines():
            if listed.setdefault(image, name) != name:
                raise self._wrong(f"line {number}: {image!r} is of {name!r} here and of {listed[image]!r} above", "one class an image")
            for alias in (image, os.path.abspath(Path(path).parent / image)):
                self._of[alias] = name
        if len(set(listed.values())) < 2:
            raise self._wrong(f"{len(set(listed.values()))} class", "two classes or more")
        short: dict[str, set[str]] = {}
        for image, name in listed.items():
            short.setdefault(os.path.basename(image), set()).add(name)
        # A file's name alone names an image where it is that of one class only.
        for base, names in short.items():
            self._of.setdefault(base, next(iter(names)) if len(names) == 1 else None)

    def _lines(self) -> Iterator[tuple[int, str, str]]:
        try:
            with Path(self.path).open(newline="", encoding="utf-8") as file:
                rows = list(csv.reader(file))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise self._wrong(error, "a readable CSV file") from error
        for number, cells in enumerate(rows, 1):
            image, name, *_ = [*(cell.strip() for cell in cells), "", ""]
            is_header = number == 1 and name.lower() == "class" and image.lower() in {"image", "path"}
            if not cells or is_header:
                continue
            if not image or not name:
                raise self._wrong(f"line {number}: {','.join(cells)[:80]!r}", "image,class")
            yield number, image, name

    def _wrong(self, found: object, expected: str) -> SettingsError:
        facts = {"file": f"{self.path}   (from {self._origin})", "found": found, "expected": expected}
        return SettingsError("cannot use `shuffle_classes_file`", facts, "correct the file")

    def of(self, *names: str) -> str:
        """Return the class of an image, by the first of its names (key, name, path) that the file knows.

        Raises:
            ConditionError: it knows none of them.
        """
        known = [name for name in names if name]
        bare = [name.partition(":")[2] for name in known if ":" in name]
        for name in (*known, *bare, *map(os.path.abspath, (*known, *bare)), *map(os.path.basename, (*bare, *known))):
            found = self._of.get(name)
            if found is not None:
                return found
        raise ConditionError(
            "cannot shuffle by class: the class of an image is not known",
            {"image": known[0] if known else "without a name", "file": self.path, "expected": "a line `image,class` with its path, name or key"},
            "add it to `shuffle_classes_file`, or set `shuffle_donor: any`",
        )
