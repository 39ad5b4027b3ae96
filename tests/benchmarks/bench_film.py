"""The FiLM operation against a plain addcmul, how cost grows, memory, and a validation image; ratios within one process, CPU time.

python tests/benchmarks/bench_film.py [--rounds 40]
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "vlmfilm_plugin" / "demo" / "host"))
from src.archs.components.diffusion_unet import MedSegDiffUNet

import vlmfilm_plugin
from vlmfilm_plugin.film.feature_statistics import Facts, made_of
from vlmfilm_plugin.film.layers import modulate


def cpu_time(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def quartiles(ours: Callable[[], object], plain: Callable[[], object], rounds: int) -> tuple[list[float], float]:
    """Return the quartiles of the rounds' ratios, and the median extra time in ms; each round runs both, in an order drawn."""
    ours(), plain()
    ratios, extra = [], []
    for _ in range(rounds):
        if random.random() < 0.5:
            a, b = cpu_time(ours), cpu_time(plain)
        else:
            b, a = cpu_time(plain), cpu_time(ours)
        ratios.append(a / b)
        extra.append((a - b) * 1e3)
    return statistics.quantiles(ratios, n=4), statistics.median(extra)


def ratio(ours: Callable[[], object], plain: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Return the median of the rounds' ratios, and the median extra time in ms."""
    (_, middle, _), extra = quartiles(ours, plain, rounds)
    return middle, extra


def plain_addcmul(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return torch.addcmul(beta, gamma, x)


def operation(rounds: int) -> None:
    print("the operation against torch.addcmul of the same tensors, forward and backward")
    for shape in [(4, 32, 64, 64), (1, 32, 320, 320), (8, 128, 16, 16)]:
        x, gamma, beta = (
            torch.randn(shape, requires_grad=True),
            torch.randn(*shape[:2], 1, 1, requires_grad=True),
            torch.randn(*shape[:2], 1, 1, requires_grad=True),
        )

        def both(apply: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor = x, gamma: Tensor = gamma, beta: Tensor = beta) -> None:
            apply(x, gamma, beta).sum().backward()

        found, _ = ratio(lambda both=both: both(modulate), lambda both=both: both(plain_addcmul), rounds)
        print(f"  {shape!s:<20} {found:.3f}")


def unet_of(dim: int, size: int, stages: int) -> MedSegDiffUNet:
    torch.manual_seed(0)
    return MedSegDiffUNet(dim, size, dim_mult=(1, 2, 2, 2)[:stages], full_self_attn=(False,) * stages)


def growth(rounds: int) -> None:
    print("extra CPU time of a forward with ready features, against the same UNet without FiLM")
    print(f"  {'stages':>6} {'rows':>5} {'size':>5} {'ratio':>7} {'ms':>7}")
    for stages, rows, size in [(1, 4, 32), (2, 4, 32), (3, 4, 32), (4, 4, 32), (4, 1, 32), (4, 8, 32), (4, 32, 32), (4, 4, 64), (4, 4, 128)]:
        unet, film = unet_of(16, size, 4), unet_of(16, size, 4)
        handle = vlmfilm_plugin.attach(film, feature_dim=2048, decoder_stages=list(range(stages)))
        handle.fit(torch.randn(64, 2048))
        x, t, cond, features = torch.randn(rows, 1, size, size), torch.rand(rows), torch.randn(rows, 1, size, size), torch.randn(rows, 2048)

        def ours(
            handle: vlmfilm_plugin.FilmHandle = handle, film: MedSegDiffUNet = film, args: tuple[Tensor, ...] = (x, t, cond), f: Tensor = features
        ) -> None:
            with torch.no_grad(), handle.condition(f):
                film(*args)

        def plain(unet: MedSegDiffUNet = unet, args: tuple[Tensor, ...] = (x, t, cond)) -> None:
            with torch.no_grad():
                unet(*args)

        found, extra = ratio(ours, plain, max(6, rounds // (1 + (rows * size * size) // 32768)))
        print(f"  {stages:>6} {rows:>5} {size:>5} {found:>7.4f} {extra:>7.2f}")


def transform(rounds: int) -> None:
    print("a forward in pairs: median of the ratios (quartiles), extra CPU time in ms")
    for rows, size in [(4, 32), (4, 64)]:
        unets = [unet_of(16, size, 4) for _ in range(3)]
        given, centred = (vlmfilm_plugin.attach(unet, feature_dim=2048) for unet in unets[1:])
        centred.fit(torch.randn(64, 2048))
        args, features = (torch.randn(rows, 1, size, size), torch.rand(rows), torch.randn(rows, 1, size, size)), torch.randn(rows, 2048)

        def forward(handle: vlmfilm_plugin.FilmHandle, args: tuple[Tensor, ...] = args, features: Tensor = features) -> None:
            with torch.no_grad(), handle.condition(features):
                handle.unet(*args)

        def plain(unet: MedSegDiffUNet = unets[0], args: tuple[Tensor, ...] = args) -> None:
            with torch.no_grad():
                unet(*args)

        on_given, on_centred = (functools.partial(forward, handle) for handle in (given, centred))
        pairs = {"centred / as given": (on_centred, on_given), "centred / plain": (on_centred, plain), "as given / plain": (on_given, plain)}
        for name, (ours, theirs) in pairs.items():
            (low, middle, high), extra = quartiles(ours, theirs, rounds)
            print(f"  {rows} rows of {size} x {size}  {name:<18} {middle:.4f} ({low:.4f} to {high:.4f}) {extra:>7.3f}")


def memory() -> None:
    """Count what autograd keeps for backward, the peak's moving part: bytes of saved tensors, each storage once."""
    print("bytes that autograd keeps for the backward of a training step, on against plain")
    unet = unet_of(16, 64, 4)
    args = torch.randn(4, 1, 64, 64), torch.rand(4), torch.randn(4, 1, 64, 64)

    def kept() -> int:
        seen: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            unet(*args).sum().backward()
        return sum(seen.values())

    plain = kept()
    with vlmfilm_plugin.attach(unet, feature_dim=2048) as handle, handle.condition(torch.randn(4, 2048)):
        ours = kept()
    print(f"  {ours / plain:.4f}  ({ours / 2**20:.1f} MiB against {plain / 2**20:.1f} MiB)")


def validation(rounds: int) -> None:
    """A validation image as the demo's host does it: sliding windows, many solver steps, the condition from a stored feature."""
    import logging
    import os
    import tempfile

    import numpy as np
    from PIL import Image

    folder = tempfile.mkdtemp()
    os.environ |= {
        "VLM_FILM_MODE": "on",
        "VLM_FILM_ENCODER": "descriptor",
        "VLM_FILM_CACHE_DIR": folder,
        "VLM_FILM_FILM_LOG_EVERY_N_STEPS_VAL": "1000000",
    }
    from src.archs.flow_model import FlowModel

    sizes = {"image_size": 64, "model_channels": 16, "channel_mult": [1, 2, 2, 2], "attn_resolutions": [], "timesteps": 50}
    vlmfilm_plugin.activate()
    film = FlowModel(**sizes).eval()
    held = film.unet.base_unet.vlm_film
    held.take_statistics(made_of(torch.randn(64, held.architecture.feature_dim), Facts(None, "train", "the benchmark"), ["center"]))
    plain = copy.deepcopy(film)
    for module in plain.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    del plain.unet.base_unet.vlm_film
    assert hasattr(film.unet.base_unet, "vlm_film") and not hasattr(plain.unet.base_unet, "vlm_film")
    logging.getLogger("vlmfilm.film").setLevel(logging.ERROR)
    path = Path(folder) / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (112, 112), dtype=np.uint8)).save(path)
    batch = {"image": torch.randn(1, 1, 112, 112), "label": torch.zeros(1, 1, 112, 112), "name": ["val/image.png"], "filepath": [str(path)]}

    def step(model: FlowModel) -> None:
        torch.manual_seed(0)
        with torch.no_grad():
            model.validation_step(batch, 1)

    calls: list[int] = []
    handle = film.unet.base_unet.register_forward_pre_hook(lambda module, args: calls.append(1))
    step(film)
    handle.remove()
    found, extra = ratio(lambda: step(film), lambda: step(plain), max(4, rounds // 8))
    print(f"a validation image of {len(calls)} UNet calls, on against plain: {found:.4f}, {extra:.1f} ms more")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    operation(rounds)
    growth(rounds)
    transform(4 * rounds)
    memory()
    # Last, and with no UNet alive: it activates this process.
    gc.collect()
    validation(rounds)


if __name__ == "__main__":
    main()
