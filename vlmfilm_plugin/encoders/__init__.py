"""Frozen encoders: an image in, a feature out. One file an encoder; `base` holds the protocol and the registry."""

from vlmfilm_plugin.encoders.base import AnnotatedEncoder, Encoder, Identity, build_encoder, encode_annotated

__all__ = ["AnnotatedEncoder", "Encoder", "Identity", "build_encoder", "encode_annotated"]
