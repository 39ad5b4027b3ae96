"""The statistics of `feature_transform` in a run: whose images they are of, when FiLM begins to act, and what is refused."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_unet import SmallUNet, inputs, randomise
from torch import Tensor

from vlmfilm_plugin import warmup_vlm_cache
from vlmfilm_plugin.errors import ConditionError, FeatureError, MissingFeatureError
from vlmfilm_plugin.features.training_images import evenly
from vlmfilm_plugin.film.feature_statistics import Statistics
from vlmfilm_plugin.film.module import FilmModule
from vlmfilm_plugin.host_spec import UNet
from vlmfilm_plugin.run.runtime import Runtime

RANGE = (0.0, 1.0)


class Run:
    """A runtime, a UNet of it that FiLM moves, and a data set of its host on disk: `train/i.png`, `val/i.png`."""

    def __init__(self, root: Path, mode: str = "on", *, train: int = 12, listed: bool = True, **variables: str) -> None:
        self.root = root
        environ = {"VLM_FILM_ENCODER": "descriptor", "VLM_FILM_CACHE_DIR": "cache", "VLM_FILM_COND_DIM": "4", **variables}
        self.runtime = Runtime(mode, environ, str(root))
        self.files = {split: make_images(root / split, count) for split, count in (("train", train), ("val", 5))}
        if listed:
            for split in ("val", "train"):
                self.runtime.learn_image_files((f"{split}/{file.name}", str(file)) for file in self.files[split])
        torch.manual_seed(0)
        self.unet = SmallUNet()
        self.handle = self.runtime.attach(self.unet, UNet(cls=SmallUNet, targets={"post_block2": "ups.*.1"}))
        randomise(self.film)

    @property
    def film(self) -> FilmModule:
        film: FilmModule = self.unet.vlm_film
        return film

    @property
    def statistics(self) -> Statistics | None:
        assert self.film.feature_transform is not None
        return self.film.feature_transform.statistics

    @property
    def provider(self) -> Any:
        return self.runtime.states.of(self.film).provider

    def step(self, *numbers: int, phase: str = "train", owner: Any = None, **fields: Any) -> Tensor:
        split = "train" if phase == "train" else "val"
        files = [self.files[split][number] for number in numbers]
        batch = {"image": torch.zeros(len(files), 1, 8, 8), "name": [f"{split}/{file.name}" for file in files], "filepath": files, **fields}
        with self.runtime.batch(batch, phase=phase, value_range=RANGE, owner=owner):
            out: Tensor = self.unet(*inputs(len(files)))
        return out

    def mean_of(self, files: list[Path]) -> Tensor:
        mean: Tensor = self.provider.of_images(files).double().mean(0).float()
        return mean


def make_images(folder: Path, count: int) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{number:03}.png" for number in range(count)]
    for number, file in enumerate(files):
        pixels = np.random.default_rng([len(folder.name), number]).integers(0, 256, (12, 12), dtype=np.uint8)
        Image.fromarray(pixels // 2 if folder.name == "train" else pixels).save(file)
    return files


def plain() -> Tensor:
    torch.manual_seed(0)
    out: Tensor = SmallUNet()(*inputs(2))
    return out


# Listed by the host's data sets


def test_the_mean_is_of_the_listed_training_images_alone_and_there_before_the_first_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path)
    out = run.step(3, 4)
    found = run.statistics
    assert found is not None and found.facts.is_frozen and (found.facts.split, found.facts.count) == ("train", 12)
    assert torch.equal(found.mean, run.mean_of(run.files["train"]))
    assert found.facts.encoder == run.film.architecture.fingerprint
    # Its output is that of the centred feature, from the first step on.
    by_hand = Run(tmp_path, VLM_FILM_FEATURE_TRANSFORM="none")
    given = run.provider.of_images([run.files["train"][3], run.files["train"][4]]) - found.mean
    assert by_hand.handle is not None
    with by_hand.handle.condition(given):
        assert torch.equal(by_hand.unet(*inputs(2)), out)
    text = capsys.readouterr().out
    assert "encoded 10 of 12 training images before the first step" in text
    assert "feature_transform center: statistics of 12 images, evenly from the 12 of the training split, such as unknown:train/000.png" in text
    run.step(0, 1, phase="val")
    run.step(5, 6)
    assert run.statistics is found


def test_what_was_warmed_is_looked_up_and_the_statistics_are_the_same_with_a_full_and_an_empty_store(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = Run(tmp_path / "a")
    empty.step(0, 1)
    full = Run(tmp_path / "b", VLM_FILM_ON_MISSING_FEATURE="error")
    warmup_vlm_cache(tmp_path / "b" / "train", encoder="descriptor", cache_dir=str(tmp_path / "b" / "cache"), show_progress=False)
    capsys.readouterr()
    full.step(0, 1)
    assert empty.statistics is not None and full.statistics is not None
    assert torch.equal(empty.statistics.mean, full.statistics.mean)
    assert "encoded" not in capsys.readouterr().out
    # The counts of the cache are those of batches.
    assert (full.provider.stats.total, empty.provider.stats.total) == (2, 2)
    with pytest.raises(MissingFeatureError, match="train/"):
        Run(tmp_path / "c", VLM_FILM_ON_MISSING_FEATURE="error").step(0, 1)


def test_of_a_large_split_256_images_spread_evenly_are_taken(tmp_path: Path) -> None:
    assert evenly(list(range(5)), 8) == [0, 1, 2, 3, 4] and evenly(list(range(600)), 3) == [0, 200, 400]
    run = Run(tmp_path, train=300)
    run.step(0, 1)
    assert run.provider.stats.total == 2
    assert run.statistics is not None and run.statistics.facts.count == 256
    chosen = evenly(run.files["train"], 256)
    assert len(set(chosen)) == 256 and torch.equal(run.statistics.mean, run.mean_of(chosen))


def test_one_image_under_many_names_counts_once_and_alone_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path / "a")
    for file in run.files["train"][4:]:
        file.write_bytes(run.files["train"][0].read_bytes())
    run.step(1, 2)
    assert run.statistics is not None and run.statistics.facts.count == 4
    assert torch.equal(run.statistics.mean, run.mean_of(run.files["train"][:4]))
    alone = Run(tmp_path / "b", train=1)
    with pytest.raises(FeatureError, match="the mean of one image is that image") as caught:
        alone.step(0)
    assert "feature_transform: none" in str(caught.value)


def test_standardize_is_refused_where_the_training_images_are_alike_in_a_dimension(tmp_path: Path) -> None:
    # Flat images have no contrast: the descriptor's columns for it are zero for all of them.
    flat = Run(tmp_path / "flat", VLM_FILM_FEATURE_TRANSFORM="standardize", VLM_FILM_ACCEPT_NARROW_RANGE="true")
    for number, file in enumerate(flat.files["train"]):
        Image.fromarray(np.full((12, 12), 20 * number, np.uint8)).save(file)
    with pytest.raises(FeatureError, match="cannot standardize features: they are constant in a dimension") as caught:
        flat.step(0, 1)
    assert "feature_transform: center" in str(caught.value)
    run = Run(tmp_path / "textured", VLM_FILM_FEATURE_TRANSFORM="standardize")
    run.step(0, 1)
    assert run.statistics is not None and run.statistics.std is not None
    features = run.provider.of_images(run.files["train"])
    torch.testing.assert_close(run.film.transform(features).std(0, correction=0), torch.ones(features.shape[1]), rtol=1e-4, atol=1e-4)


# Stored by a warm-up, where nothing lists them


def test_without_a_list_what_is_stored_of_the_training_split_stands_for_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for stored, is_enough in ((63, False), (64, True)):
        run = Run(tmp_path / str(stored), train=70, listed=False)
        run.provider.get(run.provider.samples_of({"split": "train", **named(run, range(stored))}, torch.zeros(stored, 1, 8, 8), RANGE))
        run.provider.get(
            run.provider.samples_of({"split": "val", "filepath": run.files["val"], "name": list("abcde")}, torch.zeros(5, 1, 8, 8), RANGE)
        )
        run.step(0, 1, split="train")
        assert run.statistics is not None and run.statistics.facts.is_frozen == is_enough
        if is_enough:
            assert torch.equal(run.statistics.mean, run.mean_of(run.files["train"][:stored]))
    assert "evenly from the 64 that are stored as train:... (split train)" in capsys.readouterr().out


def named(run: Run, numbers: range) -> dict[str, Any]:
    files = [run.files["train"][number] for number in numbers]
    return {"filepath": files, "name": [f"train/{file.name}" for file in files]}


# Counted as batches come


def test_counted_statistics_leave_film_the_identity_until_eight_and_are_frozen_at_256(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path, train=260, listed=False)
    for start in (0, 2, 4):
        out = run.step(start, start + 1)
        assert torch.equal(out, plain())
        out.square().mean().backward()
        # A parameter without a gradient would stop DDP; one with another than zero would train on nothing.
        assert all(p.grad is not None and float(p.grad.abs().sum()) == 0 for p in run.film.parameters())
    assert torch.equal(run.step(0, 1, phase="val"), plain()), "a validation in between"
    assert not torch.equal(run.step(6, 7), plain())
    assert run.statistics is not None and run.statistics.facts.count == 8 and not run.statistics.facts.is_frozen
    run.step(0, 0, 1)
    assert run.statistics.facts.count == 8
    for start in range(8, 260, 4):
        run.step(*range(start, start + 4))
    frozen = run.statistics
    assert frozen.facts.is_frozen and frozen.facts.count == 256
    torch.testing.assert_close(frozen.mean, run.mean_of(run.files["train"][:256]))
    run.step(258, 259)
    assert run.statistics is frozen
    text = capsys.readouterr().out
    assert text.count("cannot be listed") == 1 and text.count(", frozen") == 1 and "[FILM-WARN]" not in text


def test_a_run_that_stays_the_identity_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path, listed=False)
    for _ in range(30):
        run.step(0, 1, 2)
    text = capsys.readouterr().out
    assert (
        text.count("[FILM-WARN] FiLM is still the identity after 25 training steps") == 1
        and "needs 8 different training images and has seen 3" in text
    )


def test_the_count_of_a_killed_run_goes_on_where_its_checkpoint_was(tmp_path: Path) -> None:
    batches = [tuple(range(start, start + 3)) for start in range(0, 255, 3)] + [(0, 255)]
    straight = Run(tmp_path / "straight", train=256, listed=False)
    for batch in batches:
        straight.step(*batch)
    resumed = Run(tmp_path / "resumed", train=256, listed=False)
    for number, batch in enumerate(batches):
        resumed.step(*batch)
        if number in (1, 40):
            file = io.BytesIO()
            torch.save(resumed.unet.state_dict(), file)
            file.seek(0)
            resumed = Run(tmp_path / "resumed", train=256, listed=False)
            resumed.unet.load_state_dict(torch.load(file, weights_only=True))
    state = [{name: value for name, value in run.unet.state_dict().items() if "feature_transform" in name} for run in (straight, resumed)]
    assert straight.statistics is not None and straight.statistics.facts.is_frozen
    assert all(torch.equal(value, state[1][name]) for name, value in state[0].items())


# What is there stays


def test_a_resumed_run_keeps_its_statistics_and_one_on_other_data_says_whose_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = Run(tmp_path / "a")
    first.step(0, 1)
    for folder, is_other in (("a", False), ("b", True)):
        again = Run(tmp_path / folder, train=12 if not is_other else 20)
        again.unet.load_state_dict(first.unet.state_dict())
        capsys.readouterr()
        again.step(0, 1)
        again.step(2, 3)
        text = capsys.readouterr().out
        assert text.count("feature_transform center: statistics that were loaded are kept, of 12 images") == 1
        assert ("; this run trains on other images (evenly from the 20 of" in text) == is_other
        assert first.statistics is not None and again.statistics is not None and torch.equal(again.statistics.mean, first.statistics.mean)


def test_a_copy_made_before_has_them_and_evaluates_with_them(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.unet.ema = copy.deepcopy(run.unet)
    run.step(0, 1)
    out = run.step(0, 1, phase="val")
    run.unet, kept = run.unet.ema, run.unet
    assert torch.equal(run.step(0, 1, phase="val"), out) and kept is not run.unet


def test_shuffle_donors_are_transformed_with_the_same_statistics(tmp_path: Path) -> None:
    on, shuffled = Run(tmp_path), Run(tmp_path, "shuffle")
    assert torch.equal(shuffled.step(0, 1), on.step(1, 0))
    shuffled.step(0, phase="val")
    assert on.statistics is not None and shuffled.statistics is not None
    assert torch.equal(on.statistics.mean, shuffled.statistics.mean)


# Evaluation without them


class Owner:
    """A model whose trainer says what it does."""

    def __init__(self, doing: str | None) -> None:
        state = type("State", (), {"fn": doing})()
        self._trainer = None if doing is None else type("Trainer", (), {"state": state})()


@pytest.mark.parametrize(("phase", "doing"), [("test", None), ("predict", None), ("val", None), ("val", "validate"), ("test", "test")])
def test_an_evaluation_of_trained_weights_without_statistics_is_refused(tmp_path: Path, phase: str, doing: str | None) -> None:
    run = Run(tmp_path)
    with pytest.raises(ConditionError, match="cannot condition an evaluation: `feature_transform` has no statistics") as caught:
        run.step(0, 1, phase=phase, owner=Owner(doing))
    assert "nothing has been trained in this process" in str(caught.value) and "feature_transform: none" in str(caught.value)
    assert run.statistics is None


def test_an_evaluation_of_a_run_that_was_killed_before_its_mean_was_ready_is_refused_and_not_a_baseline(tmp_path: Path) -> None:
    run = Run(tmp_path / "a", listed=False)
    run.step(0, 1, 2)
    run.unet.ema = copy.deepcopy(run.unet)
    run.step(0, 1, phase="test")  # of the training that goes on
    later = Run(tmp_path / "a", listed=False)
    later.unet.load_state_dict({name: value for name, value in run.unet.state_dict().items() if not name.startswith("ema.")})
    for phase in ("val", "test"):
        with pytest.raises(ConditionError, match="cannot condition an evaluation") as caught:
            later.step(0, 1, phase=phase)
        assert "3 images so far, the first different ones of training in what was loaded" in str(caught.value)
    run.unet = run.unet.ema
    run.step(0, 1, phase="test")


def test_a_validation_before_the_first_step_is_the_plain_hosts(tmp_path: Path) -> None:
    sanity = Run(tmp_path)
    assert torch.equal(sanity.step(0, 1, phase="val", owner=Owner("fit")), plain())
    fresh = Run(tmp_path)
    fresh.film.reset()
    assert torch.equal(fresh.step(0, 1, phase="val"), plain())
    for run in (sanity, fresh):
        run.step(0, 1)
        assert run.statistics is not None and run.statistics.facts.count == 12


def test_mode_off_looks_for_nothing_and_is_the_plain_host(tmp_path: Path) -> None:
    run = Run(tmp_path, "off")
    for phase in ("train", "test"):
        assert torch.equal(run.step(0, 1, phase=phase), plain())
    assert run.statistics is None and not (tmp_path / "cache").exists()
