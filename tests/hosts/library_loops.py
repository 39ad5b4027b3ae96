"""Loops of users around a library's UNet, as scripts: `library_loops.py KIND MODE_OF_START FOLDER`; nothing names a row but where a loop says so."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import row_probe
import torch
from monai.inferers import SlidingWindowInferer, sliding_window_inference
from monai.networks.nets import BasicUNet, DynUNet
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import vlmfilm_plugin


class Pictures(Dataset[Any]):
    def __init__(self, files: list[Path], crop: int | None) -> None:
        self.files, self.crop = files, crop

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        image = torch.from_numpy(np.asarray(Image.open(self.files[index]).convert("L")).astype(np.float32) / 255)[None]
        if self.crop:
            top, left = torch.randint(0, image.shape[-1] - self.crop + 1, (2,)).tolist()
            image = image[:, top : top + self.crop, left : left + self.crop]
        return image, (image > 0.5).float()


def loss_of(unet: Any, image: Any, mask: Any, step: int) -> Any:
    with vlmfilm_plugin.running_batch({"image": image}, phase="train", step=step):
        return torch.nn.functional.binary_cross_entropy_with_logits(unet(image), mask)


def plain(unet: Any, loader: Any, files: list[Path]) -> None:
    optimizer = torch.optim.SGD(unet.parameters(), 0.0)
    for step, (image, mask) in enumerate(loader):
        optimizer.zero_grad()
        loss_of(unet, image, mask, step).backward()
        optimizer.step()


def accelerated(unet: Any, loader: Any, files: list[Path]) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    unet, optimizer, loader = accelerator.prepare(unet, torch.optim.SGD(unet.parameters(), 0.0), loader)
    for step, (image, mask) in enumerate(loader):
        optimizer.zero_grad()
        accelerator.backward(loss_of(unet, image, mask, step))
        optimizer.step()


def lightning(unet: Any, loader: Any, files: list[Path]) -> None:
    import lightning.pytorch as L

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.unet = unet

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return loss_of(self.unet, *batch, self.global_step)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.0)

    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    L.Trainer(max_epochs=1, accelerator="cpu", **quiet).fit(Module(), loader)


def windows(unet: Any, loader: Any, files: list[Path]) -> None:
    unet.eval()
    whole = DataLoader(Pictures(files, None), batch_size=1, num_workers=2, multiprocessing_context=loader.multiprocessing_context)
    for number, (image, _) in enumerate(whole):
        with torch.no_grad(), vlmfilm_plugin.running_batch({"image": image}, phase="test"):
            if number % 2:
                SlidingWindowInferer(32, sw_batch_size=4, overlap=0.25, mode="gaussian")(image, unet)
            else:
                sliding_window_inference(image, 32, 3, unet)


def make_volumes(files: list[Path], folder: Path) -> list[Path]:
    """Write a volume for each picture, twelve copies of it, darker towards both ends, in NIfTI; and what its projection is."""
    import nibabel

    views = []
    for number, file in enumerate(files):
        picture = np.asarray(Image.open(file).convert("L")).astype(np.float32) / 255
        volume = np.stack([picture] * 12, axis=-1)
        nibabel.Nifti1Image(volume, np.eye(4)).to_filename(folder / f"volume{number}.nii.gz")
        views.append(folder / f"view{number}.pt")
        torch.save(torch.from_numpy(volume)[None].amax(-1), views[-1])
    return views


def volumes(unet: Any, loader: Any, files: list[Path]) -> None:
    """Train on random patches of volumes, then slide windows over whole ones; FiLM sees the projection of each whole volume."""
    from monai.data import DataLoader as MonaiLoader
    from monai.data import Dataset as MonaiDataset
    from monai.transforms import Compose, CopyItemsd, EnsureChannelFirstd, Lambdad, LoadImaged, RandSpatialCropd

    folder = files[0].parent
    seen = [
        LoadImaged(["image"]),
        EnsureChannelFirstd(["image"]),
        CopyItemsd(["image"], names=["view"]),
        Lambdad(["view"], lambda volume: volume.amax(-1)),
    ]
    items = [{"image": str(folder / f"volume{number}.nii.gz")} for number in range(len(files))]
    cropped = MonaiDataset(items, Compose([*seen, RandSpatialCropd(["image"], (32, 32, 8), random_size=False)]))
    optimizer = torch.optim.SGD(unet.parameters(), 0.0)
    more: dict[str, Any] = {"num_workers": 2, "multiprocessing_context": loader.multiprocessing_context}
    for step, batch in enumerate(MonaiLoader(cropped, batch_size=3, shuffle=True, **more)):
        optimizer.zero_grad()
        with vlmfilm_plugin.running_batch({"image": batch["view"]}, phase="train", step=step, is_whole=True):
            unet(batch["image"]).mean().backward()
        optimizer.step()
    unet.eval()
    for batch in MonaiLoader(MonaiDataset(items, Compose(seen)), batch_size=1, **more):
        with torch.no_grad(), vlmfilm_plugin.running_batch({"image": batch["view"]}, phase="test", is_whole=True):
            sliding_window_inference(batch["image"], (32, 32, 8), 4, unet)


def main(kind: str, start: str, folder: Path) -> None:
    files = sorted(folder.glob("*.png"))
    torch.manual_seed(0)
    if kind == "volumes":
        unet: Any = DynUNet(3, 1, 1, [3] * 3, [1, 2, 2], [2, 2], filters=[4, 4, 8])
    else:
        unet = BasicUNet(2, 1, 1, (4, 4, 4, 4, 4, 4))
    loader = DataLoader(Pictures(files, 48), batch_size=4, shuffle=True, num_workers=2, multiprocessing_context=start)
    {"plain": plain, "lightning": lightning, "accelerated": accelerated, "windows": windows, "volumes": volumes}[kind](unet, loader, files)


if __name__ == "__main__":
    row_probe.watch("input")
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
