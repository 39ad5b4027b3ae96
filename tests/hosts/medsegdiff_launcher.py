"""Run a script of the official MedSegDiff on a small machine: stand-ins for what it imports only to draw or to log, CPU clocks, one thread.

python medsegdiff_launcher.py REPO/scripts/segmentation_train.py ARGUMENTS...

WORKERS=2:spawn gives its loaders that many workers, started that way. PROBE=1 has `row_probe` write whose feature each row got.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
import types
from typing import Any

import torch
from torch.utils.data import DataLoader

script = os.path.abspath(sys.argv[1])
sys.argv = [script, *sys.argv[2:]]
sys.path.insert(0, os.path.dirname(os.path.dirname(script)))
torch.set_num_threads(1)
torch.manual_seed(0)


def stand_in(name: str, **members: Any) -> None:
    """Put a module with these members in the place of one that is not installed."""
    try:
        found = importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        found = False
    if not found:
        module = types.ModuleType(name)
        module.__spec__ = importlib.util.spec_from_loader(name, None)
        vars(module).update(members)
        module.__path__ = []  # type: ignore[attr-defined]
        sys.modules[name] = module
        if "." in name:
            parent, _, last = name.rpartition(".")
            setattr(sys.modules[parent], last, module)


class Resize:
    def __init__(self, size: Any) -> None:
        self.size = tuple(size)

    def __call__(self, image: Any) -> Any:
        if isinstance(image, torch.Tensor):
            batch = image[None] if image.dim() == 3 else image
            return torch.nn.functional.interpolate(batch.float(), self.size, mode="bilinear").reshape(*image.shape[:-2], *self.size)
        return image.resize(self.size[::-1])


class ToTensor:
    def __call__(self, image: Any) -> Any:
        import numpy as np

        values = torch.from_numpy(np.array(image))
        return (values[None] if values.dim() == 2 else values.permute(2, 0, 1).contiguous()).float() / 255


class Compose:
    def __init__(self, steps: Any) -> None:
        self.steps = steps

    def __call__(self, image: Any) -> Any:
        for step in self.steps:
            image = step(image)
        return image


class Event:
    def __init__(self, **_: Any) -> None: ...
    def record(self) -> None: ...
    def elapsed_time(self, other: Any) -> float:
        return 0.0


def save_image(image: Any, fp: Any, **_: Any) -> None:
    torch.save(image, str(fp) + ".pt")


stand_in("torchvision")
stand_in("torchvision.utils", save_image=save_image)
stand_in("torchvision.transforms", Resize=Resize, ToTensor=ToTensor, Compose=Compose)
stand_in("torchvision.transforms.functional")
stand_in("visdom", Visdom=lambda **_: None)
stand_in("torchsummary", summary=None)
stand_in("batchgenerators")
stand_in("batchgenerators.augmentations")
stand_in("batchgenerators.augmentations.utils", pad_nd_image=None)
stand_in("scipy.ndimage.filters", gaussian_filter=None)
if not torch.cuda.is_available():
    torch.cuda.Event = Event  # type: ignore[assignment,misc]
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]

workers, _, start = os.environ.get("WORKERS", "0").partition(":")
if int(workers):
    build = DataLoader.__init__

    def with_workers(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **{**kwargs, "num_workers": int(workers), "multiprocessing_context": start, "persistent_workers": True})

    DataLoader.__init__ = with_workers  # type: ignore[method-assign]
if os.environ.get("PROBE"):
    import row_probe

    row_probe.watch(os.environ["PROBE"])

if __name__ == "__main__":
    runpy.run_path(script, run_name="__main__")
