"""Every error this package raises, as one tree.

    VlmFilmError
    ├── SettingsError          a setting, its value, or the mode is wrong
    ├── HostError              a host is not supported, or its structure is not what a host adapter expects
    │   └── TargetMatchError   no module matched, or a stage that does not exist
    ├── ConditionError         a forward has no condition, or its rows cannot be mapped to samples
    │   └── MissingFeatureError
    ├── FeatureError           a feature of the wrong width, or with NaN or infinity
    ├── ImageReadError         a source image cannot be read
    │   └── NarrowRangeError   a whole data set reaches the encoder nearly black, or nearly flat
    ├── EncoderError           an encoder cannot be found, loaded or run
    │   └── UnsteadyEncoderError   the same image gets different features
    ├── StoreError             the feature store cannot be opened, read or written
    └── CheckpointError        a checkpoint does not fit the FiLM of this run

Owns the shape of a message: what could not be done, the facts (found before expected), one fix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class VlmFilmError(RuntimeError):
    """Say what could not be done, to which object, with the facts and one fix.

    Args:
        headline: what could not be done, to which object; one line.
        facts: label -> value, printed aligned in the given order, what was found before what was expected.
        fix: one thing to do about it.

    The facts stay readable as `error.facts[label]`.
    """

    def __init__(self, headline: str, facts: Mapping[str, object] | None = None, fix: str | None = None) -> None:
        self.headline = headline
        self.facts: dict[str, object] = dict(facts or {})
        self.fix = fix
        super().__init__(self._text())

    def _text(self) -> str:
        rows = {**self.facts, **({"fix": self.fix} if self.fix else {})}
        width = max((len(label) for label in rows), default=0) + 1
        lines = [f"  {label + ':':<{width}} {value}" for label, value in rows.items()]
        return "\n".join([self.headline, *lines])

    def __reduce__(self) -> tuple[object, ...]:
        # Workers hand errors to their parent by pickle; args alone would lose the facts.
        return type(self), (self.headline, self.facts, self.fix)


def some_of(names: Sequence[str], most: int = 3) -> str:
    """Return names as one text, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with one line that says what is stored and how to go on. No `VlmFilmError`: nothing is wrong."""


class SettingsError(VlmFilmError):
    """A setting has an unknown name or a bad value, or `VLM_FILM_MODE` is not on, off or shuffle."""


class HostError(VlmFilmError):
    """A host cannot carry FiLM as it is, or a host adapter and the host do not fit."""


class TargetMatchError(HostError):
    """The target pattern matched no module, or a selected decoder stage does not exist."""


class ConditionError(VlmFilmError):
    """A UNet forward has no condition, or its rows cannot be mapped to the samples of the batch."""


class MissingFeatureError(ConditionError):
    """A feature is not in the store and `on_missing_feature` is `error`."""


class FeatureError(VlmFilmError):
    """A feature has the wrong width or shape, or holds NaN or infinite values."""


class ImageReadError(VlmFilmError):
    """A source image is missing, damaged, or of a kind that cannot be read."""


class NarrowRangeError(ImageReadError):
    """The images of a data set use less than a quarter of the range that their files can hold."""


class EncoderError(VlmFilmError):
    """An encoder is unknown, or its model cannot be found, loaded or run."""


class UnsteadyEncoderError(EncoderError):
    """An encoder draws at random, or its feature of an image depends on the images beside it."""


class StoreError(VlmFilmError):
    """The feature store, or the file of shuffled pairs, cannot be opened, read or written."""


class CheckpointError(VlmFilmError):
    """A checkpoint does not fit the FiLM of this run."""
