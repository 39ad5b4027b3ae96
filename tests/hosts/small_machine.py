"""What a host needs on a machine without torchvision: launchers import this before anything of the host's."""

from __future__ import annotations

import importlib.util
import sys
import types

import torch


def provide_torchvision() -> None:
    """Put a stand-in where torchvision is not installed: hosts import it to draw their images."""
    if importlib.util.find_spec("torchvision") is not None:
        return
    import torchmetrics  # noqa: F401 - it looks for torchvision itself and must not find the stand-in

    package, utils = types.ModuleType("torchvision"), types.ModuleType("torchvision.utils")
    utils.make_grid = lambda images, **_: torch.cat(list(images), dim=-1)  # type: ignore[attr-defined]
    package.utils = utils  # type: ignore[attr-defined]
    sys.modules |= {"torchvision": package, "torchvision.utils": utils}
