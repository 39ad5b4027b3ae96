"""Tracers that turn a forward into a graph: gamma and beta would be constants of it, those of the images that were there."""

from __future__ import annotations

import sys

import torch

from vlmfilm_plugin.errors import ConditionError


def refuse_tracer(owner: str) -> None:
    """Check that no tracer records this forward of a UNet.

    Raises:
        ConditionError: one does; whatever the graph is called with, it would be conditioned on the images of now.
    """
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        found = "torch.jit.trace, which torch.onnx.export may use"
    else:
        # Not there unless someone traces.
        module = sys.modules.get("torch.fx.experimental.proxy_tensor")
        if module is None or module.get_proxy_mode() is None:
            return
        found = "torch.export or make_fx"
    raise ConditionError(
        f"cannot trace this {owner}: FiLM's gamma and beta would be constants of the graph, those of the images in force now",
        {"found": found, "expected": "a forward that runs, or is compiled by torch.compile"},
        "trace with mode off, which is the host's own network, or use torch.compile",
    )
