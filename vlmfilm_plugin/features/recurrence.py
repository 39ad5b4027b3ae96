"""Which images without a file come back: a random crop does not, and what cannot be found again is not worth a place on the disk."""

from __future__ import annotations

from collections import OrderedDict

from vlmfilm_plugin.features.samples import ImageId

# About 30 MB; a data set without files that is larger than this, and than the memory of features, is encoded in every epoch.
_MOST = 1 << 18


class Recurrence:
    """Remember the step in which each image without a file was first seen in training; its feature is stored once another step asks for it.

    Attributes:
        steps: by the hash of the image; empty where every image has a file.
    """

    def __init__(self) -> None:
        self.steps: OrderedDict[int, int | None] = OrderedDict()

    def note(self, image: ImageId, step: int | None) -> None:
        """Note that the feature of an image was computed in a step (None where the caller counts none), and is not stored."""
        self.steps.setdefault(hash(image), step)
        while len(self.steps) > _MOST:
            self.steps.popitem(last=False)

    def comes_back(self, image: ImageId, step: int | None) -> bool:
        """Tell whether an image that is not stored was seen in an earlier step: several models may ask for one crop in one step."""
        key = hash(image)
        return key in self.steps and (step is None or step != self.steps[key])

    def forget(self, image: ImageId) -> None:
        """Note that the feature of an image is stored."""
        self.steps.pop(hash(image), None)
