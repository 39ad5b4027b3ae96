"""What an encoder is: the protocol, its identity, and the registry that builds one from settings.

An encoder is frozen and lives outside every module tree. Third parties add theirs by an entry point of the group `vlmfilm.encoders`:
a name, and a factory that takes `Settings`. Knows nothing of hosts, stores or FiLM.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from vlmfilm_plugin.errors import EncoderError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


@dataclass(frozen=True)
class EncoderIdentity:
    """Everything that decides the value of a feature: encoder, model, revision, pooling, prompt, preprocessing.

    Two encoders with equal facts give the same feature for the same image; the store keeps one namespace for each identity.

    Args:
        facts: by name; plain values.
        former: facts by which earlier versions identified this very encoder, newest first.
    """

    facts: Mapping[str, object]
    former: Sequence[Mapping[str, object]] = field(default=(), compare=False)

    @cached_property
    def fingerprint(self) -> str:
        """Return 16 hex digits of the facts, after the encoder's name: `qwen2_5_vl-0f3a...`."""
        return _fingerprint(self.facts)

    @cached_property
    def formerly(self) -> tuple[str, ...]:
        """Return the fingerprints that this encoder had in earlier versions: features and checkpoints under them are its own."""
        return tuple(name for name in dict.fromkeys(map(_fingerprint, self.former)) if name != self.fingerprint)

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """Return today's fingerprint, then the former ones."""
        return (self.fingerprint, *self.formerly)


# The public name of the first version.
Identity = EncoderIdentity


def _fingerprint(facts: Mapping[str, object]) -> str:
    text = json.dumps(dict(facts), sort_keys=True, default=str)
    return f"{facts.get('encoder', 'encoder')}-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"


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
