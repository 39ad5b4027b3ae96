"""Host adapter for the official MedSegDiff (`guided_diffusion`): `UNetModel` and the diffusion that trains and samples it.

OpenAI's package has the same name: a module counts as this host by the highway network beside its UNet, and by the segmentation loss.
Batches have no names; ISIC's images are found by the row ledger. BraTS slices are four sequences in NIfTI files, which are no images: the
encoder sees the last one (FLAIR), scaled by its own smallest and largest value, as the loader gives it (neither cropped at random nor augmented).
"""

from __future__ import annotations

import csv
import inspect
import os
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from vlmfilm_plugin.errors import HostError
from vlmfilm_plugin.host_spec import HostSpec, Listing, SourceImage, Steps, UNet, by_resolution, has_arguments, hookimpl, one_each, own_class

NAME = "MedSegDiff"
TARGETS = {"post_block2": "output_blocks.*.0"}
UNET_ARGUMENTS = {"image_size", "in_channels", "model_channels", "out_channels", "num_res_blocks", "attention_resolutions", "conv_resample"}
LOSS = "training_losses_segmentation"
SAMPLERS = ("p_sample_loop_known", "ddim_sample_loop_known")
# Splits, and what ISIC's loader calls them in its file names.
ISIC_MODES = {"train": "Training", "test": "Test"}


@hookimpl
def vlmfilm_host(module: ModuleType) -> HostSpec | None:
    """Describe `guided_diffusion.unet` or `guided_diffusion.gaussian_diffusion`, or return None."""
    diffusion = own_class(module, "GaussianDiffusion")
    if diffusion is not None:
        return _diffusion(diffusion)
    if own_class(module, "Generic_UNet") is None:
        return None
    unets = [value for value in vars(module).values() if _is_unet(value, module)]
    described = [UNet(cls=cls, targets=TARGETS, stages=stages_of, channels=channels_of, channel_axis=1, condition=None) for cls in unets]
    return HostSpec(name=NAME, unets=described) if described else None


@hookimpl
def vlmfilm_listing(config: Mapping[str, Any], splits: Sequence[str]) -> Listing | None:
    """List the images of ISIC when `config` has the arguments of the host's scripts: `data_name: ISIC`, `data_dir: ...`, relative to here."""
    name, folder = config.get("data_name"), config.get("data_dir")
    if not isinstance(name, str) or not isinstance(folder, str) or set(config) & {"model", "data"}:
        return None
    if name != "ISIC":
        raise HostError(
            f"cannot list the images of {name}",
            {"found": f"data_name {name}", "expected": "ISIC: slices in NIfTI files are encoded as the loader passes them, which a list cannot say"},
            "start training without a warm-up: every slice is encoded once and kept",
        )
    images = [image for split in splits if split in ISIC_MODES for image in _isic_images(folder, ISIC_MODES[split])]
    return Listing(host=NAME, images=images)


def _isic_images(folder: str, mode: str) -> list[SourceImage]:
    table = os.path.join(folder, f"ISBI2016_ISIC_Part3B_{mode}_GroundTruth.csv")
    if mode == ISIC_MODES["test"] and not os.path.isfile(table):
        return []
    try:
        with open(table, encoding="gbk", newline="") as file:
            names = [row[0] for row in csv.reader(file) if row][1:]
    except OSError as error:
        facts = {"file": table, "system said": error.strerror, "working directory": os.getcwd()}
        raise HostError("cannot list the images of ISIC", facts, "correct `data_dir`") from error
    paths = [os.path.abspath(os.path.join(folder, f"ISBI2016_ISIC_Part3B_{mode}_Data", f"{name}.jpg")) for name in names]
    return [SourceImage(path=path, fields={"filepath": [path]}) for path in paths]


def _diffusion(cls: Any) -> HostSpec | None:
    if not has_arguments(cls, LOSS, {"x_start", "t"}):
        return None
    samplers = {name: "test" for name in SAMPLERS if has_arguments(cls, name, {"img"})}
    steps = [
        Steps(cls=cls, phases={LOSS: phase_of_loss}, value_range=(0.0, 1.0), batch=batch_of_loss, loaded=loaded_for_loss, is_whole=True),
        Steps(cls=cls, phases=samplers, value_range=(0.0, 1.0), batch=batch_of_sampler, loaded=loaded_for_sampler, is_whole=True),
    ]
    return HostSpec(name=NAME, steps=steps)


def phase_of_loss(diffusion: Any) -> str:
    """Return the phase of a call that computes the loss: the host has no validation."""
    return "train"


def channels_of(block: Any) -> int:
    """Return the channels of a ResBlock's output."""
    channels: int = block.out_channels
    return channels


def stages_of(unet: Any) -> list[list[str]]:
    """Return the blocks of each resolution, bottleneck first: the last one of a resolution upsamples behind its first layer."""
    ends = [any("Upsample" in type(layer).__name__ for layer in block.modules()) for block in unet.output_blocks]
    return by_resolution(one_each("output_blocks", unet.output_blocks), [True, *ends[:-1]])


def loaded_for_loss(arguments: Mapping[str, Any]) -> Any:
    """Return the images of a microbatch: the mask is its last channel."""
    return arguments["x_start"][:, :-1]


def loaded_for_sampler(arguments: Mapping[str, Any]) -> Any:
    """Return the images to segment: the last channel is noise."""
    return arguments["img"][:, :-1]


def batch_of_loss(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a microbatch's images as a batch."""
    return {"image": shown(loaded_for_loss(arguments))}


def batch_of_sampler(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the images to segment as a batch."""
    return {"image": shown(loaded_for_sampler(arguments))}


def shown(images: Any) -> Any:
    """Return (B, C, H, W) as an encoder can see it, in [0, 1]: colours as they are, of several sequences the last, scaled by its own range."""
    if images.shape[1] in (1, 3):
        return images
    last = images[:, -1:].float()
    low = last.amin(dim=(1, 2, 3), keepdim=True)
    span = last.amax(dim=(1, 2, 3), keepdim=True) - low
    return (last - low) / span.clamp(min=1e-8)


def _is_unet(value: Any, module: ModuleType) -> bool:
    is_own = inspect.isclass(value) and value.__module__ == module.__name__
    # The encoder of a classifier has no decoder, but an argument `pool`.
    if not is_own or has_arguments(value, "__init__", {"pool"}):
        return False
    return has_arguments(value, "__init__", UNET_ARGUMENTS) and has_arguments(value, "forward", {"x", "timesteps"})
