import csv
import os

from PIL import Image
from torch.utils.data import Dataset


class ISICDataset(Dataset):
    def __init__(self, args, data_path, transform=None, mode="Training", plane=False):
        with open(os.path.join(data_path, f"ISBI2016_ISIC_Part3B_{mode}_GroundTruth.csv")) as file:
            self.name_list = [row[0] for row in csv.reader(file)][1:]
        self.data_path, self.mode, self.transform = data_path, mode, transform

    def __len__(self):
        return len(self.name_list)

    def __getitem__(self, index):
        folder, name = os.path.join(self.data_path, f"ISBI2016_ISIC_Part3B_{self.mode}_Data"), self.name_list[index]
        img = self.transform(Image.open(os.path.join(folder, name + ".jpg")).convert("RGB"))
        mask = self.transform(Image.open(os.path.join(folder, name + "_Segmentation.png")).convert("L"))
        return (img, mask) if self.mode == "Training" else (img, mask, name + ".jpg")
