"""Host adapter for denoising-diffusion-pytorch: `Unet` and `Unet1D`. Its `ups.{i}` are [block1, block2, attention, upsample].

The package trains unconditional diffusion: a script that segments passes its image in the UNet's input, and its steps are the script's own.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from vlmfilm_plugin.host_spec import HostSpec, UNet, has_arguments, hookimpl, one_each, own_class

NAME = "denoising-diffusion-pytorch"
TARGETS = {"post_block2": "ups.*.1", "post_block1": "ups.*.0"}


@hookimpl
def vlmfilm_host(module: ModuleType) -> HostSpec | None:
    """Describe the UNet of one of the package's modules, or return None."""
    if module.__name__.partition(".")[0] != "denoising_diffusion_pytorch":
        return None
    found = [own_class(module, name) for name in ("Unet", "Unet1D")]
    unets = [
        UNet(cls=cls, targets=TARGETS, stages=stages_of, channel_axis=1, condition=None)
        for cls in found
        if has_arguments(cls, "__init__", {"dim", "dim_mults"}) and has_arguments(cls, "forward", {"x", "time"})
    ]
    return HostSpec(name=NAME, unets=unets, is_library=True) if unets else None


def stages_of(unet: Any) -> list[str]:
    """Return the stages of the decoder, bottleneck first: all but the last upsample behind their blocks."""
    return one_each("ups", unet.ups)
