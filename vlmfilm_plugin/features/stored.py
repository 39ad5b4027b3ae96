"""What a store holds of the images of now: by key, by the content of their files, and never the feature of a file that was replaced."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence

from vlmfilm_plugin.encoders.base import Encoder
from vlmfilm_plugin.errors import StoreError
from vlmfilm_plugin.features.samples import ImageId, Sample
from vlmfilm_plugin.features.store.protocol import INODE_BITS, SourceStamp, Store, StoredFeature, place_of

_logger = logging.getLogger("vlmfilm.features")


class StoredFeatures:
    """The features of one encoder in a store."""

    def __init__(self, encoder: Encoder, store: Store) -> None:
        self._encoder, self._store = encoder, store
        self._is_writable = True

    def find(self, wanted: Mapping[ImageId, Sample]) -> dict[ImageId, StoredFeature]:
        """Return what the store holds of these images: by key, then, of files that their key does not find, by content."""
        by_key: dict[str, list[StoredFeature]] = {}
        for row in self._store.rows(self._encoder.identity, [sample.key for sample in wanted.values()]):
            by_key.setdefault(row.key, []).append(row)
        found: dict[ImageId, StoredFeature] = {}
        elsewhere: dict[ImageId, int] = {}
        for image, sample in wanted.items():
            rows = by_key.get(sample.key, [])
            now = current(rows, image)
            if now is not None and self.fits(now):
                found[image] = now
            elif now is None and sample.path is not None and sample.path.is_file():
                elsewhere[image] = sample.path.stat().st_size
                if rows:
                    _logger.info("the file behind %s is not the one that a feature of this key was made from: %s", sample.key, sample.path)
        self._restamp([row for row in found.values() if _is_stamped_anew(row, by_key[row.key])])
        if elsewhere:
            found |= self._of_content({image: wanted[image] for image in self._of_known_size(elsewhere)})
        return found

    def fits(self, stored: StoredFeature) -> bool:
        """Tell whether a feature has the width of the encoder's; a warning says where it has not."""
        if stored.feature.shape == (self._encoder.feature_dim,):
            return True
        width, shape = self._encoder.feature_dim, stored.feature.shape
        _logger.warning("the stored feature of %s has shape %s, expected (%d,); it is encoded again", stored.key, shape, width)
        return False

    def _of_known_size(self, sizes: Mapping[ImageId, int]) -> list[ImageId]:
        """Return the images whose files may have been stored under another key: any other file need not be read to know that it was not."""
        known = self._store.known_sizes(self._encoder.identity, list(sizes.values()))
        return [image for image, size in sizes.items() if size in known]

    def _of_content(self, wanted: Mapping[ImageId, Sample]) -> dict[ImageId, StoredFeature]:
        """Return features of files with the same content under other keys, and store them under the keys that were asked for.

        So what was stored under a name that is spelt another way (relative, linked, by another version of this package) is used, and found
        by its key from then on.
        """
        stamps = {image: SourceStamp.of(sample.path) for image, sample in wanted.items() if sample.path is not None}
        rows = self._store.rows_of_content(self._encoder.identity, list(stamps.values())) if stamps else []
        known = {row.stamp.digest: row for row in rows if row.stamp is not None and self.fits(row)}
        found = {image: known[stamp.digest]._replace(key=wanted[image].key, stamp=stamp) for image, stamp in stamps.items() if stamp.digest in known}
        self._keep("features found by content are not stored under their new keys", found.values(), self._store.write)
        return found

    def _restamp(self, rows: Sequence[StoredFeature]) -> None:
        """Note in the store, where it can, that files were read and found to be those of their rows: the next run need not read them."""
        restamp = getattr(self._store, "restamp", None)
        if restamp is not None:
            self._keep("files that were found unchanged are read again in the next run", rows, restamp)

    def _keep(self, otherwise: str, rows: Collection[StoredFeature], write: Callable[..., None]) -> None:
        if not rows or not self._is_writable:
            return
        try:
            write(self._encoder.identity, rows)
        except StoreError as error:
            # On a read-only mount what is there can be used all the same; the files are read again in the next run.
            self._is_writable = False
            _logger.warning("%s: %s", otherwise, error)


def current(rows: Sequence[StoredFeature], image: ImageId) -> StoredFeature | None:
    """Return the row that was made from the very file of an image (by all that its status says, else by content), or None.

    Of an image without a file: the row of the same stamped pixels, else one that was made from no file.
    """
    if not rows:
        return None
    _, path, digest = image
    if path is None:
        return next((row for row in reversed(rows) if (None if row.stamp is None else row.stamp.digest) == digest), None)
    try:
        status = os.stat(path)
    except OSError:
        SourceStamp.of(path)  # raises with the path and a fix
        raise
    place, inode = place_of(path), status.st_ino & INODE_BITS
    candidates: list[tuple[StoredFeature, str]] = []
    for row in rows[::-1]:
        stamp = row.stamp
        if stamp is None or stamp.size != status.st_size:
            continue
        # `SourceStamp.is_of` in place: this runs for every image of every batch.
        if stamp.mtime_ns == status.st_mtime_ns and stamp.ctime_ns == status.st_ctime_ns and stamp.inode == inode and stamp.place == place:
            # What was stored later stands before it, whichever of the two was looked at last.
            newer = [other for other, digest in candidates if digest == stamp.digest] if candidates else None
            return newer[0]._replace(stamp=stamp) if newer else row
        candidates.append((row, stamp.digest))
    if not candidates:
        return None
    now = SourceStamp.of(path)
    # A copied or restored file: same bytes, other times or place. Remember the new ones, or every step would read the file again.
    same = [row for row, digest in candidates if digest == now.digest]
    return same[0]._replace(stamp=now) if same else None


def _is_stamped_anew(row: StoredFeature, stored: Sequence[StoredFeature]) -> bool:
    """Tell whether the stamp of a row is to be noted: of a file at the place that the store knows. Copies of a data set take no turns."""
    stamp = row.stamp
    if stamp is None or stamp.ctime_ns is None:
        return False
    return any(held.stamp is not None and held.stamp != stamp and held.stamp[2:4] == (stamp.digest, stamp.place) for held in stored)
