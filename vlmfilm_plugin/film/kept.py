"""What a forward of our own must leave as it was: random streams, buffers, training flags."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def random_streams_kept(devices: Iterable[torch.device]) -> Iterator[None]:
    """Give torch's random streams, of the CPU and of these devices, Python's and NumPy's back their states."""
    python = random.getstate()
    numpy: Any = sys.modules.get("numpy")
    state = None if numpy is None else numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=list({device for device in devices if device.type == "cuda"})):
            yield
    finally:
        random.setstate(python)
        if state is not None:
            numpy.random.set_state(state)


@contextmanager
def buffers_kept(module: nn.Module) -> Iterator[None]:
    """Give every buffer back its value, and its place where it was exchanged; one that was not written is not touched."""
    modules = list(module.modules())
    places = [(each, dict(each._buffers)) for each in modules if each._buffers]
    values = [(buffer, buffer.clone()) for _, held in places for buffer in held.values() if buffer is not None]
    try:
        with torch.no_grad():
            yield
    finally:
        for each, held in places:
            each._buffers.clear()
            each._buffers.update(held)
        with torch.no_grad():
            for buffer, value in values:
                # By value: batch normalisation writes without counting a version, and a copy into a buffer that an earlier forward's graph
                # has saved would break its backward.
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


@contextmanager
def evaluating(*watched: nn.Module) -> Iterator[None]:
    """Have modules evaluate, so that none draws random numbers or counts, and give every part of them its own training flag back."""
    training = [module for root in watched for module in root.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Let a module run for us alone: in evaluation, without gradients and the compiler; random streams, buffers and flags are then as before."""
    devices = {tensor.device for tensor in [*module.parameters(), *module.buffers()]}
    with torch.no_grad(), random_streams_kept(devices), buffers_kept(module), evaluating(module), torch.compiler.set_stance("force_eager"):
        yield
