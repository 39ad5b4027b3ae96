"""Mode `shuffle` for an image alone in its batch: the images that may give it their feature, and that feature."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from torch import Tensor

from vlmfilm_plugin.errors import ConditionError
from vlmfilm_plugin.features.cache_key import name_key, path_key, split_in
from vlmfilm_plugin.features.encoding import stack
from vlmfilm_plugin.features.images import read_image
from vlmfilm_plugin.features.provider import FeatureProvider
from vlmfilm_plugin.features.samples import Sample
from vlmfilm_plugin.features.shuffle import Shuffle, Split, distances_of, images_of
from vlmfilm_plugin.features.store.protocol import SourceStamp, place_of
from vlmfilm_plugin.settings.mode import MODE_VARIABLE

# Key and feature (F,) of another image.
Donor = tuple[str, Tensor]

# Other images among which the most distant one is looked for, drawn by the seed.
_LOOKED_AT = 256

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
        self._distant: dict[str, Donor] = {}

    @property
    def is_within_batch(self) -> bool:
        """Tell whether images of a batch exchange their features; else every image has its own donor, from all of its data set."""
        return self._shuffle.donor == "any"

    def exchange(self, keys: Sequence[str], features: Tensor, step: int) -> list[int] | None:
        """Return for each row (B, F) of a batch the row whose feature it gets; None where all rows are of one image."""
        rows = self._shuffle.exchange(images_of(features), step, names=keys, distances=lambda: distances_of(features))
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
            if self._shuffle.donor == "other_class":
                wanted += ", of another class"
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
        own_name = known.files[own][0]

        def others() -> Iterator[tuple[Sequence[str], Callable[[], Donor]]]:
            for member in self._shuffle.donors(own, self._draw_at(step), known.split):
                name, other = known.files[member]
                if self._is_other_image(path, other):
                    key = key_like(sample, own_name, name, other, self._provider.dataset_root)
                    yield (key, name, str(other)), lambda key=key, other=other: (key, self._feature(key, other))  # type: ignore[misc]

        return self._chosen(sample, (sample.key, own_name, str(path)), others())

    def _feature(self, key: str, path: Path) -> Tensor:
        return self._provider.get([Sample(key, path, lambda: read_image(path))])[0]

    def _draw_at(self, step: int) -> int:
        # The most distant image is the same at every step: so are those among which it is looked for.
        return 0 if self._shuffle.donor == "most_distant" else step

    def _chosen(self, sample: Sample, own: Sequence[str], others: Iterator[tuple[Sequence[str], Callable[[], Donor]]]) -> Donor | None:
        """Return the donor among other images, given in the order of the draw: names of each, and what finds its key and feature."""
        if self._shuffle.donor == "any":
            return next((find() for _, find in others), None)
        if self._shuffle.donor == "other_class":
            own_class = self._shuffle.class_of(*own)
            return next((find() for names, find in others if self._shuffle.class_of(*names) != own_class), None)
        if sample.key not in self._distant:
            feature = self._provider.get([sample])[0].double()
            found = [find() for _, find in islice(others, _LOOKED_AT)]
            if not found:
                return None
            self._distant[sample.key] = max(found, key=lambda donor: float((donor[1].double() - feature).norm()))
        return self._distant[sample.key]

    def _from_store(self, sample: Sample, step: int) -> Donor | None:
        store, identity = self._provider.store, self._provider.encoder.identity
        own = sample.stamp.digest if sample.stamp is not None else None
        digest = self._digest(sample.path) if sample.path is not None else own

        def others() -> Iterator[tuple[Sequence[str], Callable[[], Donor]]]:
            for key in self._shuffle.donors(sample.key, self._draw_at(step), self._split_of(sample.key)):
                for row in store.rows(identity, [key]):
                    if (digest is None or row.stamp is None or row.stamp.digest != digest) and self._provider.fits(row):
                        yield (key,), lambda key=key, row=row: (key, stack([row])[0])  # type: ignore[misc]

        own_names = (sample.key, str(sample.path or ""))
        if (drawn := self._chosen(sample, own_names, others())) is not None:
            return drawn
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


def key_like(sample: Sample, own_name: str, name: str, path: Path, dataset_root: str | None) -> str:
    """Return the key of another image of the same data set, made as the key of `sample` was: of its name, or of its file."""
    split = split_in(sample.key)
    is_named = name_key(own_name, split, dataset_root) == sample.key
    return name_key(name, split, dataset_root) if is_named else path_key(path, split, dataset_root)


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
