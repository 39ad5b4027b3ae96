"""Patches, sliding windows and scores shared by the Lightning modules."""

import random

import torch


def select_patch_params(patch_plan):
    """Draw one (patch size, patches an image) of the plan."""
    return random.choice(patch_plan) if patch_plan else (None, 0)


def random_patch_batch(tensors, patch_size, num_patches):
    """Cut the same random patches out of every (B, C, H, W) tensor; sample i gives `num_patches` rows in a row.

    Tensors smaller than the patch are returned whole, one row a sample.
    """
    batch, _, height, width = tensors[0].shape
    if not patch_size or num_patches < 1 or patch_size > min(height, width):
        return tensors
    tops = torch.randint(height - patch_size + 1, (batch * num_patches,)).tolist()
    lefts = torch.randint(width - patch_size + 1, (batch * num_patches,)).tolist()
    corners = list(enumerate(zip(tops, lefts, strict=True)))
    return [torch.stack([t[row // num_patches, :, y : y + patch_size, x : x + patch_size] for row, (y, x) in corners]) for t in tensors]


def _starts(length, window, overlap):
    if length <= window:
        return [0]
    stride = max(1, int(window * (1 - overlap)))
    return [*range(0, length - window, stride), length - window]


def sliding_window(inputs, window, predict, rows_per_call=4, overlap=0.25):
    """Run `predict` on windows of `inputs` (B, C, H, W), image after image, and average where windows overlap."""
    height, width = inputs.shape[-2:]
    boxes = [(y, x) for y in _starts(height, window, overlap) for x in _starts(width, window, overlap)]
    results = []
    for image in inputs:
        total, weight = None, torch.zeros(1, height, width, device=inputs.device)
        for first in range(0, len(boxes), rows_per_call):
            part = boxes[first : first + rows_per_call]
            outputs = predict(torch.stack([image[:, y : y + window, x : x + window] for y, x in part]))
            if total is None:
                total = outputs.new_zeros(outputs.shape[1], height, width)
            for (y, x), output in zip(part, outputs, strict=True):
                total[:, y : y + window, x : x + window] += output
                weight[:, y : y + window, x : x + window] += 1
        results.append(total / weight)
    return torch.stack(results)


def dice_and_iou(probability, label):
    """Return Dice and IoU of each row, (B,) each; both are 1 where nothing is there and nothing was found."""
    found, wanted = (probability > 0.5).flatten(1), (label > 0.5).flatten(1)
    both, either = (found & wanted).sum(1).float(), (found | wanted).sum(1).float()
    iou = torch.where(either > 0, both / either.clamp(min=1), torch.ones_like(both))
    return 2 * iou / (1 + iou), iou
