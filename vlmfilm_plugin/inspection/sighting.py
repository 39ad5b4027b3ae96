"""What a host's run told at its first UNet forward: the step that ran, where its images are, and what names its rows."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vlmfilm_plugin.features.batch_names import RowNames
from vlmfilm_plugin.inspection.batches import Condition, FoundImage, condition_in, images_in
from vlmfilm_plugin.inspection.callers import Caller, lightning_steps, phase_of
from vlmfilm_plugin.inspection.calls import Call
from vlmfilm_plugin.inspection.report import SeenUNet
from vlmfilm_plugin.rows.data_set_items import VOLUMES
from vlmfilm_plugin.rows.ledger import Ledger

FILE, BATCH, NONE = "file", "batch", "none"


@dataclass
class Facts:
    """What is known of the run.

    Attributes:
        callers: the host's functions that were running, outermost first.
        step: the one that handles a batch; None: the UNet's own call.
        phases: its methods -> phase.
        image: the batch's images in its arguments, or in the UNet's.
        value_range: smallest and largest value of the images.
        condition: where the UNet's forward holds them.
        rows: where rows get their names: `file`, `batch`, or `none`; `why` says more.
    """

    callers: Sequence[Caller]
    step: Caller | None
    phases: Mapping[str, str]
    image: FoundImage | None
    value_range: tuple[float, float] | None
    shape: tuple[int, ...]
    condition: Condition | None
    arguments: Sequence[str]
    rows: str
    why: str
    is_mapping: bool
    optimizers: Sequence[str] = field(default_factory=list)
    files: Sequence[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "callers": [{"name": each.text, "where": each.where} for each in self.callers],
            "step": None if self.step is None else {"name": self.step.text, "where": self.step.where, "phases": dict(self.phases)},
            "image": None if self.image is None else self.image.text,
            "value_range": self.value_range,
            "condition": None if self.condition is None else {"in": self.condition.text, "proved": self.condition.is_proved},
            "rows": {"named_by": self.rows, "why": self.why},
            "optimizers": list(self.optimizers),
            "checkpoints": list(self.files),
        }


@dataclass(frozen=True)
class Sighting:
    """A UNet that was seen in a host's run."""

    unet: SeenUNet
    cls: type
    facts: Facts


def facts_of(root: Call, unet: Call, callers: Sequence[Caller], ledger: Ledger) -> Facts:
    """Return what the stack, the arguments and the ledger say of a UNet forward that has just returned."""
    given = _bound(unet)
    around = [*callers, *_modules_around(unet)]
    # Functions of no class, and of the script, are no steps of a `Steps` record.
    usable = [caller for caller in around if caller.cls is not None and caller.is_reachable and caller.module != "__main__"]
    step: Caller | None = None
    image: FoundImage | None = None
    for caller in usable:
        found = images_in(caller.arguments, ledger)
        if found is not None or (caller.cls is not None and caller.name.rpartition(".")[2] in lightning_steps(caller.cls)):
            step, image = caller, found
            break
    if step is None:
        # Beside a mask or noise, in one tensor: whoever is next to the UNet has the very rows that it is called with.
        for caller in usable[::-1]:
            if (found := images_in(caller.arguments, ledger, in_channels=True)) is not None:
                step, image = caller, found
                break
    if image is None:
        image = _image_by_name(step.arguments) if step is not None else images_in(given, ledger)
    condition = condition_in(given, image, ledger)
    if step is None and image is None and condition is not None:
        tensor, channels = given[condition.argument], condition.channels
        tensor = tensor if channels is None else tensor[:, channels[0] : channels[1]]
        image = FoundImage(condition.argument, (), tensor, condition.is_proved, None, channels)
    phases = {}
    if step is not None:
        method = step.name.rpartition(".")[2]
        phases = lightning_steps(step.cls) if step.cls is not None else {}
        phases = phases if method in phases else {method: phase_of(step.name, is_training=unet.module.training)}
    rows, why = _names(image, step, ledger)
    holder = None if step is None or image is None else step.arguments.get(image.argument)
    return Facts(
        callers=around,
        step=step,
        phases=phases,
        image=image,
        value_range=None if image is None else _range(image.tensor),
        shape=() if image is None else tuple(image.tensor.shape),
        condition=condition,
        arguments=[*inspect.signature(type(unet.module).forward).parameters][1:],
        rows=rows,
        why=why,
        is_mapping=isinstance(holder, Mapping),
    )


def _bound(call: Call) -> dict[str, Any]:
    """Return the arguments of a call by name."""
    args, kwargs = call.values or ((), {})
    try:
        bound = inspect.signature(type(call.module).forward).bind(call.module, *args, **kwargs).arguments
    except TypeError:
        return dict(kwargs)
    bound.pop(next(iter(bound)))
    named = dict(bound)
    for name, value in bound.items():
        if isinstance(value, dict) and name not in kwargs:
            named.pop(name)
            named.update(value)
    return named


def _modules_around(unet: Call) -> list[Caller]:
    """Return the host's modules whose forward called the UNet, outermost first: their functions are over when the root has returned."""
    found = []
    for call in list(unet.above())[::-1]:
        cls = type(call.module)
        if cls.__module__.split(".")[0] != "torch":
            forward = next((each for each in cls.__mro__ if "forward" in vars(each)), cls)
            is_reachable = "<locals>" not in forward.__qualname__ and forward is not type(unet.module)
            found.append(Caller(forward.__module__, f"{forward.__qualname__}.forward", forward, "", _bound(call), is_reachable))
    return found


def _image_by_name(arguments: Mapping[str, Any]) -> FoundImage | None:
    for argument, value in arguments.items():
        if isinstance(value, Mapping):
            for key in ("image", "img", "images", "input", "x"):
                if isinstance(value.get(key), Tensor):
                    return FoundImage(argument, (key,), value[key], False)
    return None


def _range(tensor: Tensor) -> tuple[float, float]:
    values = tensor.detach().as_subclass(Tensor).float()
    return float(values.min()), float(values.max())


def _names(image: FoundImage | None, step: Caller | None, ledger: Ledger) -> tuple[str, str]:
    if image is None:
        return NONE, "the images of the batch were not found in what the host's functions were given"
    files = ledger.files_of(image.tensor)
    if files.paths and all(path is not None for path in files.paths):
        if any(str(path).lower().endswith(VOLUMES) for path in files.paths):
            return NONE, f"{files.paths[0]} is a volume or an array: the encoder sees what `batch` below hands it"
        return FILE, f"the data set opens one image file for each, {files.paths[0]} for one"
    held = None if step is None else step.arguments.get(image.argument)
    if isinstance(held, Mapping):
        names = RowNames.find(held, image.tensor.shape[0])
        if names.names is not None:
            return BATCH, f"{names.source} names them, {names.names[0]!r} for one"
    return NONE, files.reason
