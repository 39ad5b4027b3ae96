"""Host adapter for the sofl-seg family: Lightning modules around a MedSegDiff UNet with `ups.{i}` = [block1, block2, attention, upsample].

Its package is called `src`, a name many repos use: a module counts as this host only by its structure.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import Any

from vlmfilm_plugin.errors import HostError, SettingsError
from vlmfilm_plugin.host_spec import (
    Config,
    HostSpec,
    ImageFiles,
    Listing,
    Masks,
    Model,
    RowView,
    SourceImage,
    Steps,
    UNet,
    has_arguments,
    hookimpl,
    one_each,
    own_class,
    rows_seen_before,
)

NAME = "sofl-seg"
# Images are scaled to [-1, 1] by the host's data sets.
VALUE_RANGE = (-1.0, 1.0)
TARGETS = {"post_block2": "ups.*.1", "post_block1": "ups.*.0"}
PHASES = {"training_step": "train", "validation_step": "val", "test_step": "test"}
UNET_ARGUMENTS = {"dim", "image_size", "mask_channels", "input_img_channels", "dim_mult"}
# The argument through which later commits condition FiLM of their own, and the model's argument that switches it on.
OWN_CONDITION, OWN_FILM = "vlm_cond", "use_vlm_film"
INSTEAD = f"take `{OWN_FILM}` out of the model's configuration, and start the plain scripts/train.py"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
# Settings of the port that stand beside `vlm_film_config`.
BESIDE_CONFIG = ("use_vlm_film", "vlm_film_decoder_stages", "junction_gating_config")


@hookimpl
def vlmfilm_host(module: ModuleType) -> HostSpec | None:
    """Describe the part of the host that `module` is, or return None."""
    describe = {"diffusion_unet": _unets, "train_runner": _runner, "base_dataset": _datasets}.get(module.__name__.rsplit(".", 1)[-1], _models)
    return describe(module)


@hookimpl
def vlmfilm_listing(config: Mapping[str, Any], splits: Sequence[str]) -> Listing | None:
    """List the images of `data.{split}_dir` (or `data.{split}_..._dir`) of a training YAML, named as the data sets name them."""
    model, data = config.get("model"), config.get("data")
    if not (isinstance(model, Mapping) and isinstance(data, Mapping) and "arch_name" in model):
        return None
    arguments = {"config": config}
    images = [image for split in splits for folder in _split_folders(data, split) for image in _images_of(folder, split)]
    return Listing(host=NAME, images=images, settings=read_config(arguments), resume=read_resume(arguments))


def _split_folders(data: Mapping[str, Any], split: str) -> list[str]:
    names = [name for name in data if isinstance(name, str) and name.startswith(f"{split}_") and name.endswith("_dir")]
    wrong = [name for name in names if data[name] and not isinstance(data[name], str)]
    if wrong:
        raise HostError(f"cannot list the images of {split}", {"found": f"data.{wrong[0]}: {data[wrong[0]]!r}", "expected": "a folder"}, "correct it")
    return [data[name] for name in names if data[name]]


def _images_of(folder: str, split: str) -> list[SourceImage]:
    try:
        files = sorted(os.listdir(os.path.join(folder, "image")))
    except OSError as error:
        raise HostError(
            f"cannot list the images of {split}",
            {"folder": os.path.join(folder, "image"), "system said": error.strerror, "working directory": os.getcwd()},
            "correct the folder in the configuration, or start in the host's root folder",
        ) from error
    prefix = f"{os.path.basename(folder)}/image"
    return [
        SourceImage(path=os.path.abspath(os.path.join(folder, "image", file)), fields={"name": [f"{prefix}/{file}"]})
        for file in files
        if file.lower().endswith(IMAGE_SUFFIXES)
    ]


def _unets(module: ModuleType) -> HostSpec | None:
    # A UNet of this family builds its decoder from ResnetBlocks and is called as unet(x, time, cond).
    if not has_arguments(vars(module).get("ResnetBlock"), "forward", {"x"}):
        return None
    unets = [
        UNet(
            cls=value,
            targets=TARGETS,
            stages=stages_of,
            channel_axis=1,
            own_condition=OWN_CONDITION,
            own_film=partial(own_film_of_class, value),
            masks=Masks(state=mask_in_input, prediction=mask_logits, truth=true_mask),
        )
        for value in vars(module).values()
        if inspect.isclass(value)
        and value.__module__ == module.__name__
        and has_arguments(value, "__init__", UNET_ARGUMENTS)
        and has_arguments(value, "forward", {"x", "time", "cond"})
    ]
    return HostSpec(name=NAME, unets=unets) if unets else None


def _models(module: ModuleType) -> HostSpec | None:
    found = [own_class(module, name) for name in vars(module)]
    models = [cls for cls in found if has_arguments(cls, "__init__", {"arch_name"}) and hasattr(cls, "load_from_checkpoint")]
    if not models:
        return None
    steps = [
        Steps(cls=cls, phases={method: phase for method, phase in PHASES.items() if method in vars(cls)}, value_range=VALUE_RANGE, rows=rows_of)
        for cls in models
    ]
    return HostSpec(name=NAME, models=[Model(cls=cls, own_film=own_film_of_model) for cls in models], steps=steps)


def _runner(module: ModuleType) -> HostSpec | None:
    runner = own_class(module, "TrainRunner")
    if not has_arguments(runner, "__init__", {"config"}):
        return None
    return HostSpec(name=NAME, configs=[Config(cls=runner, method="__init__", read=read_config, resume=read_resume)])


def _datasets(module: ModuleType) -> HostSpec | None:
    dataset = own_class(module, "BaseOCTDataset")
    if not has_arguments(dataset, "__init__", {"path", "augmentation"}):
        return None
    return HostSpec(name=NAME, image_files=[ImageFiles(cls=dataset, read=read_image_files)])


def stages_of(unet: Any) -> list[str]:
    """Return the stages of the decoder, bottleneck first: each has a resolution of its own."""
    return one_each("ups", unet.ups)


def own_film_of_model(arguments: Mapping[str, Any]) -> str | None:
    """Tell how to use the plugin where a model of a later commit is built with FiLM of its own."""
    return INSTEAD if arguments.get(OWN_FILM) else None


def own_film_of_class(cls: type, unet: Any) -> str | None:
    """Tell how to use the plugin where a UNet built by hand is of a subclass with FiLM in its own forward."""
    is_own = type(unet).forward is not cls.forward and has_arguments(type(unet), "forward", {OWN_CONDITION})  # type: ignore[attr-defined]
    return f"build {cls.__name__} instead of {type(unet).__name__}" if is_own else None


def read_image_files(dataset: Any) -> list[tuple[str, str]]:
    """Return name and file of every image: a collated batch keeps the names, but only its first row's file."""
    return [(item["name"], os.path.abspath(item["image"])) for item in dataset.data]


