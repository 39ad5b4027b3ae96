"""Angiography frames in `{train,val,test}/{image,label}/*.png`, every frame normalised by itself."""

import lightning.pytorch as L
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from src.data.base_dataset import BaseOCTDataset
from src.registry.base import DATASET_REGISTRY


def normalise(pixels):
    """Stretch one image to [-1, 1]: its darkest pixel to -1, its brightest to 1."""
    pixels = pixels.astype(np.float32)
    low, high = pixels.min(), pixels.max()
    return (pixels - low) / max(high - low, 1.0) * 2 - 1


class AngioDataset(BaseOCTDataset):
    """One split; training images are flipped at random."""

    def __getitem__(self, index):
        sample = self.data[index]
        image = torch.from_numpy(normalise(np.asarray(Image.open(sample["image"]).convert("L"))))[None]
        label = torch.from_numpy(np.asarray(Image.open(sample["label"]).convert("L")) > 127).float()[None]
        if self.augmentation:
            dims = [dim for dim, flip in zip((-2, -1), torch.rand(2) < 0.5, strict=True) if flip]
            image, label = image.flip(dims), label.flip(dims)
        return {
            "image": image,
            "label": label,
            "geometry": label * 2 - 1,
            "coordinate": torch.stack(torch.meshgrid(*(torch.linspace(-1, 1, n) for n in label.shape[-2:]), indexing="xy")),
            "name": sample["name"],
            "image_meta_dict": {"filename_or_obj": sample["image"]},
        }


@DATASET_REGISTRY.register("angio")
class AngioDataModule(L.LightningDataModule):
    def __init__(self, train_dir="data/angio/train", val_dir="data/angio/val", test_dir="data/angio/test", train_bs=8, num_workers=0):
        super().__init__()
        self.folders = {"train": train_dir, "val": val_dir, "test": test_dir}
        self.train_bs = train_bs
        self.num_workers = num_workers

    def _loader(self, split, batch_size, train=False):
        data = AngioDataset(self.folders[split], augmentation=train)
        return DataLoader(data, batch_size=batch_size, shuffle=train, drop_last=train, num_workers=self.num_workers)

    def train_dataloader(self):
        return self._loader("train", self.train_bs, train=True)

    def val_dataloader(self):
        return self._loader("val", 1)

    def test_dataloader(self):
        return self._loader("test", 1)
