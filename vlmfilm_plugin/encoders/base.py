"""What an encoder is: the protocol, its identity, and the registry that builds one from settings.

An encoder is frozen and lives outside every module tree. Knows nothing of hosts, stores or FiLM.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from vlmfilm_plugin.errors import EncoderError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from vlmfilm_plugin.settings import Settings


@dataclass(frozen=True)
class Identity:
    """Everything that decides the value of a feature: encoder, model, revision, pooling, prompt, preprocessing.

    Two encoders with equal facts give the same feature for the same image; the store keeps one namespace for each identity.
    """

    facts: Mapping[str, object]

    @property
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
    def identity(self) -> Identity:
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


EncoderFactory = Callable[["Settings"], Encoder]


def _descriptor(settings: Settings) -> Encoder:
    from vlmfilm_plugin.encoders.descriptor import DescriptorEncoder

    return DescriptorEncoder()


def _qwen2_5_vl(settings: Settings) -> Encoder:
    from vlmfilm_plugin.encoders import qwen2_5_vl

    return qwen2_5_vl.from_settings(settings)


ENCODERS: dict[str, EncoderFactory] = {"descriptor": _descriptor, "qwen2_5_vl": _qwen2_5_vl}


def build_encoder(settings: Settings) -> Encoder:
    """Build the encoder named by `settings.encoder`, without reading weights.

    Raises:
        EncoderError: the name is unknown, or the model's configuration cannot be read.
    """
    factory = ENCODERS.get(settings.encoder)
    if factory is None:
        closest = get_close_matches(settings.encoder, ENCODERS, n=1)
        raise EncoderError(
            "cannot build the encoder: unknown name",
            {"encoder": f"{settings.encoder!r}   (from {settings.origin('encoder')})", "known": sorted(ENCODERS)},
            f"set `encoder` to {closest[0] if closest else sorted(ENCODERS)[0]!r}",
        )
    return factory(settings)