def read_config(arguments: Mapping[str, Any]) -> Mapping[str, object]:
    """Return the FiLM settings of the YAML's `model:` block."""
    model = arguments["config"].get("model") or {}
    given = model.get("vlm_film_config") or {}
    if not isinstance(given, Mapping):
        facts = {"found": f"{given!r}   (from model.vlm_film_config)", "expected": "a mapping of setting names to values"}
        raise SettingsError("cannot use the host's FiLM settings", facts, "write one `name: value` a line below `vlm_film_config:`")
    settings = dict(given)
    settings.update({name: model[name] for name in BESIDE_CONFIG if name in model})
    return settings


def read_resume(arguments: Mapping[str, Any]) -> str | None:
    """Return the checkpoint that the runner will resume from."""
    resume: str | None = arguments["config"].get("resume")
    return resume


def mask_in_input(x: Any) -> Any:
    """Return the mask in x (R, mask channels, H, W): its first channel, which is in [-1, 1], or 0 and 1 where the flow is discrete."""
    return (x[:, :1] > 0).float()


def mask_logits(output: Any) -> Any:
    """Return the first channel of the output: logits, or a velocity or mask of which the positive part means vessel."""
    return output[:, :1]


def true_mask(batch: Any) -> Any:
    """Return the labels of a batch, 0 and 1."""
    label = batch["label"]
    return label[:, None] if label.dim() == 3 else label


def rows_of(view: RowView) -> Sequence[int] | None:
    """Map UNet rows to samples: patches repeat each sample in a row (training); windows are all of the one image (evaluation).

    Discrete flow matching calls the UNet again, in a fifth of the steps, on two of the rows drawn at random.
    """
    if view.phase == "train":
        is_again, samples = rows_seen_before(view)
        if is_again:
            return samples
        repeats, rest = divmod(view.rows, view.samples)
        return None if rest or not repeats else [row // repeats for row in range(view.rows)]
    if view.samples == 1:
        return [0] * view.rows
    # Several images a batch: windows of a call mix them. Only whole images, passed as they are, can be told apart.
    is_whole = view.condition is not None and view.condition.shape == view.image.shape and bool((view.condition == view.image).all())
    return range(view.rows) if is_whole else None
