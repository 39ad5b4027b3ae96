"""What an encoder is: the protocol, its identity, and the registry that builds one from settings.

An encoder is frozen and lives outside every module tree. Third parties add theirs by an entry point of the group `vlmfilm.encoders`:
a name, and a factory that takes `Settings`. Knows nothing of hosts, stores or FiLM.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from vlmfilm_plugin.errors import EncoderError, VlmFilmError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from vlmfilm_plugin.settings.record import Settings


@dataclass(frozen=True)
class EncoderIdentity:
    """Everything that decides the value of a feature: encoder, model, revision, pooling, prompt, preprocessing.

    Two encoders with equal facts give the same feature for the same image; the store keeps one namespace for each identity.
    """

    facts: Mapping[str, object]

    @cached_property
    def fingerprint(self) -> str:
        """Return 16 hex digits of the facts, after the encoder's name: `qwen2_5_vl-0f3a...`."""
        text = json.dumps(dict(self.facts), sort_keys=True, default=str)
        return f"{self.facts.get('encoder', 'encoder')}-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"


@runtime_checkable
class Encoder(Protocol):
    """A frozen image encoder.

    Building one must be cheap: configuration is read, weights are not. Weights are loaded by the first `encode`.
    """

    @property
    def identity(self) -> EncoderIdentity:
        """Return what decides the features of this encoder; no weights are read for it."""

    @property
    def feature_dim(self) -> int:
        """Return F, the width of a feature; no weights are read for it."""

    @property
    def is_loaded(self) -> bool:
        """Tell whether weights are in memory."""

    def encode(self, images: Sequence[Image]) -> Tensor:
        """Encode images (RGB, 8 bit, any sizes) into features (N, F): float32, CPU, detached, row i of image i.

        The result for an image must not depend on the others of the call.
        """

    def release(self) -> None:
        """Drop the weights from memory; the next `encode` loads them again."""


@runtime_checkable
class AnnotatedEncoder(Encoder, Protocol):
    """An encoder that can also say in words what it saw; optional."""

    def encode_annotated(self, images: Sequence[Image]) -> tuple[Tensor, list[str]]:
        """Return what `encode` returns, and one readable note an image."""


def encode_annotated(encoder: Encoder, images: Sequence[Image]) -> tuple[Tensor, list[str] | None]:
    """Encode images, with one readable note an image where the encoder has notes, else None.

    Shape:
        features: (N, F) float32, CPU, detached.

    Raises:
        EncoderError: the encoder gave another number of notes than of images.
    """
    # By name and not by isinstance, which before Python 3.12 would evaluate every property of the encoder.
    annotate = getattr(encoder, "encode_annotated", None)
    if annotate is None:
        return encoder.encode(images), None
    features, notes = annotate(images)
    if len(notes) != len(images):
        facts = {"found": f"{len(notes)} notes", "expected": f"{len(images)}, one an image"}
        raise EncoderError(f"cannot use the notes of {type(encoder).__name__}", facts, "correct its `encode_annotated`")
    return features, list(notes)


EncoderFactory = Callable[["Settings"], Encoder]
ENTRY_POINT_GROUP = "vlmfilm.encoders"


def _descriptor(settings: Settings) -> Encoder:
    from vlmfilm_plugin.encoders.descriptor import DescriptorEncoder

    return DescriptorEncoder()


def _qwen2_5_vl(settings: Settings) -> Encoder:
    from vlmfilm_plugin.encoders import qwen2_5_vl

    return qwen2_5_vl.from_settings(settings)


def _hf(settings: Settings) -> Encoder:
    from vlmfilm_plugin.encoders import hf

    return hf.from_settings(settings)


def _questionnaire(settings: Settings) -> Encoder:
    from vlmfilm_plugin.encoders import questionnaire

    return questionnaire.from_settings(settings)


ENCODERS: dict[str, EncoderFactory] = {"descriptor": _descriptor, "hf": _hf, "qwen2_5_vl": _qwen2_5_vl, "questionnaire": _questionnaire}


def build_encoder(settings: Settings) -> Encoder:
    """Build the encoder named by `settings.encoder`, without reading weights.

    A name that two sides claim is refused rather than given to one of them: a feature must not depend on which package was found first.

    Raises:
        SettingsError: the settings of the encoder do not fit each other.
        EncoderError: the name is unknown or claimed twice, a third party's encoder cannot be built, or the model's configuration cannot be read.
    """
    name = settings.encoder
    added = _added(name)
    claims = [f"{entry.value} of {_package(entry)}" for entry in added] + (["vlmfilm-plugin"] if name in ENCODERS else [])
    if len(claims) > 1:
        facts = {"found": ", ".join(claims), "expected": "one encoder of this name"}
        raise EncoderError(f"cannot build the encoder {name!r}: the name is claimed twice", facts, f"uninstall or rename {claims[0]}")
    if added:
        return _build_added(added[0], settings)
    if name in ENCODERS:
        return ENCODERS[name](settings)
    known = sorted({*ENCODERS, *(entry.name for entry in entry_points(group=ENTRY_POINT_GROUP))})
    closest = get_close_matches(name, known, n=1)
    raise EncoderError(
        "cannot build the encoder: unknown name",
        {"encoder": f"{name!r}   (from {settings.origin('encoder')})", "known": known},
        f"set `encoder` to {closest[0] if closest else known[0]!r}",
    )


def _added(name: str) -> list[EntryPoint]:
    # A package on two entries of the search path is listed twice and is still one claim.
    return list({entry.value: entry for entry in entry_points(group=ENTRY_POINT_GROUP, name=name)}.values())


def _package(entry: EntryPoint) -> str:
    return entry.dist.metadata["Name"] if entry.dist is not None else "an unknown package"


def _build_added(entry: EntryPoint, settings: Settings) -> Encoder:
    try:
        encoder: Encoder = entry.load()(settings)
    except VlmFilmError:
        raise
    except Exception as error:  # another's code: whatever it raises is named, and the cause stays attached
        facts = {"entry point": entry.value, "package": _package(entry), "error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        raise EncoderError(f"cannot build the encoder {entry.name!r} of a third party", facts, "correct or uninstall that package") from error
    lacking = sorted({"identity", "feature_dim", "is_loaded", "encode", "release"} - set(dir(encoder)))
    if lacking:
        facts = {"entry point": entry.value, "found": f"{type(encoder).__name__} without {', '.join(lacking)}", "expected": "an Encoder"}
        raise EncoderError(f"cannot use the encoder {entry.name!r} of a third party", facts, "correct or uninstall that package")
    return encoder
