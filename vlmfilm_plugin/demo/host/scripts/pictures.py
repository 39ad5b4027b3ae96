"""Train, or evaluate, a small UNet on patches beside pictures: a plain loop, without a framework.

python scripts/pictures.py train|evaluate --data FOLDER --checkpoint FILE [--steps 400] [--seed 0] [--output FILE]
"""

import argparse
import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from src.archs.components.diffusion_unet import MedSegDiffUNet
from torch import nn

BATCH = 8


def load(folder, split):
    content = np.load(folder / f"{split}.npz")
    files = [str(folder / split / f"{number:04d}.png") for number in range(len(content["masks"]))]
    return torch.from_numpy(content["patches"]), torch.from_numpy(content["masks"]).float(), files


def build(seed):
    torch.manual_seed(seed)
    return MedSegDiffUNet(8, 32, dim_mult=(1, 2), full_self_attn=(False, False), attn_heads=1, attn_dim_head=8)


def published(batch, phase, step):
    """A loop of one's own tells which batch is running; without VLM_FILM_MODE there is nothing to tell."""
    if not os.environ.get("VLM_FILM_MODE"):
        return nullcontext()
    import vlmfilm_plugin

    return vlmfilm_plugin.running_batch(batch, phase=phase, value_range=(-4.0, 4.0), step=step)


def forward(unet, patches, files, phase, step):
    with published({"image": patches, "filepath": files, "split": phase}, phase, step):
        return unet(torch.zeros_like(patches), torch.zeros(len(patches)), patches)


def train(options):
    patches, masks, files = load(options.data, "train")
    unet = build(options.seed)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
    draw = torch.Generator().manual_seed(options.seed)
    for step in range(options.steps):
        rows = torch.randperm(len(files), generator=draw)[:BATCH]
        output = forward(unet, patches[rows], [files[row] for row in rows], "train", step)
        loss = nn.functional.binary_cross_entropy_with_logits(output, masks[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0 or step == options.steps - 1:
            print(f"step {step} loss {loss.item():.4f}", flush=True)
    torch.save(unet.state_dict(), options.checkpoint)


@torch.no_grad()
def evaluate(options):
    patches, masks, files = load(options.data, "test")
    unet = build(options.seed)
    unet.load_state_dict(torch.load(options.checkpoint, weights_only=True))
    unet.eval()
    dices = []
    for start in range(0, len(files), 16):
        part = slice(start, start + 16)
        found = forward(unet, patches[part], files[part], "test", start // 16) > 0
        both = (found & masks[part].bool()).flatten(1).sum(1)
        total = found.flatten(1).sum(1) + masks[part].bool().flatten(1).sum(1)
        dices += (2 * both / total.clamp_min(1)).tolist()
    options.output.write_text(json.dumps({"dice": dices}))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("train", "evaluate"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    (train if options.what == "train" else evaluate)(options)


if __name__ == "__main__":
    main()
