"""A task that only the condition solves, with features that are alike: the default heads learn it from centred features, and not from raw ones,
which a plain loop by hand is told."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vlmfilm_plugin import FilmHandle, attach

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


def dice(net: Net, handle: FilmHandle, given: Tensor, classes: Tensor) -> float:
    x, target = batch(classes, 999)
    with torch.no_grad(), handle.condition(given):
        found = (net(x) > 0).float()
    return float(2 * (found * target).sum() / (found.sum() + target.sum()))


def step(net: Net, handle: FilmHandle, optimizer: torch.optim.Optimizer, given: Tensor, classes: Tensor, number: int) -> None:
    rows = torch.randint(0, 192, (8,), generator=torch.Generator().manual_seed(number))
    x, target = batch(classes[rows], number)
    with handle.condition(given[rows]):
        loss = nn.functional.binary_cross_entropy_with_logits(net(x), target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def train(is_fitted: bool, seed: int = 0, steps: int = 200) -> tuple[float, float, dict[int, dict[str, object]]]:
    """Train with the default heads; return Dice with a picture's own feature and with one of the other class, and what FiLM does."""
    given, classes = features()
    torch.manual_seed(seed)
    net = Net()
    handle = attach(net, feature_dim=WIDTH, targets="blocks.*", mode="on")
    if is_fitted:
        handle.fit(given[:64])
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    for number in range(steps):
        step(net, handle, optimizer, given, classes, number)
    test = torch.arange(192, IMAGES)
    own, other = dice(net, handle, given[test], classes[test]), dice(net, handle, given[test.flip(0)], classes[test])
    return own, other, handle.statistics()


def warnings_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith(("[FILM-WARN]", "[VLM] condition"))]


def test_centred_features_reach_the_decoder_and_raw_ones_do_not() -> None:
    own, swapped, centred = train(is_fitted=True)
    assert own > 0.9 and swapped < 0.4, (own, swapped)
    raw_own, raw_swapped, raw = train(is_fitted=False)
    assert abs(raw_own - raw_swapped) < 0.1 and raw_own < 0.75, (raw_own, raw_swapped)
    spread = [[stage["between_images"]["gamma"] for stage in found.values()] for found in (centred, raw)]  # type: ignore[index]
    assert min(spread[0]) > 100 * max(spread[1]), spread


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_plain_loop_by_hand_is_warned_within_100_steps_and_a_fitted_one_never(seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    train(is_fitted=False, seed=seed, steps=101)
    lines = warnings_of(capsys)
    assert lines and all("no longer reaches the decoder" in line for line in lines), lines
    assert int(lines[0].split("step ")[1].split(":")[0]) <= 100
    assert "`handle.fit(features)` before the first step" in lines[0] and "gamma_scale" in lines[0]
    train(is_fitted=True, seed=seed, steps=101)
    assert warnings_of(capsys) == []


def saturated(mode: str = "on", **settings: object) -> tuple[Net, FilmHandle]:
    """Return a net whose heads give every image the same."""
    net = Net()
    handle = attach(net, feature_dim=WIDTH, targets="blocks.*", mode=mode, **settings)  # type: ignore[arg-type]
    with torch.no_grad():
        for head in handle.film.heads:
            head.mlp[2].bias.fill_(20.0)  # type: ignore[index, union-attr]
    return net, handle


def forwards(net: Net, handle: FilmHandle, count: int, given: Tensor | None = None) -> None:
    given = features()[0][:4] if given is None else given
    for number in range(count):
        with handle.condition(given[number % len(given)][None] if len(given) == 26 else given):
            net(torch.randn(len(given) if len(given) != 26 else 1, 2, 16, 16))


def test_only_training_forwards_with_gradients_count(capsys: pytest.CaptureFixture[str]) -> None:
    net, handle = saturated()
    with torch.no_grad():
        forwards(net, handle, 101)
    net.eval()
    forwards(net, handle, 101)
    with handle.mode("shuffle"):
        forwards(net.train(), handle, 101)
    assert warnings_of(capsys) == []
    forwards(net, handle, 1)
    assert len(warnings_of(capsys)) == 1, "the first step is a logged one"
    forwards(net, handle, 101)
    assert warnings_of(capsys) == [], "said once"


@pytest.mark.parametrize("case", ["constant", "off", "one image"])
def test_controls_and_a_single_image_are_exempt_by_hand(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    net, handle = saturated("off" if case == "off" else "on", **({"feature_control": "constant"} if case == "constant" else {}))
    forwards(net, handle, 101, features()[0][:1].expand(4, -1) if case == "one image" else None)
    assert warnings_of(capsys) == []


def test_batches_of_one_image_by_hand_are_enough(capsys: pytest.CaptureFixture[str]) -> None:
    net, handle = saturated()
    forwards(net, handle, 26, features()[0][:26])
    assert len(warnings_of(capsys)) == 1


def test_what_is_run_again_in_backward_counts_once(capsys: pytest.CaptureFixture[str]) -> None:
    from torch.utils.checkpoint import checkpoint

    net, handle = saturated(film_debug_enabled=False)
    given, x = features()[0][:4], torch.randn(4, 2, 16, 16, requires_grad=True)
    for number in range(26):
        with handle.condition(given):
            checkpoint(net, x, use_reentrant=False).sum().backward()
        assert bool(warnings_of(capsys)) == (number == 24)
