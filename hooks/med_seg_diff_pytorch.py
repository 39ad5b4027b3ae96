"""Host adapter for med-seg-diff-pytorch: `Unet` and its diffusion wrapper `MedSegDiff`.

Images are in [0, 1] and have no names; a caller who has names publishes them: `with vlmfilm_plugin.running_batch({...}, phase=...)`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from vlmfilm_plugin.host_spec import HostSpec, Steps, UNet, hookimpl, one_each

NAME = "med-seg-diff-pytorch"
TARGETS = {"post_block2": "ups.*.1", "post_block1": "ups.*.0"}


@hookimpl
def vlmfilm_host(module: ModuleType) -> HostSpec | None:
    """Describe the package's one module, or return None."""
    unet, diffusion = vars(module).get("Unet"), vars(module).get("MedSegDiff")
    if not (inspect.isclass(unet) and inspect.isclass(diffusion)):
        return None
    if not {"dim_mults", "input_img_channels"} <= set(inspect.signature(unet.__init__).parameters):
        return None
    if not hasattr(diffusion, "sample"):
        return None
    steps = Steps(cls=diffusion, phases={"forward": phase_of_loss, "sample": "test"}, value_range=(0.0, 1.0), batch=batch_of)
    return HostSpec(name=NAME, unets=[UNet(cls=unet, targets=TARGETS, stages=stages_of, channel_axis=1)], models=[diffusion], steps=[steps])


def stages_of(unet: Any) -> list[str]:
    """Return the stages of the decoder, bottleneck first: each has a resolution of its own."""
    return one_each("ups", unet.ups)


def phase_of_loss(diffusion: Any) -> str:
    """Return the phase of a call that computes the loss: a model in eval mode validates."""
    return "train" if diffusion.training else "val"


def batch_of(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the condition images as a batch; (B, H, W) is one channel, as the host takes it."""
    image = arguments["cond_img"]
    return {"image": image[:, None] if image.ndim == 3 else image}
