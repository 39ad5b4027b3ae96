"""FiLM in two processes: DDP and FSDP2 over gloo, against gradients computed by hand in one."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from processes import Fork

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")

RANKS = 2

SETUP = """
import datetime, json, os, sys, time, traceback
import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from small_unet import SmallUNet, inputs, randomise
from vlmfilm_plugin.forward.attach import attach
from vlmfilm_plugin.features.shuffle import Shuffle

torch.set_num_threads(1)
RANK, SIZE, FOLDER = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), os.environ["FOLDER"]
WIDTH, ROWS = 5, 3
dist.init_process_group("gloo", init_method=f"file://{FOLDER}/rendezvous", rank=RANK, world_size=SIZE, timeout=datetime.timedelta(seconds=40))

def build(mode, use_reentrant=None, **settings):
    os.environ["VLM_FILM_MODE"] = mode
    torch.manual_seed(0)
    handle = attach(SmallUNet(use_reentrant=use_reentrant).double(), feature_dim=WIDTH, cond_dim=4, text_mlp_hidden_dim=6, **settings)
    randomise(handle.film)
    return handle

def features(seed):
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

def loss_of(model, handle, seed):
    with handle.condition(features=features(seed)):
        return (model(*inputs(ROWS, seed=seed, dtype=torch.float64)) * (1 + seed)).square().mean()

