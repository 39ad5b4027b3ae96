"""What the data sets of this repo have in common: the files of one split, listed once."""

import os

from torch.utils.data import Dataset


class BaseOCTDataset(Dataset):
    """One split, a folder with `image/` and `label/`; `data` lists its samples."""

    def __init__(self, path, augmentation=False):
        self.path = str(path)
        self.augmentation = augmentation
        folder = os.path.join(self.path, "image")
        files = sorted(file for file in os.listdir(folder) if file.endswith(".png")) if os.path.isdir(folder) else []
        if not files:
            raise FileNotFoundError(f"no images in {folder}")
        split = os.path.basename(os.path.normpath(self.path))
        self.data = [
            {"name": f"{split}/image/{file}", "image": os.path.join(folder, file), "label": os.path.join(self.path, "label", file)}
            for file in files
        ]

    def __len__(self):
        return len(self.data)
