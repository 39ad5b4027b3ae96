"""A task that only the condition solves, with features that are alike: the default heads learn it from centred features, and not from raw ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlmfilm_plugin import attach

WIDTH, IMAGES = 384, 256


class Net(nn.Module):
    """Three decoder blocks with GroupNorm and SiLU, as MedSegDiff's have."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, channels, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.GroupNorm(4, channels), nn.SiLU()) for _ in range(3)
        )
        self.out = nn.Conv2d(channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for block in self.blocks:
            h = h + block(h)
        return self.out(h)


def features() -> tuple[Tensor, Tensor]:
    """Return features (N, F) of two classes as a half-precision store gives them, and the classes; their mean cosine is 0.97."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.arange(IMAGES) % 2
    own = torch.randn(IMAGES, WIDTH, generator=generator) + 0.5 * torch.randn(2, WIDTH, generator=generator)[classes]
    x = (own + 6 * torch.randn(WIDTH, generator=generator)).half().float()
    unit = nn.functional.normalize(x, dim=1)
    cosine = float((unit @ unit.T).mean())
    assert 0.95 < cosine < 0.99, cosine
    return x, classes


def batch(classes: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return pictures (B, 2, 16, 16) of two masks that look alike, and the one that the class asks for."""
    masks = (torch.rand(len(classes), 2, 16, 16, generator=torch.Generator().manual_seed(seed)) > 0.7).float()
    return masks, masks.gather(1, classes.view(-1, 1, 1, 1).expand(-1, 1, 16, 16))


def dice(net: Net, handle: object, given: Tensor, classes: Tensor) -> float:
    x, target = batch(classes, 999)
    with torch.no_grad(), handle.condition(given):  # type: ignore[attr-defined]
        found = (net(x) > 0).float()
    return float(2 * (found * target).sum() / (found.sum() + target.sum()))


def train(is_fitted: bool, seed: int = 0) -> tuple[float, float, dict[int, dict[str, object]]]:
    """Train with the default heads; return Dice with a picture's own feature and with one of the other class, and what FiLM does."""
    given, classes = features()
    torch.manual_seed(seed)
    net = Net()
    handle = attach(net, feature_dim=WIDTH, targets="blocks.*", mode="on")
    if is_fitted:
        handle.fit(given[:64])
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    for step in range(200):
        rows = torch.randint(0, 192, (8,), generator=torch.Generator().manual_seed(step))
        x, target = batch(classes[rows], step)
        with handle.condition(given[rows]):
            loss = nn.functional.binary_cross_entropy_with_logits(net(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    test = torch.arange(192, IMAGES)
    own, other = dice(net, handle, given[test], classes[test]), dice(net, handle, given[test.flip(0)], classes[test])
    return own, other, handle.statistics()


def test_centred_features_reach_the_decoder_and_raw_ones_do_not() -> None:
    own, swapped, centred = train(is_fitted=True)
    assert own > 0.9 and swapped < 0.4, (own, swapped)
    raw_own, raw_swapped, raw = train(is_fitted=False)
    assert abs(raw_own - raw_swapped) < 0.1 and raw_own < 0.75, (raw_own, raw_swapped)
    spread = [[stage["between_images"]["gamma"] for stage in found.values()] for found in (centred, raw)]  # type: ignore[index]
    assert min(spread[0]) > 100 * max(spread[1]), spread
