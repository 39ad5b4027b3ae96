"""FiLM at the identity changes no bit of the stand-in host's training, and `shuffle` draws from the step alone."""

from __future__ import annotations

import json
from typing import Any

import pytest
from processes import forked, succeed
from stand_in import SETTINGS, StandIn

from vlmfilm_plugin.demo.dataset import make_dataset

# Each run is a fork of one process that has imported Lightning, but no host: it is activated, or not, by itself.
SCRIPT = """
import json, os, sys, traceback
import lightning.pytorch as L, torch
torch.set_num_threads(1)
DATA, ROOT = os.environ["DATA"], os.environ["ROOT"]

class Curve(L.Callback):
    def __init__(self):
        self.losses, self.permutations = [], {}
    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]).hex())

def host(mode, seed=0, bs=2):
    if mode is not None:
        os.environ["VLM_FILM_MODE"] = mode
        import vlmfilm_plugin
        vlmfilm_plugin.activate()
    from src.archs.flow_model import FlowModel
    from src.data.angio import AngioDataModule
    L.seed_everything(seed)
    size = dict(image_size=16, patch_plan=[[16, 2]], timesteps=2, model_channels=8, channel_mult=[1, 2], attn_resolutions=[])
    model = FlowModel(arch_name="medsegdiff_flow", **size)
    return model, AngioDataModule(*(f"{DATA}/{split}" for split in ("train", "val", "test")), train_bs=bs)

def film_of(model):
    return getattr(model.unet.base_unet, "vlm_film", None)

def train(model, data, epochs, ckpt=None, **options):
    curve = Curve()
    options = {"check_val_every_n_epoch": 4, **options}
    trainer = L.Trainer(max_epochs=epochs, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
                        enable_checkpointing=False, callbacks=[curve], **options)
    trainer.fit(model, data, ckpt_path=ckpt, weights_only=False)
    return trainer, curve.losses

def curve(mode, freeze=True, clip=0.05, film_lr=None):
    model, data = host(mode)
    film = film_of(model)
    assert (film is None) == (mode is None)
    if film is not None and freeze:
        film.requires_grad_(False)
    if film_lr is not None:
        own = {id(p) for p in film.parameters()} if film is not None else set()
        host_and_film = [[p for p in model.parameters() if (id(p) in own) == is_film] for is_film in (False, True)]
        groups = [{"params": some, "lr": lr} for some, lr in zip(host_and_film, (1e-3, film_lr))]
        model.configure_optimizers = lambda: torch.optim.AdamW([group for group in groups if group["params"]])
    _, losses = train(model, data, 10, gradient_clip_val=clip)
    import hashlib
    state = {name: value for name, value in model.state_dict().items() if "vlm_film" not in name}
    digest = hashlib.sha256(b"".join(value.numpy().tobytes() for value in state.values())).hexdigest()
    return {"losses": losses, "weights": digest, "stream": torch.rand(1).item()}

def permutations(epochs=8, seed=0, ckpt=None, save=None, **options):
    from vlmfilm_plugin.run import running_batch as batches
    seen = []
    shuffle = batches.RunningBatch._shuffle
    def spy(self, *arguments):
        result = shuffle(self, *arguments)
        if self.given.phase == "train":
            seen.append([self.given.step, list(result[1])])
        return result
    batches.RunningBatch._shuffle = spy
    model, data = host("shuffle", seed, bs=4)
    if "accumulate_grad_batches" in options:
        images = data.train_dataloader().dataset
        data.train_dataloader = lambda: torch.utils.data.DataLoader(images + images, batch_size=4)
    trainer, _ = train(model, data, epochs, ckpt, **options)
    if save:
        trainer.save_checkpoint(save)
    return seen

def run(name, function, *arguments, **options):
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            print()
            print("RESULT", json.dumps([name, function(*arguments, **options)]), flush=True)
        except BaseException:
            traceback.print_exc()
        os._exit(0)
    os.waitpid(child, 0)

run("plain", curve, None)
run("plain again", curve, None)
run("on", curve, "on")
run("off", curve, "off", freeze=False)
run("shuffle", curve, "shuffle")
run("plain without clipping", curve, None, clip=None, film_lr=0.0)
run("on at learning rate 0", curve, "on", freeze=False, clip=None, film_lr=0.0)
run("on and trained", curve, "on", freeze=False)
run("permutations", permutations)
run("of another seed", permutations, seed=7, check_val_every_n_epoch=1)
run("first half", permutations, epochs=4, seed=3, save=f"{ROOT}/half.ckpt")
run("second half", permutations, seed=5, ckpt=f"{ROOT}/half.ckpt")
run("accumulated", permutations, accumulate_grad_batches=2)
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what each run gave, by name."""
    host = StandIn(tmp_path_factory.mktemp("determinism"))
    # Two validation images: each is the other's donor in mode shuffle.
    make_dataset(host.data, train=4, val=2, test=3, size=32, seed=0)
    script = host.root / "runs.py"
    script.write_text(SCRIPT)
    variables = {**SETTINGS, "VLM_FILM_CACHE_DIR": str(host.root / "cache"), "VLM_FILM_FILM_LOG_EVERY_N_STEPS_TRAIN": "3"}
    # Frozen heads are what is compared here.
    variables |= {"VLM_FILM_STRICT": "0", "VLM_FILM_FEATURE_TRANSFORM": "none"}
    result = forked(script, cwd=host.repo, PYTHONPATH=str(host.repo), DATA=str(host.data), ROOT=str(host.root), **variables)
    lines = [line.split(" ", 1)[1] for line in succeed(result).splitlines() if line.startswith("RESULT ")]
    found: dict[str, Any] = dict(json.loads(line) for line in lines)
    assert len(found) == 13, result.stderr[-4000:]
    return found


def test_the_host_itself_is_deterministic(results: dict[str, Any]) -> None:
    assert results["plain again"] == results["plain"]
    assert len(results["plain"]["losses"]) == 20 and len(set(results["plain"]["losses"])) == 20


@pytest.mark.parametrize("mode", ["on", "off", "shuffle"])
def test_with_heads_frozen_at_the_identity_training_equals_the_plain_host_bit_for_bit(results: dict[str, Any], mode: str) -> None:
    assert results[mode] == results["plain"]


def test_with_film_at_learning_rate_zero_training_equals_the_plain_host_bit_for_bit(results: dict[str, Any]) -> None:
    assert results["on at learning rate 0"] == results["plain without clipping"]


def test_a_trained_film_starts_where_the_plain_host_does_and_then_leaves_its_curve(results: dict[str, Any]) -> None:
    trained, plain = results["on and trained"]["losses"], results["plain"]["losses"]
    assert trained[0] == plain[0] and trained[-1] != plain[-1]
    # The host's random stream is where it was: FiLM drew nothing from it.
    assert results["on and trained"]["stream"] == results["plain"]["stream"]


def test_shuffle_draws_each_steps_permutation_from_the_step_alone(results: dict[str, Any]) -> None:
    expected = results["permutations"]
    assert [step for step, _ in expected] == list(range(8))
    assert len({tuple(permutation) for _, permutation in expected}) > 1
    assert results["of another seed"] == expected
    assert results["first half"] == expected[:4]
    assert results["second half"] == expected[4:]


def test_shuffle_keeps_its_permutation_while_the_step_stands_still(results: dict[str, Any]) -> None:
    assert [step for step, _ in results["accumulated"]] == [step for step in range(8) for _ in range(2)]
    of_step = dict(results["permutations"])
    assert all(permutation == of_step[step] for step, permutation in results["accumulated"])
