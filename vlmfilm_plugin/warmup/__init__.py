"""Encode a data set before training."""
