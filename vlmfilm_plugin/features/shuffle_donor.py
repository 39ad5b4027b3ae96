"""Mode `shuffle` for an image alone in its batch: the images that may give it their feature, and that feature."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor

from vlmfilm_plugin.errors import ConditionError
from vlmfilm_plugin.features.cache_key import name_key, path_key, split_in
from vlmfilm_plugin.features.images import read_image
from vlmfilm_plugin.features.provider import FeatureProvider, stack
from vlmfilm_plugin.features.samples import Sample
from vlmfilm_plugin.features.shuffle import Shuffle, Split, images_of
from vlmfilm_plugin.features.store.protocol import SourceStamp, place_of
from vlmfilm_plugin.settings.mode import MODE_VARIABLE

# Key and feature (F,) of another image.
Donor = tuple[str, Tensor]

# A folder of such a name holds one split of a data set.
_SPLIT_FOLDERS = frozenset({"train", "training", "val", "valid", "validation", "dev", "test", "testing"})


class _DataSet:
    """The files of one data set of a host, by the names it gives them."""

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        listed = sorted({(name, os.path.abspath(path)) for name, path in pairs})
        paths_of: dict[str, int] = {}
        for name, _ in listed:
            paths_of[name] = paths_of.get(name, 0) + 1
        # One name may stand for several files; their paths then tell them apart.
        members = [(name if paths_of[name] == 1 else f"{name}\0{path}", name, path) for name, path in listed]
        self.split = Split([member for member, _, _ in members])
        self.files = {member: (name, Path(path)) for member, name, path in members}
        self.member_of = {path: member for member, _, path in members}


class DataSets:
    """The data sets of a host: which images belong together, as the host itself divides them."""

    def __init__(self) -> None:
        self._sets: list[_DataSet] = []

    def learn(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Take in one data set: name and file of each of its images."""
        known = _DataSet(pairs)
        if known.files and all(known.files != other.files for other in self._sets):
            self._sets.append(known)

    def of(self, path: Path) -> _DataSet | None:
        """Return the data set that a file belongs to, the smallest where there are several; None where none is known."""
        place = os.path.abspath(path)
        holding = [known for known in self._sets if place in known.member_of]
        if len(holding) > 1:
            holding.sort(key=lambda known: (len(known.files), sorted(known.files)))
        return holding[0] if holding else None


class ShuffleDonors:
    """Apply the rule to the images of one feature provider, and write down the pairs.

    An image alone in its batch gets its donor from the host's data set that holds it. Where the host's data sets are not known, from
    what the store held of its split at the first draw. Another image has other bytes, whatever it is called.
    """

    def __init__(self, provider: FeatureProvider, shuffle: Shuffle, data_sets: DataSets) -> None:
        self._provider, self._shuffle, self._data_sets = provider, shuffle, data_sets
        self._stored: list[str] | None = None
        self._splits: dict[str, Split] = {}
        self._stamps: dict[Path, SourceStamp] = {}

    def exchange(self, keys: Sequence[str], features: Tensor, step: int) -> list[int] | None:
        """Return for each row (B, F) of a batch the row whose feature it gets; None where all rows are of one image."""
        rows = self._shuffle.exchange(images_of(features), step)
        if rows is not None:
            self._shuffle.pairs.write(((keys[row], keys[other]) for row, other in enumerate(rows)), step)
        return rows

    def donor(self, sample: Sample, step: int) -> Donor:
        """Return the donor of an image that is alone in its batch.

        Raises:
            ConditionError: no other image of its split is known.
        """
        drawn = self.draw(sample, step)
        if drawn is None:
            wanted = f"another image whose key starts with {split_prefix(sample.key)!r}"
            raise ConditionError(
                "cannot shuffle a batch of one image: no other image of its split is known",
                {"image": sample.key, "store": self._provider.store.path, "expected": wanted},
                f"run {MODE_VARIABLE}=on over the data first, or use a batch size of 2 or more",
            )
        return drawn

    def draw(self, sample: Sample, step: int) -> Donor | None:
        """Return the donor of `sample` at a step; None where no other image of its split is known."""
        path = sample.path
        known = None if path is None else self._data_sets.of(path)
        drawn = self._from_store(sample, step) if path is None or known is None else self._from_data_set(sample, path, step, known)
        if drawn is not None:
            self._shuffle.pairs.write([(sample.key, drawn[0])], step)
        return drawn

    def _from_data_set(self, sample: Sample, path: Path, step: int, known: _DataSet) -> Donor | None:
        own = known.member_of[os.path.abspath(path)]
        for member in self._shuffle.donors(own, step, known.split):
            name, other = known.files[member]
            if self._is_other_image(path, other):
                key = self._key_like(sample, known.files[own][0], name, other)
                return key, self._provider.get([Sample(key, other, lambda other=other: read_image(other))])[0]  # type: ignore[misc]
        return None

    def _key_like(self, sample: Sample, own_name: str, name: str, path: Path) -> str:
        """Return the key of another image of the same data set, made as the key of `sample` was: of its name, or of its file."""
        split, root = split_in(sample.key), self._provider.dataset_root
        is_named = name_key(own_name, split, root) == sample.key
        return name_key(name, split, root) if is_named else path_key(path, split, root)

    def _from_store(self, sample: Sample, step: int) -> Donor | None:
        store, identity = self._provider.store, self._provider.encoder.identity
        own = sample.stamp.digest if sample.stamp is not None else None
        digest = self._digest(sample.path) if sample.path is not None else own
        for key in self._shuffle.donors(sample.key, step, self._split_of(sample.key)):
            for row in store.rows(identity, [key]):
                if (digest is None or row.stamp is None or row.stamp.digest != digest) and self._provider.fits(row):
                    return key, stack([row])[0]
        # Too little to draw from is nothing to keep.
        self._stored = None
        self._splits.clear()
        return None

    def _split_of(self, key: str) -> Split:
        """Return the stored images of the split of `key`."""
        prefix = split_prefix(key)
        if prefix not in self._splits:
            if self._stored is None:
                self._stored = self._provider.store.keys(self._provider.encoder.identity)
            start = bisect_left(self._stored, prefix)
            end = start
            while end < len(self._stored) and self._stored[end].startswith(prefix):
                end += 1
            self._splits[prefix] = Split(self._stored[start:end])
        return self._splits[prefix]

    def _is_other_image(self, path: Path, other: Path) -> bool:
        return path != other and (path.stat().st_size != other.stat().st_size or self._digest(path) != self._digest(other))

    def _digest(self, path: Path) -> str:
        known = self._stamps.get(path)
        if known is None or not known.is_of(os.stat(path), place_of(path)):
            known = self._stamps[path] = SourceStamp.of(path)
        return known.digest


def split_prefix(key: str) -> str:
    """Return what the keys of one split of one data set start with.

    That is the split of the key; where no split is known, its path down to the last folder named like one (`test`), else nothing more.
    """
    split, _, name = key.partition(":")
    prefix = f"{split}:"
    if split == "unknown":
        folders = name.split("/")[:-1]
        last = max((depth for depth, folder in enumerate(folders, 1) if folder.lower() in _SPLIT_FOLDERS), default=0)
        prefix += "".join(f"{folder}/" for folder in folders[:last])
    return prefix
