"""Train, then sample: `segmentation.py DATA OUT WORKERS:START`."""

import os
import sys

import numpy as np
import torch
from torch.utils.data import DataLoader

sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.isicloader import ISICDataset
from guided_diffusion.train_util import TrainLoop
from guided_diffusion.unet import UNetModel


def to_tensor(image):
    values = torch.from_numpy(np.array(image)).float() / 255
    return values[None] if values.dim() == 2 else values.permute(2, 0, 1).contiguous()


def main(data_dir, out_dir, workers):
    torch.manual_seed(0)
    count, _, start = workers.partition(":")
    more = {"num_workers": int(count), "multiprocessing_context": start, "persistent_workers": True} if int(count) else {}
    loader = DataLoader(ISICDataset(None, data_dir, to_tensor), batch_size=5, shuffle=True, **more)
    data = iter(loader)
    model, diffusion = UNetModel(64, 4, 8, 2, 1, ()), GaussianDiffusion(betas=None)
    loop = {"model": model, "classifier": None, "diffusion": diffusion, "data": data, "dataloader": loader, "batch_size": 5, "microbatch": 3}
    TrainLoop(**loop, lr=1e-3, out_dir=out_dir).run_loop(2)
    model = UNetModel(64, 4, 8, 2, 1, ())
    model.load_state_dict(torch.load(os.path.join(out_dir, "savedmodel.pt")))
    model.eval()
    for b, _m, _path in DataLoader(ISICDataset(None, data_dir, to_tensor, mode="Test"), batch_size=1):
        diffusion.p_sample_loop_known(model, (1, 3, 64, 64), torch.cat((b, torch.randn_like(b[:, :1])), dim=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
