"""A little segmentation repo in a folder: nets, data, and scripts of several kinds. Its authors have never heard of FiLM."""

from __future__ import annotations

from pathlib import Path

import numpy
from PIL import Image

NETS = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self, inner, outer):
        super().__init__()
        self.first, self.norm = nn.Conv2d(inner, outer, 3, padding=1), nn.BatchNorm2d(outer)
        self.second = nn.Conv2d(outer, outer, 3, padding=1)

    def forward(self, x):
        return self.second(torch.relu(self.norm(self.first(x))))

class Net(nn.Module):
    def __init__(self, channels=3):
        super().__init__()
        self.down = nn.ModuleList([Block(channels, 4), Block(4, 6), Block(6, 8)])
        self.up = nn.ModuleList([Block(14, 6), Block(10, 4)])
        self.out = nn.Conv2d(4, 1, 1)

    def forward(self, x, t=None):
        kept = []
        for level, block in enumerate(self.down):
            x = block(nn.functional.max_pool2d(x, 2) if level else x)
            kept.append(x)
        for level, block in enumerate(self.up):
            x = block(torch.cat([nn.functional.interpolate(x, scale_factor=2.0), kept[1 - level]], 1))
        return self.out(x)

def build():
    torch.manual_seed(0)
    return Net()

def nothing():
    return 3

def broken():
    raise RuntimeError("no weights here")
"""
DATA = """
from pathlib import Path
import numpy, torch
from PIL import Image

class Pictures(torch.utils.data.Dataset):
    files = sorted(Path("data/image").glob("*.png"))

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        image, mask = (numpy.array(Image.open(file)) for file in (self.files[index], f"data/mask/{self.files[index].name}"))
        return torch.from_numpy(image).permute(2, 0, 1) / 255, torch.from_numpy(mask)[None] / 255

def loader(workers=0):
    return torch.utils.data.DataLoader(Pictures(), batch_size=2, shuffle=True, num_workers=workers)
"""
# A plain loop, which tries its net on noise before, keeps what it has when it is stopped, and says goodbye.
LOOP = """
import atexit, sys, torch
from data import loader
from nets import Net

def main(workers):
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    if "noise" in sys.argv:
        with torch.no_grad():
            net(torch.rand(1, 3, 32, 32))
    atexit.register(lambda: open("goodbye.txt", "w").close())
    open("started.txt", "w").close()
    try:
        for image, mask in loader(workers):
            loss = ((net(image) - mask) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        torch.save({key: value for key, value in net.state_dict().items() if "vlm_film" not in key}, "net.pt")
    except BaseException:
        torch.save(net.state_dict(), "stopped.pt")
        raise
    finally:
        open("finally.txt", "w").close()

if __name__ == "__main__":
    main(int(sys.argv[1]))
"""
# The diffusion kind: the image and a noisy mask are channels of one tensor; the trainer is a class of a module.
TRAINER = """
import torch

class Trainer:
    def __init__(self, net):
        self.net = net
        self.optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)

    def run(self, loader):
        for image, mask in loader:
            self.step(torch.cat([image, mask], 1))

    def step(self, both):
        image, mask = both[:, :3], both[:, 3:]
        x = torch.cat([image, mask + 0.1 * torch.randn_like(mask)], 1)
        loss = ((self.net(x, t=torch.zeros(len(x))) - mask) ** 2).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
"""
DIFFUSION = """
import torch
from data import loader
from nets import Net
from trainer import Trainer

torch.manual_seed(0)
trainer = Trainer(Net(4))
trainer.run(loader())
torch.save({key: value for key, value in trainer.net.state_dict().items() if "vlm_film" not in key}, "net.pt")
"""


def make(folder: Path) -> Path:
    """Write the repo, with six pictures, and return its folder."""
    draw = numpy.random.default_rng(0)
    for kind in ("image", "mask"):
        (folder / "data" / kind).mkdir(parents=True)
    for number in range(6):
        pixels = draw.integers(0, 255, (32, 32, 3), dtype=numpy.uint8)
        Image.fromarray(pixels).save(folder / "data" / "image" / f"{number}.png")
        Image.fromarray(((pixels[..., 0] > 128) * 255).astype(numpy.uint8)).save(folder / "data" / "mask" / f"{number}.png")
    for name, text in {"nets": NETS, "data": DATA, "loop": LOOP, "trainer": TRAINER, "diffusion": DIFFUSION, **OTHERS}.items():
        (folder / f"{name}.py").write_text(text)
    return folder


OTHERS = {
    "raises": "import torch\nraise ValueError('no data today')\n",
    "ends": "import torch\nfrom nets import Net\nNet()\n",
    "no_torch": "print('hello')\n",
    "classifier": (
        "import torch\nfrom torch import nn\nnet = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 1))\n"
        "optimizer = torch.optim.SGD(net.parameters(), lr=1.0)\nnet(torch.rand(1, 1, 8, 8)).sum().backward()\noptimizer.step()\n"
        "open('updated.txt', 'w').close()\n"
    ),
    "spawned": (
        "import torch.multiprocessing\n\ndef run(rank):\n    from loop import main\n    main(0)\n\n"
        "if __name__ == '__main__':\n    torch.multiprocessing.spawn(run, nprocs=1)\n    open('after.txt', 'w').close()\n"
    ),
    "compiled": (
        "import torch\nfrom data import loader\nfrom nets import Net\nnet = torch.compile(Net(), backend='eager')\n"
        "for image, mask in loader():\n    net(image)\nopen('after.txt', 'w').close()\n"
    ),
    "lit": (
        "import lightning\nfrom nets import Net\nimport torch\n\nclass Lit(lightning.LightningModule):\n"
        "    def __init__(self):\n        super().__init__()\n        self.net = Net()\n\n"
        "    def training_step(self, batch, batch_idx):\n        image, mask = batch\n        return ((self.net(image) - mask) ** 2).mean()\n\n"
        "    def validation_step(self, batch, batch_idx):\n        self.net(batch[0])\n\n"
        "    def configure_optimizers(self):\n        return torch.optim.SGD(self.parameters(), lr=1e-2)\n"
    ),
    "lightning_run": (
        "import lightning\nfrom data import loader\nfrom lit import Lit\nlightning.seed_everything(0)\n"
        "trainer = lightning.Trainer(max_epochs=1, accelerator='cpu', logger=False, enable_progress_bar=False, default_root_dir='lit_runs')\n"
        "trainer.fit(Lit(), loader(), loader())\n"
    ),
}
