"""Frozen encoders: an image in, a feature out. One file an encoder; `base` holds the protocol."""
