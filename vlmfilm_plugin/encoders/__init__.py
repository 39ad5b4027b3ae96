"""Frozen encoders: an image in, a feature out. One file an encoder; `base` holds the protocol and the registry."""

from vlmfilm_plugin.encoders.base import Encoder, Identity, build_encoder

__all__ = ["Encoder", "Identity", "build_encoder"]
