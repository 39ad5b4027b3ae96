"""Which images to encode before training, and the cache keys that training will look them up by.

A host's configuration (through its host adapter), a folder, or a list. Keys come from the very rules a batch is named by. Reads no image.
"""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vlmfilm_plugin.entry_points import HOSTS, installed
from vlmfilm_plugin.errors import HostError, SettingsError
from vlmfilm_plugin.features.batch_names import RowNames
from vlmfilm_plugin.features.cache_key import sample_keys
from vlmfilm_plugin.features.images import read_image
from vlmfilm_plugin.features.samples import Sample
from vlmfilm_plugin.hosts.registry import AdapterRegistry
from vlmfilm_plugin.settings.yaml_file import read_mapping

logger = logging.getLogger("vlmfilm.warmup")

CONFIG_SUFFIXES = frozenset({".yaml", ".yml"})
TABLE_SUFFIXES = {".csv": ",", ".tsv": "\t"}
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".pgm", ".ppm", ".jp2")
_COLUMNS = ("path", "key", "name", "split")


@dataclass(frozen=True)
class Entry:
    """An image to encode: its file, what a batch of it alone would hold, and its cache key where the list itself names it."""

    path: Path
    fields: Mapping[str, object]
    key: str | None = None

    def key_in(self, dataset_root: str | None) -> str:
        """Return the cache key under which a run looks this image up."""
        if self.key is not None:
            return self.key
        found = replace(RowNames.find(self.fields, 1, dataset_root=dataset_root), paths=(self.path,))
        return sample_keys(found, None, dataset_root).keys[0]


@dataclass(frozen=True)
class Plan:
    """What to encode, where that was read from, and, from a host's configuration, its FiLM settings and the checkpoint it resumes from."""

    origin: str
    entries: Sequence[Entry]
    settings: Mapping[str, object] = field(default_factory=dict)
    resume: str | None = None


def read_plan(source: str | os.PathLike[str] | Mapping[str, Any], splits: Sequence[str], as_split: str | None = None) -> Plan:
    """Read what to encode.

    Args:
        source: a host's configuration (a YAML file, or its content); a folder, searched recursively; or a list: a `.csv` or `.tsv` file with
            the columns path[, key or name][, split], or a text file with one path a line. Relative paths are relative to the working directory.
        splits: which splits of a configuration; rows of a table that name another are left out.
        as_split: the split in the keys of a folder, or of rows that name none; a run whose batches name no split uses `unknown`.

    Raises:
        SettingsError: the source cannot be read, or there is nothing to encode.
        HostError: no host adapter, or more than one, can list the images of this configuration.
    """
    if isinstance(source, Mapping):
        plan = _host_plan(source, splits, "the given configuration")
    else:
        path = Path(source).expanduser()
        if path.suffix.lower() in CONFIG_SUFFIXES:
            plan = _host_plan(read_mapping(path, "what to encode", "give the YAML that the host's training script takes"), splits, str(path))
        elif path.is_dir():
            plan = Plan(str(path), [_by_path(image, as_split) for image in _walk(path)])
        else:
            plan = Plan(str(path), list(_read_list(path, splits, as_split)))
    if not plan.entries:
        facts = {"source": plan.origin, "splits": ", ".join(splits), "expected": "at least one image"}
        raise SettingsError("there is nothing to encode: no image was found", facts, "correct the source or the splits")
    return plan


def samples_of(plan: Plan, dataset_root: str | None) -> list[Sample]:
    """Return one sample for each key and file; files that share a key are told apart by their content, as in training."""
    wanted = dict.fromkeys((entry.key_in(dataset_root), entry.path) for entry in plan.entries)
    return [Sample(key, path, lambda path=path: read_image(path)) for key, path in wanted]  # type: ignore[misc]


def _host_plan(config: Mapping[str, Any], splits: Sequence[str], origin: str) -> Plan:
    registry = AdapterRegistry()
    for _, entry in sorted({entry.value: entry for entry in installed(HOSTS)}.items()):
        registry.load(entry)
    # A broken host adapter of another host must not stop this one.
    for name, error in registry.failures:
        logger.warning("host adapter %s cannot be loaded: %s: %s", name, type(error).__name__, error)
    found = registry.listings(config, splits)
    if len(found) != 1:
        hosts = ", ".join(listing.host for listing in found) or "none"
        facts = {"configuration": origin, "host adapters that know it": hosts, "expected": "exactly one, with a `vlmfilm_listing` hook"}
        raise HostError("cannot list the images of this configuration", facts, "give a folder or a list of images instead")
    listing = found[0]
    return Plan(origin, [Entry(Path(image.path), image.fields) for image in listing.images], listing.settings, listing.resume)


def _read_list(path: Path, splits: Sequence[str], as_split: str | None) -> Iterator[Entry]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() in TABLE_SUFFIXES:
                yield from _read_table(csv.DictReader(file, delimiter=TABLE_SUFFIXES[path.suffix.lower()]), path, splits, as_split)
                return
            for line in file:
                text = line.rstrip("\r\n")
                if text.strip() and not text.lstrip().startswith("#"):
                    yield _by_path(Path(text).expanduser(), as_split)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise _unreadable(path, error, "a folder, a YAML, CSV or TSV file, or a text file with one path a line") from error


def _read_table(rows: csv.DictReader[str], path: Path, splits: Sequence[str], as_split: str | None) -> Iterator[Entry]:
    columns = list(rows.fieldnames or [])
    if "path" not in columns or not set(columns) <= set(_COLUMNS):
        facts = {"file": path, "found": f"columns {', '.join(columns) or 'none'}", "expected": "path, and of key, name, split what you need"}
        raise SettingsError("cannot use this list of images", facts, "write these names in the first line")
    for row in rows:
        if not row["path"]:
            raise SettingsError("cannot use this list of images", {"file": f"{path}, line {rows.line_num}", "found": "no path"}, "fill it in")
        split = row.get("split") or None
        if split is not None and split not in splits:
            continue
        entry = _by_path(Path(row["path"]).expanduser(), split or as_split)
        if row.get("name"):
            entry = Entry(entry.path, {**{name: value for name, value in entry.fields.items() if name == "split"}, "name": [row["name"]]})
        yield Entry(entry.path, entry.fields, row.get("key") or None)


def _by_path(path: Path, split: str | None) -> Entry:
    absolute = Path(os.path.abspath(path))
    return Entry(absolute, {"filepath": [str(absolute)], **({"split": split} if split else {})})


def _walk(folder: Path) -> Iterable[Path]:
    """Yield image files below a folder, sorted; links to folders are followed, each folder once."""
    seen = set()
    for here, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield from (Path(here, name) for name in sorted(files) if name.lower().endswith(IMAGE_SUFFIXES))


def _unreadable(path: Path, error: Exception, expected: str) -> SettingsError:
    facts = {"file": path, "error": " ".join(str(error).split()), "expected": expected}
    return SettingsError("cannot read what to encode", facts, "correct the path")