def by_hand(handle):
    "Return the loss of a UNet with FiLM written into it, as a function of the seed, and its own copies of the parameters."
    def full(value):
        return (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
    state = {name: full(value) for name, value in handle.unet.named_parameters()}
    plain = SmallUNet().double()
    plain.load_state_dict({name: value for name, value in state.items() if not name.startswith("vlm_film.")})
    w = {name[len("vlm_film."):]: value.requires_grad_() for name, value in state.items() if name.startswith("vlm_film.")}

    def loss(seed):
        given = features(seed)
        if handle.film.mode == "shuffle":
            given = given[Shuffle().derangement(ROWS, 0)]
        cond = F.layer_norm(F.linear(given, w["image_to_cond.proj.weight"], w["image_to_cond.proj.bias"]), (4,))
        cond = cond * w["image_to_cond.ln.weight"] + w["image_to_cond.ln.bias"]

        def film(h, stage):
            carrying = [s.index for s in handle.stages]
            if handle.film.mode == "off" or stage not in carrying:
                return h
            p = f"heads.{carrying.index(stage)}."
            hidden = F.layer_norm(cond, (4,)) * w[p + "ln.weight"] + w[p + "ln.bias"]
            hidden = F.linear(hidden, w[p + "mlp.0.weight"], w[p + "mlp.0.bias"]).relu()
            g, b = F.linear(hidden, w[p + "mlp.2.weight"], w[p + "mlp.2.bias"])[:, :, None, None].chunk(2, dim=1)
            return (1 + 0.1 * torch.tanh(g)) * h + 0.1 * torch.tanh(b)

        return (plain(*inputs(ROWS, seed=seed, dtype=torch.float64), film=film) * (1 + seed)).square().mean()

    return loss, {**dict(plain.named_parameters()), **{f"vlm_film.{name}": value for name, value in w.items()}}

def same_gradients(unet, expected):
    "Compare gradients by name; every one that takes part must be far from zero, so that the comparison means something."
    found = dict(unet.named_parameters())
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        if expected[name].grad is None:
            assert parameter.grad is None, f"{name} has a gradient"
            continue
        gradient = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
        assert float(expected[name].grad.abs().max()) > 1e-9, f"{name} is not tested"
        torch.testing.assert_close(gradient, expected[name].grad, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")

def same_on_all_ranks(unet):
    for name, parameter in unet.named_parameters():
        copies = [torch.empty_like(parameter) for _ in range(SIZE)]
        dist.all_gather(copies, parameter.detach().contiguous())
        assert all(torch.equal(copy, copies[0]) for copy in copies), name

def scenario(function):
    "Run now, and note how it ended, so that one failure leaves the others their verdict."
    began = time.monotonic()
    try:
        verdict = function() or "ok"
    except BaseException as error:
        traceback.print_exc()
        verdict = f"{type(error).__name__}: {error}"
    with open(f"{FOLDER}/verdicts-{RANK}", "a") as file:
        file.write(json.dumps([function.__name__, verdict, time.monotonic() - began]) + chr(10))
"""

TEARDOWN = """
dist.destroy_process_group()
"""

DDP = """
def train(mode, use_reentrant=None, steps=4, decoder_stages=None, **options):
    handle = build(mode, use_reentrant, decoder_stages=decoder_stages)
    model = DistributedDataParallel(handle.unet, find_unused_parameters=False, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    before = {name: value.clone() for name, value in handle.film.state_dict().items()}
    for step in range(steps):
        loss, expected = by_hand(handle)
        (sum(loss(SIZE * step + rank) for rank in range(SIZE)) / SIZE).backward()
        optimizer.zero_grad()
        loss_of(model, handle, SIZE * step + RANK).backward()
        same_gradients(handle.unet, expected)
        optimizer.step()
    same_on_all_ranks(handle.unet)
    moved = [name for name, value in handle.film.state_dict().items() if not torch.equal(value, before[name])]
    assert bool(moved) == (mode != "off"), moved
"""

MODES = """
@scenario
def mode_on(): train("on")

@scenario
def mode_off(): train("off")

@scenario
def mode_shuffle(): train("shuffle")

@scenario
def static_graph(): train("on", static_graph=True)

@scenario
def gradient_as_bucket_view(): train("on", gradient_as_bucket_view=True)

@scenario
def nonreentrant(): train("on", use_reentrant=False)

@scenario
def reentrant_in_mode_off(): train("off", use_reentrant=True)

@scenario
def two_forwards_one_backward():
    for use_reentrant in (None, False):
        handle = build("on", use_reentrant)
        model = DistributedDataParallel(handle.unet, find_unused_parameters=False)
        for step in range(2):
            loss, expected = by_hand(handle)
            (sum(loss(4 * step + rank) + 3 * loss(4 * step + 2 + rank) for rank in range(SIZE)) / SIZE).backward()
            model.zero_grad()
            (loss_of(model, handle, 4 * step + RANK) + 3 * loss_of(model, handle, 4 * step + 2 + RANK)).backward()
            same_gradients(handle.unet, expected)

@scenario
def accumulation_without_sync():
    handle = build("on", False)
    model = DistributedDataParallel(handle.unet, find_unused_parameters=False)
    loss, expected = by_hand(handle)
    (sum(loss(seed) for seed in range(2 * SIZE)) / SIZE).backward()
    with model.no_sync():
        loss_of(model, handle, RANK).backward()
    loss_of(model, handle, SIZE + RANK).backward()
    same_gradients(handle.unet, expected)

@scenario
def evaluation_between_steps():
    handle = build("on", False)
    model = DistributedDataParallel(handle.unet, find_unused_parameters=False)
    for step in range(2):
        loss, expected = by_hand(handle)
        (sum(loss(SIZE * step + rank) for rank in range(SIZE)) / SIZE).backward()
        model.zero_grad()
        mine = loss_of(model, handle, SIZE * step + RANK)
        model.eval()
        with torch.no_grad():
            assert torch.equal(loss_of(handle.unet, handle, 50 + RANK), loss_of(handle.unet, handle, 50 + RANK))
        model.train()
        mine.backward()
        same_gradients(handle.unet, expected)

@scenario
def a_forward_without_a_condition_raises():
    handle = build("on")
    model = DistributedDataParallel(handle.unet, find_unused_parameters=False)
    try:
        model(*inputs(ROWS, dtype=torch.float64))
    except Exception as error:
        assert type(error).__name__ == "ConditionError", error
    else:
        raise AssertionError("a forward without a condition went on")
"""

# The last of its process: an error in the middle of a backward leaves the reducer in no usable state.
REENTRANT = """
@scenario
def reentrant_of_one_stage(): train("on", use_reentrant=True, decoder_stages=[1])

@scenario
def reentrant_static_graph(): train("on", use_reentrant=True, static_graph=True)

@scenario
def reentrant_with_a_forward_in_between():
    handle = build("on", True)
    model = DistributedDataParallel(handle.unet, static_graph=True)
    for step in range(3):
        loss, expected = by_hand(handle)
        (sum(loss(SIZE * step + rank) for rank in range(SIZE)) / SIZE).backward()
        model.zero_grad()
        mine = loss_of(model, handle, SIZE * step + RANK)
        with torch.no_grad():
            loss_of(handle.unet, handle, 70)
        mine.backward()
        same_gradients(handle.unet, expected)

@scenario
def reentrant(): train("on", use_reentrant=True)
"""

STORE = """
import numpy as np
from PIL import Image
from vlmfilm_plugin.encoders.descriptor import DescriptorEncoder
from vlmfilm_plugin.host_spec import UNet
from vlmfilm_plugin.run.runtime import Runtime

os.makedirs(f"{FOLDER}/train/image", exist_ok=True)
FILES = [f"{FOLDER}/train/image/{i}.png" for i in range(8)]
if RANK == 0:
    for i, file in enumerate(FILES):
        Image.fromarray((np.random.default_rng(i).random((24, 24)) * 255).astype("uint8")).save(file)
dist.barrier()

encoded = []
plain_encode = DescriptorEncoder.encode
def encode(self, images):
    encoded.append(len(images))
    time.sleep(1.0)
    return plain_encode(self, images)
DescriptorEncoder.encode = encode

class Process:
    "What one process of a run holds: a runtime over the shared store, a model, its optimizer."
    def __init__(self, mode="on", **given):
        variables = {"VLM_FILM_ENCODER": "descriptor", "VLM_FILM_COND_DIM": "4", "VLM_FILM_TEXT_MLP_HIDDEN_DIM": "6",
                     "VLM_FILM_CACHE_DIR": f"{FOLDER}/cache", "VLM_FILM_ON_MISSING_FEATURE": "encode", **given}
        self.runtime = Runtime(mode, variables, FOLDER)
        torch.manual_seed(0)
        unet = SmallUNet().double()
        self.handle = self.runtime.attach(unet, UNet(cls=SmallUNet, targets={"post_block2": "ups.*.1"}))
        randomise(self.handle.film)
        self.model = DistributedDataParallel(unet, find_unused_parameters=False)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)

    def step(self, images, number=0):
        encoded.clear()
        files = [FILES[i] for i in images]
        names = [f"train/image/{i}.png" for i in images]
        batch = {"image": torch.zeros(len(files), 1, 8, 8), "name": names, "image_meta_dict": {"filename_or_obj": files}}
        with self.runtime.batch(batch, phase="train", value_range=(0.0, 1.0), step=number):
            loss = self.model(*inputs(len(files), seed=number, dtype=torch.float64)).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in self.handle.film.parameters())
        return sum(encoded)

@scenario
def only_the_rank_that_misses_a_feature_encodes():
    first = Process()
    first.step([0, 1])
    dist.barrier()
    # Rank 1 alone lacks something, and takes a second to encode it while rank 0 waits for its gradients.
    assert first.step([0, 1] if RANK == 0 else [2, 3]) == (0 if RANK == 0 else 2)
    same_on_all_ranks(first.handle.unet)

@scenario
def what_another_rank_stored_is_read_not_encoded():
    later = Process()
    assert later.step([2, 3] if RANK == 0 else [1, 0]) == 0
    stats = later.runtime.states.of(later.handle.film).provider.stats
    assert (stats.miss, stats.disk_hit) == (0, 2), stats

@scenario
def both_ranks_missing_the_same_features_at_once_agree():
    process = Process()
    dist.barrier()
    process.step([4, 5, 6, 7])
    source = process.runtime.states.of(process.handle.film).provider
    dist.barrier()
    rows = source.store.read(source.encoder.identity, source.store.keys(source.encoder.identity))
    assert len(rows) == 8, sorted(rows)
    same_on_all_ranks(process.handle.unet)

@scenario
def shuffle_draws_the_same_permutation_on_every_rank():
    process = Process("shuffle")
    seen = []
    kind = type(process.runtime.diagnostics)
    plain = kind.shuffled
    def shuffled(self, phase, epoch, permutation, note=""):
        seen.append(list(permutation))
        plain(self, phase, epoch, permutation, note)
    kind.shuffled = shuffled
    for step in range(6):
        process.step([0, 1, 2, 3] if RANK == 0 else [4, 5, 6, 7], step)
    everyones = [None] * SIZE
    dist.all_gather_object(everyones, seen)
    assert len(seen) == 6 and everyones[0] == everyones[1], everyones
    assert len({tuple(p) for p in seen}) > 1, "one permutation for all steps"
    assert not any(row == source for p in seen for row, source in enumerate(p))
"""

STATISTICS = """
from vlmfilm_plugin.features.training_images import TrainingImages

def statistics_of(process):
    "Return the statistics of this process, after a check that all have the same, buffers and state dict included."
    transform = process.handle.film.feature_transform
    named = {name: value for name, value in process.handle.unet.state_dict().items() if "feature_transform" in name}
    mine = {name: value.numpy().tobytes() for name, value in [*named.items(), *transform.named_buffers()]}
    everyones = [None] * SIZE
    dist.all_gather_object(everyones, mine)
    assert everyones[0] == everyones[1] and len(mine) == 3, everyones
    return transform.statistics

def mean_of(process, files):
    return process.runtime.states.of(process.handle.film).provider.of_images(files).double().mean(0).float()

@scenario
def statistics_of_listed_images_are_equal_and_each_rank_encodes_its_share():
    process = Process(VLM_FILM_CACHE_DIR=f"{FOLDER}/listed")
    process.runtime.learn_image_files((f"train/image/{i}.png", file) for i, file in enumerate(FILES))
    shares, plain_share = [], TrainingImages.features_of
    TrainingImages.features_of = lambda self, images: (shares.append([path for _, path in images]), plain_share(self, images))[1]
    process.step([0, 1] if RANK == 0 else [4, 5])
    TrainingImages.features_of = plain_share
    assert shares == [FILES[RANK::SIZE]], shares
    found = statistics_of(process)
    assert found.facts.is_frozen and found.facts.count == 8
    assert torch.equal(found.mean, mean_of(process, FILES))
    dist.barrier()

@scenario
def statistics_counted_on_each_rank_are_those_of_the_images_of_all():
    process = Process(VLM_FILM_CACHE_DIR=f"{FOLDER}/counted")
    process.step([0, 1] if RANK == 0 else [2, 3])
    assert statistics_of(process).facts.count == 4 and process.handle.film.waits
    process.step([0, 4] if RANK == 0 else [2, 0])
    assert statistics_of(process).facts.count == 5
    process.step([5, 6] if RANK == 0 else [7, 7], 1)
    found = statistics_of(process)
    assert found.facts.count == 8 and not process.handle.film.waits
    torch.testing.assert_close(found.mean, mean_of(process, FILES))
    process.step([0, 1] if RANK == 0 else [2, 3], 2)
    same_on_all_ranks(process.handle.unet)
    dist.barrier()

@scenario
def an_image_that_one_rank_cannot_read_stops_every_rank():
    process = Process(VLM_FILM_CACHE_DIR=f"{FOLDER}/damaged")
    damaged = f"{FOLDER}/train/image/9.png"
    if RANK == 0:
        with open(damaged, "wb") as file:
            file.write(b"no image")
    dist.barrier()
    process.runtime.learn_image_files((f"train/image/{i}.png", file) for i, file in [*enumerate(FILES), (9, damaged)])
    try:
        process.step([0, 1])
    except RuntimeError as error:
        assert type(error).__name__ == "ImageReadError" and "9.png" in str(error), error
    else:
        raise AssertionError("it went on")
"""

FSDP = """
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh

def shard(handle, blocks):
    mesh = init_device_mesh("cpu", (SIZE,))
    if blocks:
        for stage in handle.unet.ups:
            for block in stage[:2]:
                fully_shard(block, mesh=mesh)
    fully_shard(handle.unet, mesh=mesh)

def train(mode, use_reentrant=None, blocks=False):
    handle = build(mode, use_reentrant)
    shard(handle, blocks)
    optimizer = torch.optim.AdamW(handle.unet.parameters(), lr=0.01)
    for step in range(3):
        loss, expected = by_hand(handle)
        single = torch.optim.AdamW(expected.values(), lr=0.01)
        if step:
            single.load_state_dict(twin)
        (sum(loss(SIZE * step + rank) for rank in range(SIZE)) / SIZE).backward()
        optimizer.zero_grad()
        loss_of(handle.unet, handle, SIZE * step + RANK).backward()
        same_gradients(handle.unet, expected)
        optimizer.step(); single.step()
        twin = single.state_dict()
        for name, parameter in handle.unet.named_parameters():
            torch.testing.assert_close(parameter.full_tensor(), expected[name], rtol=1e-8, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")

@scenario
def root(): train("on")

@scenario
def blocks(): train("on", blocks=True)

@scenario
def mode_off(): train("off")

@scenario
def mode_shuffle(): train("shuffle")

@scenario
def nonreentrant(): train("on", use_reentrant=False, blocks=True)

@scenario
def mixed_precision():
    handle = build("on")
    fully_shard(handle.unet.float(), mesh=init_device_mesh("cpu", (SIZE,)), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    with handle.condition(features=features(RANK)):
        handle.unet(*inputs(ROWS, seed=RANK)).float().square().mean().backward()
    assert all(bool(p.grad.full_tensor().isfinite().all()) and float(p.grad.full_tensor().norm()) > 0 for p in handle.film.parameters())

@scenario
def film_sharded_apart():
    handle = build("on")
    mesh = init_device_mesh("cpu", (SIZE,))
    fully_shard(handle.film, mesh=mesh)
    fully_shard(handle.unet, mesh=mesh)
    try:
        loss_of(handle.unet, handle, RANK)
    except RuntimeError as error:
        # Its own forward never runs, so FSDP never gathers it: torch must refuse to compute with a shard.
        assert "DTensor" in str(error), error
    else:
        raise AssertionError("a shard was taken for the whole")

@scenario
def fitted_after_sharding():
    handle = build("on")
    shard(handle, True)
    handle.fit(features(50))
    state = get_model_state_dict(handle.unet, options=StateDictOptions(full_state_dict=True))
    mean = features(50).mean(0).float()
    assert torch.equal(state["vlm_film.feature_transform.mean"], mean.double())
    loss_of(handle.unet, handle, RANK).backward()
    other = build("on")
    shard(other, True)
    set_model_state_dict(other.unet, state, options=StateDictOptions(full_state_dict=True))
    assert torch.equal(other.film.transform(features(RANK)), features(RANK) - mean)
    assert torch.equal(loss_of(other.unet, other, RANK), loss_of(handle.unet, handle, RANK))

@scenario
def full_state_dict_round_trip():
    handle = build("on")
    expected = {name: value.clone() for name, value in handle.unet.state_dict().items()}
    shard(handle, True)
    options = StateDictOptions(full_state_dict=True)
    found = get_model_state_dict(handle.unet, options=options)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    with torch.no_grad():
        for parameter in handle.film.parameters():
            parameter.zero_()
    set_model_state_dict(handle.unet, found, options=options)
    assert all(torch.equal(p.full_tensor(), expected[f"vlm_film.{name}"]) for name, p in handle.film.named_parameters())
"""


@dataclass
class Run:
    """Verdicts by scenario, one a rank, and what each rank wrote."""

    verdicts: dict[str, tuple[str, ...]]
    logs: list[str]

    def passed(self, *names: str) -> None:
        assert {name: self.verdicts.get(name) for name in names} == dict.fromkeys(names, ("ok",) * RANKS)


def run(folder: Path, code: str, limit: float = 150) -> Run:
    """Run code on both ranks, as torchrun would."""
    folders = [folder / str(rank) for rank in range(RANKS)]
    forks = []
    for rank in range(RANKS):
        folders[rank].mkdir(parents=True)
        variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
        variables |= {"FOLDER": str(folder), "PYTHONPATH": str(Path(__file__).parents[1])}
        forks.append(Fork(["-c", SETUP + code + TEARDOWN], folders[rank], folder, **variables))
    until = time.monotonic() + limit
    is_hung = []
    for fork in forks:
        try:
            fork.wait(max(0.1, until - time.monotonic()))
            is_hung.append(False)
        except TimeoutError:
            is_hung.append(True)
    for fork in forks:
        fork.kill()
    logs = [fork.stdout.read_text() + fork.stderr.read_text() for fork in forks]
    verdicts: dict[str, tuple[str, ...]] = {}
    for rank in range(RANKS):
        path = folder / f"verdicts-{rank}"
        for line in path.read_text().splitlines() if path.exists() else ():
            name, verdict, _ = json.loads(line)
            verdicts[name] = (*verdicts.get(name, ()), verdict)
    assert not any(is_hung), f"hung: {is_hung}\nverdicts: {verdicts}\n" + "\n".join(log[-2000:] for log in logs)
    assert verdicts, "\n".join(log[-2000:] for log in logs)
    return Run(verdicts, logs)


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(tmp_path_factory.mktemp("ddp"), DDP + MODES + STORE + STATISTICS + REENTRANT)


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory: pytest.TempPathFactory) -> Run:
    if torch.__version__.startswith("2.5."):
        pytest.skip("FSDP2 of torch 2.5 needs a GPU")
    return run(tmp_path_factory.mktemp("fsdp"), FSDP)


@pytest.mark.parametrize("mode", ["on", "off", "shuffle"])
def test_ddp_gradients_are_the_average_of_those_computed_by_hand_for_each_rank(ddp: Run, mode: str) -> None:
    ddp.passed(f"mode_{mode}")


def test_ddp_options_change_nothing(ddp: Run) -> None:
    ddp.passed("static_graph", "gradient_as_bucket_view")


def test_ddp_with_nonreentrant_checkpointing_has_the_gradients_computed_by_hand(ddp: Run) -> None:
    ddp.passed("nonreentrant")


def test_ddp_two_forwards_under_different_conditions_then_one_backward(ddp: Run) -> None:
    ddp.passed("two_forwards_one_backward")


def test_ddp_accumulation_without_sync_equals_the_sum(ddp: Run) -> None:
    ddp.passed("accumulation_without_sync")


def test_ddp_evaluation_between_forward_and_backward_changes_no_gradient(ddp: Run) -> None:
    ddp.passed("evaluation_between_steps")


def test_ddp_forward_without_a_condition_raises(ddp: Run) -> None:
    ddp.passed("a_forward_without_a_condition_raises")


def test_ddp_with_reentrant_checkpointing_is_right_where_no_parameter_is_used_twice(ddp: Run) -> None:
    ddp.passed("reentrant_in_mode_off", "reentrant_of_one_stage")


def test_ddp_with_reentrant_checkpointing_is_right_with_a_static_graph(ddp: Run) -> None:
    ddp.passed("reentrant_static_graph", "reentrant_with_a_forward_in_between")


def test_ddp_with_reentrant_checkpointing_is_right_or_says_what_to_do(ddp: Run) -> None:
    for verdict in ddp.verdicts["reentrant"]:
        assert verdict == "ok" or ("marked as ready twice" in verdict and "vlm_film" in verdict and "static_graph" in verdict)


def test_a_rank_that_alone_lacks_a_feature_encodes_it_alone_and_nobody_hangs(ddp: Run) -> None:
    ddp.passed("only_the_rank_that_misses_a_feature_encodes")


def test_ranks_share_one_store_file(ddp: Run) -> None:
    ddp.passed("what_another_rank_stored_is_read_not_encoded", "both_ranks_missing_the_same_features_at_once_agree")


def test_shuffle_draws_one_permutation_for_all_ranks_by_the_step(ddp: Run) -> None:
    ddp.passed("shuffle_draws_the_same_permutation_on_every_rank")


def test_statistics_of_features_are_equal_on_every_rank_to_the_bit(ddp: Run) -> None:
    ddp.passed("statistics_of_listed_images_are_equal_and_each_rank_encodes_its_share")
    ddp.passed("statistics_counted_on_each_rank_are_those_of_the_images_of_all")


def test_ranks_stop_together_where_one_cannot_find_the_statistics(ddp: Run) -> None:
    ddp.passed("an_image_that_one_rank_cannot_read_stops_every_rank")


def test_rank_0_alone_writes_the_lines_of_a_film_run(ddp: Run) -> None:
    counts = [log.count("[VLM] FiLM attached") for log in ddp.logs]
    assert counts[0] > 0 and counts[1] == 0


@pytest.mark.parametrize("name", ["root", "blocks", "mode_off", "mode_shuffle", "nonreentrant"])
def test_fsdp2_steps_equal_those_of_one_process(fsdp: Run, name: str) -> None:
    fsdp.passed(name)


def test_fsdp2_full_state_dict_round_trip_keeps_the_heads(fsdp: Run) -> None:
    fsdp.passed("full_state_dict_round_trip")


def test_fsdp2_takes_the_statistics_of_features_along(fsdp: Run) -> None:
    fsdp.passed("fitted_after_sharding")


def test_fsdp2_mixed_precision_trains_the_heads(fsdp: Run) -> None:
    fsdp.passed("mixed_precision")


def test_fsdp2_of_film_apart_from_its_unet_is_refused(fsdp: Run) -> None:
    fsdp.passed("film_sharded_apart")
