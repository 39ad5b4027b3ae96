"""Adapters and patching: found one by one, patched once, signatures kept, and a whole third-party host trained."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from small_unet import SmallUNet, inputs, randomise
from torch import Tensor, nn
from vlmfilm_plugin.hooks import med_seg_diff_pytorch, sofl_seg

from vlmfilm_plugin import hookimpl
from vlmfilm_plugin.errors import ConditionError, HostError, SettingsError, VlmFilmError
from vlmfilm_plugin.film.module import film_modules
from vlmfilm_plugin.forward import context as conditioning
from vlmfilm_plugin.host_spec import Config, HostSpec, ImageFiles, RowView, Steps, UNet, same_rows
from vlmfilm_plugin.hosts.patches import patch_host
from vlmfilm_plugin.hosts.registry import AdapterRegistry
from vlmfilm_plugin.run.runtime import Runtime

TARGETS = {"post_block2": "ups.*.1", "post_block1": "ups.*.0"}


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("VLM_FILM_MODE", raising=False)
    torch.manual_seed(0)
    yield
    for name in [name for name in sys.modules if name.startswith("third_party_")]:
        del sys.modules[name]


# A host and its adapter, as a stranger would write them

HOST_SOURCE = '''
import torch
from torch import nn
from small_unet import Block
from torch.utils.checkpoint import checkpoint


class Net(nn.Module):
    """A UNet of a third party."""

    def __init__(self, width: int = 4, *, deep: bool = True):
        super().__init__()
        self.stem = nn.Conv2d(2, width, 3, padding=1)
        self.ups = nn.ModuleList(
            nn.ModuleList([Block(width, width), Block(width, width), nn.Identity(), nn.Identity()]) for _ in range(2 if deep else 1)
        )
        self.final = nn.Conv2d(width, 1, 1)

    def forward(self, x, time, cond):
        h = self.stem(torch.cat([x, cond], 1))
        for block1, block2, attention, up in self.ups:
            h = checkpoint(block2, block1(h, time), time, use_reentrant=False)
            h = up(attention(h))
        return self.final(h)


class Pictures:
    def __init__(self, items):
        self.items = items


class Trainer:
    def __init__(self, config, verbose=False):
        self.config = config


class Model(nn.Module):
    global_step = 0

    def __init__(self, arch_name="net", **kwargs):
        super().__init__()
        self.net = Net(**kwargs) if arch_name == "net" else nn.Conv2d(2, 1, 1)

    def training_step(self, batch, batch_idx: int = 0, *, patches=1):
        """Train one batch."""
        image = batch["image"].repeat_interleave(patches, dim=0)
        noise = torch.randn_like(image)
        return (self.net(noise, torch.rand(len(image)), image) - noise).square().mean()

    def validation_step(self, batch, batch_idx=0):
        image = batch["image"]
        return self.net(torch.zeros_like(image), torch.zeros(len(image)), image)
'''


class Adapter:
    """Describes the host above."""

    @hookimpl
    def vlmfilm_host(self, module: ModuleType) -> HostSpec | None:
        if not hasattr(module, "Net") or not hasattr(module, "Pictures"):
            return None
        return HostSpec(
            name="third party",
            unets=[UNet(cls=module.Net, targets=TARGETS)],
            models=[module.Model],
            steps=[
                Steps(
                    cls=module.Model,
                    phases={"training_step": "train", "validation_step": "val"},
                    value_range=(0.0, 1.0),
                    rows=sofl_seg.rows_of,
                )
            ],
            configs=[Config(cls=module.Trainer, method="__init__", read=lambda arguments: arguments["config"].get("film") or {})],
            image_files=[ImageFiles(cls=module.Pictures, read=lambda pictures: pictures.items)],
            recompute=["checkpoint"],
        )


def make_host(name: str = "third_party_net") -> Any:
    module = ModuleType(name)
    sys.modules[name] = module
    exec(compile(HOST_SOURCE, name, "exec"), module.__dict__)
    return module


def runtime(tmp_path: Path, mode: str = "on", **settings: str) -> Runtime:
    environ = {"VLM_FILM_ENCODER": "descriptor", "VLM_FILM_CACHE_DIR": "cache", "VLM_FILM_COND_DIM": "4", "VLM_FILM_FEATURE_TRANSFORM": "none"}
    return Runtime(mode, environ | {f"VLM_FILM_{name}": value for name, value in settings.items()}, str(tmp_path))


def patched(tmp_path: Path, mode: str = "on", **settings: str) -> tuple[Any, Runtime]:
    host, run = make_host(), runtime(tmp_path, mode, **settings)
    registry = AdapterRegistry()
    registry.register(Adapter())
    spec = registry.recognise(host)
    assert spec is not None
    patch_host(host, spec, run)
    return host, run


def batch(rows: int = 3, seed: int = 0) -> dict[str, Any]:
    return {"image": torch.rand(rows, 1, 8, 8, generator=torch.Generator().manual_seed(seed)), "name": [f"train/{seed}_{i}.png" for i in range(rows)]}


def train(model: Any, steps: int = 3, **arguments: Any) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(1)
    losses = []
    for model.global_step in range(steps):
        loss = model.training_step(batch(seed=model.global_step), model.global_step, **arguments)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_third_party_host_trains_with_film_and_every_head_moves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    host, run = patched(tmp_path)
    model = host.Model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    losses = train(model, patches=2)
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == set(before)
    assert any("vlm_film.heads.1" in name for name in moved)
    assert all(torch.isfinite(torch.tensor(losses)))
    with torch.no_grad():
        a = model.validation_step(batch(1))
        b = model.validation_step(batch(1, seed=5))
    assert not torch.equal(a, b)
    assert run.attached == 1
    assert (tmp_path / "cache").is_dir()
    out = capsys.readouterr().out
    assert "[FILM-DBG]" in out and "FiLM attached: mode=on encoder=descriptor unet=Net" in out


def test_off_trains_the_host_bit_for_bit_and_on_equals_it_at_the_first_step(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = train(make_host("third_party_plain").Model())
    results = {}
    for mode in ("off", "on"):
        host, _ = patched(tmp_path / mode, mode)
        torch.manual_seed(0)
        results[mode] = train(host.Model())
    assert results["off"] == plain
    assert results["on"][0] == plain[0]
    assert results["on"] != plain


def test_recompute_by_the_hosts_own_checkpoint_call_uses_each_forwards_condition(tmp_path: Path) -> None:
    host, _ = patched(tmp_path)
    model = host.Model()
    randomise(model.net.vlm_film)
    plain = SimpleNamespace(checkpoint=host.checkpoint)

    def gradients() -> list[Tensor]:
        torch.manual_seed(2)
        model.zero_grad()
        sum(model.training_step(batch(seed=seed)) for seed in (1, 2)).backward()  # type: ignore[union-attr]
        return [parameter.grad.clone() for parameter in model.parameters()]

    recomputed = gradients()
    host.checkpoint = lambda function, *args, use_reentrant: function(*args)
    for a, b in zip(recomputed, gradients(), strict=True):
        torch.testing.assert_close(a, b)
    host.checkpoint = plain.checkpoint


def test_rows_that_repeat_a_sample_get_that_samples_condition(tmp_path: Path) -> None:
    host, _ = patched(tmp_path)
    model = host.Model().eval()
    randomise(model.net.vlm_film)
    seen: list[Tensor] = []
    model.net.register_forward_hook(lambda module, args, output: seen.append(conditioning.stacks.contexts[-1].index), prepend=True)
    model.training_step(batch(), patches=2)
    assert seen[0].tolist() == [0, 0, 1, 1, 2, 2]


def test_a_forward_outside_a_step_raises(tmp_path: Path) -> None:
    host, _ = patched(tmp_path)
    with pytest.raises(ConditionError):
        host.Model().net(*inputs(2))


def test_a_step_that_raises_takes_its_condition_back(tmp_path: Path) -> None:
    host, _ = patched(tmp_path)
    model = host.Model()
    with pytest.raises(TypeError):
        model.training_step(batch(), patches="two")
    assert not conditioning.stacks.conditions


@pytest.mark.parametrize("bad", [None, [1], {"img": 1}, {"image": torch.zeros(1, 8, 8)}, (torch.zeros(1, 1, 8, 8),)])
def test_a_batch_without_images_is_refused(bad: Any, tmp_path: Path) -> None:
    host, _ = patched(tmp_path)
    with pytest.raises(ConditionError, match="image"):
        host.Model().training_step(bad)


def test_a_callers_own_condition_wins_over_the_batch(tmp_path: Path) -> None:
    from vlmfilm_plugin.forward.given_features import GivenFeatures

    host, run = patched(tmp_path)
    model = host.Model()
    randomise(model.net.vlm_film)
    width = model.net.vlm_film.architecture.feature_dim
    with torch.no_grad(), conditioning.in_force(GivenFeatures(model.net.vlm_film.film_id, torch.ones(1, width), run.settings)):
        a = model.validation_step(batch(1))
    with torch.no_grad():
        b = model.validation_step(batch(1))
    assert not torch.equal(a, b)
    assert run.states.of(model.net.vlm_film).provider.stats.total == 1


def test_anothers_condition_does_not_keep_a_batch_from_its_own_unet(tmp_path: Path) -> None:
    from vlmfilm_plugin.forward.attach import attach

    host, _ = patched(tmp_path)
    model, other = host.Model(), attach(SmallUNet(), feature_dim=5)
    with torch.no_grad():
        expected = model.validation_step(batch(1))
        with other.condition(features=torch.zeros(1, 5)):
            assert torch.equal(model.validation_step(batch(1)), expected)


@pytest.mark.parametrize("strategy", ["first", "random"])
def test_a_validation_between_two_steps_does_not_replace_what_training_holds(strategy: str, tmp_path: Path) -> None:
    host, run = patched(tmp_path, BATCH_STRATEGY=strategy)
    model = host.Model()
    model.training_step(batch(seed=0))
    film = model.net.vlm_film
    held = run.states.of(film).lookup.held[1].clone()
    with torch.inference_mode():
        model.validation_step(batch(1, seed=8))
    model.global_step = 1
    loss = model.training_step(batch(seed=1))
    assert torch.equal(run.states.of(film).lookup.held[1], held)
    loss.backward()


def test_first_conditions_every_row_on_the_first_sample_and_evaluation_on_each(tmp_path: Path) -> None:
    host, _ = patched(tmp_path, BATCH_STRATEGY="first")
    model, seen = host.Model(), []
    model.net.register_forward_hook(lambda *_: seen.append(conditioning.stacks.contexts[-1].features), prepend=True)
    model.training_step(batch())
    with torch.no_grad():
        for seed in (1, 2):
            model.validation_step(batch(1, seed=seed))
    assert all(torch.equal(row, seen[0][0]) for row in seen[0])
    assert not torch.equal(seen[1], seen[2])


# Configuration


def test_settings_come_from_the_hosts_config_and_the_environment_wins(tmp_path: Path) -> None:
    host, run = patched(tmp_path)
    host.Trainer({"film": {"vlm_film_decoder_stages": [1], "cond_dim": 64}})
    assert run.settings.decoder_stages == (1,)
    assert run.settings.cond_dim == 4
    assert run.settings.origin("decoder_stages").startswith("host config")
    assert run.settings.cache_dir == str(tmp_path / "cache")
    assert [stage.path for stage in host.Model().net.vlm_film.architecture.stages] == ["ups.1.1"]


@pytest.mark.parametrize("is_off_from_environment", [False, True])
def test_asked_for_film_and_for_no_film_is_refused(is_off_from_environment: bool, tmp_path: Path) -> None:
    host, _ = patched(tmp_path, **({"USE_VLM_FILM": "false"} if is_off_from_environment else {}))
    host.Trainer({} if is_off_from_environment else {"film": {"use_vlm_film": False}})
    with pytest.raises(SettingsError, match="use_vlm_film"):
        host.Model()


def test_a_misspelt_setting_in_the_hosts_config_stops_the_run(tmp_path: Path) -> None:
    host, _ = patched(tmp_path)
    host.Trainer({"film": {"gama_scale": 1}})
    with pytest.raises(SettingsError, match="gamma_scale"):
        host.Model()


def test_a_model_without_a_unet_that_can_carry_film_is_refused(tmp_path: Path) -> None:
    host, _ = patched(tmp_path)
    with pytest.raises(HostError, match="no UNet that can carry it"):
        host.Model(arch_name="other")


def test_sources_are_learned_and_a_name_for_two_files_stands_for_neither(tmp_path: Path) -> None:
    host, run = patched(tmp_path)
    host.Pictures([("a", "/x/a.png"), ("b", "/x/b.png")])
    host.Pictures([("a", "/x/a.png"), ("b", "/y/b.png")])
    host.Pictures([("b", "/x/b.png")])
    assert run.files == {"a": Path("/x/a.png"), "b": None}


# Patching


def test_patching_twice_patches_once(tmp_path: Path) -> None:
    host, run = patched(tmp_path)
    spec = Adapter().vlmfilm_host(host)
    before = {(cls, name): inspect.getattr_static(cls, name) for cls, name in ((host.Net, "__init__"), (host.Model, "training_step"))}
    function = host.checkpoint
    patch_host(host, spec, run)
    assert all(inspect.getattr_static(cls, name) is value for (cls, name), value in before.items())
    assert host.checkpoint is function
    model = host.Model()
    assert run.attached == 1
    assert len(model.net._forward_pre_hooks) == 1


def test_signatures_names_and_docstrings_are_kept(tmp_path: Path) -> None:
    plain, (host, _) = make_host("third_party_plain"), patched(tmp_path)
    for path in (
        "Net.__init__",
        "Model.__init__",
        "Model.training_step",
        "Model.validation_step",
        "Trainer.__init__",
        "Pictures.__init__",
        "checkpoint",
    ):
        a, b = plain, host
        for part in path.split("."):
            a, b = getattr(a, part), getattr(b, part)
        assert inspect.signature(a) == inspect.signature(b), path
        assert (a.__name__, a.__doc__) == (b.__name__, b.__doc__), path
    assert host.Model.training_step.__doc__ == "Train one batch."


def test_a_unet_whose_init_raises_is_not_attached(tmp_path: Path) -> None:
    host, run = patched(tmp_path)
    with pytest.raises(TypeError):
        host.Net(width="wide")
    assert run.attached == 0


def test_a_subclass_gets_film_once(tmp_path: Path) -> None:
    host, run = patched(tmp_path)

    class Child(host.Net):
        def __init__(self) -> None:
            super().__init__(width=6)
            self.more = nn.Linear(1, 1)

    child = Child()
    assert len(film_modules(child)) == 1
    assert [head.channels for head in child.vlm_film.heads] == [6, 6]
    assert run.attached == 1


def test_a_subclass_that_rebuilds_its_decoder_is_modulated_there_or_refused_never_a_silent_baseline(tmp_path: Path) -> None:
    host, run = patched(tmp_path)

    class Child(host.Net):
        def __init__(self) -> None:
            super().__init__()
            self.ups = nn.ModuleList(nn.ModuleList([host.Block(4, 4), host.Block(4, 4), nn.Identity(), nn.Identity()]) for _ in range(2))

    host.Net = Child
    outputs = []
    try:
        model = host.Model()
        randomise(model.net.vlm_film)
        image = torch.rand(1, 1, 8, 8)
        for scale in (0.1, 1.0):
            from vlmfilm_plugin.forward.given_features import GivenFeatures

            given = scale * torch.randn(1, model.net.vlm_film.architecture.feature_dim)
            with torch.no_grad(), conditioning.in_force(GivenFeatures(model.net.vlm_film.film_id, given, run.settings)):
                outputs.append(model.net(image, torch.zeros(1), image))
    except VlmFilmError:
        return
    assert not torch.equal(*outputs)


# Adapters


def adapter_module(name: str, source: str) -> ModuleType:
    module = ModuleType(name)
    sys.modules[name] = module
    exec(f"from vlmfilm_plugin import hookimpl, HostSpec\n{source}", module.__dict__)
    return module


GOOD = "@hookimpl\ndef vlmfilm_host(module):\n    return HostSpec(name='good')\n"


def test_a_broken_entry_point_is_noted_and_the_others_go_on() -> None:
    adapter_module("third_party_good", GOOD)
    registry = AdapterRegistry()
    for name, value in (("a", "third_party_missing"), ("b", "third_party_good:nothing"), ("c", "third_party_good")):
        registry.load(EntryPoint(name=name, value=value, group="vlmfilm.hosts"))
    assert [name for name, _ in registry.failures] == ["a = third_party_missing", "b = third_party_good:nothing"]
    assert [type(error) for _, error in registry.failures] == [ModuleNotFoundError, AttributeError]
    assert registry.recognise(ModuleType("any")).name == "good"


@pytest.mark.parametrize(
    "source",
    [
        "@hookimpl\ndef vlmfilm_hosts(module):\n    return None\n",
        "@hookimpl\ndef vlmfilm_host(modul):\n    return None\n",
        "def vlmfilm_host(module):\n    return None\n",
        "",
    ],
    ids=["misspelt hook", "misspelt argument", "not marked", "empty"],
)
def test_a_misspelt_hook_is_refused_every_time_and_leaves_the_registry_clean(source: str) -> None:
    broken = adapter_module("third_party_broken", source)
    registry = AdapterRegistry()
    for _ in range(2):
        with pytest.raises(HostError, match="third_party_broken"):
            registry.register(broken)
    registry.register(adapter_module("third_party_good", GOOD))
    assert registry.recognise(ModuleType("any")).name == "good"


def test_the_same_adapter_from_two_entry_points_counts_once() -> None:
    adapter_module("third_party_good", GOOD)
    registry = AdapterRegistry()
    for name in ("a", "b"):
        registry.load(EntryPoint(name=name, value="third_party_good", group="vlmfilm.hosts"))
    assert registry.failures == []
    assert registry.recognise(ModuleType("any")).name == "good"


def test_two_adapters_that_recognise_one_module_are_refused_by_name() -> None:
    registry = AdapterRegistry()
    registry.register(adapter_module("third_party_one", GOOD))
    registry.register(adapter_module("third_party_two", GOOD.replace("'good'", "'other'")))
    with pytest.raises(HostError) as caught:
        registry.recognise(ModuleType("host"))
    assert set(str(caught.value.facts["found"]).split(", ")) == {"good", "other"}


def test_nobody_recognises_a_strange_module() -> None:
    registry = AdapterRegistry()
    for adapter in (sofl_seg, med_seg_diff_pytorch, Adapter()):
        registry.register(adapter)
    assert registry.recognise(ModuleType("json")) is None


# Our own adapters


def view(phase: str, samples: int, rows: int, **given: Any) -> RowView:
    return RowView(phase, samples, rows, given.get("image"), given.get("condition"))


def listed(rows: Sequence[int] | None) -> list[int] | None:
    return None if rows is None else list(rows)


@pytest.mark.parametrize(
    ("phase", "samples", "rows", "expected"),
    [
        ("train", 2, 2, [0, 1]),
        ("train", 2, 6, [0, 0, 0, 1, 1, 1]),
        ("train", 1, 4, [0, 0, 0, 0]),
        ("train", 2, 5, None),
        ("train", 4, 2, None),
        ("train", 3, 0, None),
        ("val", 1, 4, [0, 0, 0, 0]),
        ("test", 1, 1, [0]),
        ("val", 2, 4, None),
        ("test", 2, 2, None),
        ("predict", 3, 1, None),
    ],
)
def test_rows_of_repeats_samples_in_training_and_refuses_what_cannot_be_told(phase: str, samples: int, rows: int, expected: list[int] | None) -> None:
    assert listed(sofl_seg.rows_of(view(phase, samples, rows))) == expected


def test_whole_images_of_an_evaluation_batch_are_told_apart_by_content_alone() -> None:
    image = torch.rand(2, 1, 4, 4)
    assert listed(sofl_seg.rows_of(view("val", 2, 2, image=image, condition=image.clone()))) == [0, 1]
    assert sofl_seg.rows_of(view("val", 2, 2, image=image, condition=image.flip(0))) is None
    assert sofl_seg.rows_of(view("val", 2, 2, image=image, condition=image[:, :, :2, :2])) is None


def test_rows_that_a_step_runs_again_are_found_by_content_and_never_by_their_number() -> None:
    patches = torch.rand(6, 1, 4, 4)
    first = patches, [0, 0, 1, 1, 2, 2]

    def again(rows: list[int], samples: int = 3) -> list[int] | None:
        return listed(sofl_seg.rows_of(RowView("train", samples, len(rows), torch.rand(samples, 1, 8, 8), patches[rows], first)))

    assert again([5, 1]) == [2, 0]
    # As many rows as samples, drawn at random: by their number they would get each other's feature.
    assert again([4, 2, 0]) == [2, 1, 0]
    same = patches.clone()
    same[5] = same[0]
    assert sofl_seg.rows_of(RowView("train", 3, 2, None, same[[5, 1]], (same, first[1]))) is None
    assert sofl_seg.rows_of(RowView("train", 3, 2, None, torch.stack([patches[0], torch.rand(1, 4, 4)]), first)) is None
    assert listed(sofl_seg.rows_of(RowView("train", 3, 3, None, torch.rand(3, 1, 4, 4), first))) == [0, 1, 2]


def test_a_step_that_runs_some_rows_again_conditions_them_on_their_own_images(tmp_path: Path) -> None:
    host, run = patched(tmp_path)
    model = host.Model()
    indices: list[Any] = []
    model.net.register_forward_hook(lambda *_: indices.append(conditioning.stacks.contexts[-1].index), prepend=True)
    given = batch()
    image = given["image"].repeat_interleave(2, dim=0)
    with run.batch(given, phase="train", value_range=(0.0, 1.0), rows=sofl_seg.rows_of):
        for rows in (image, image[[5, 0, 3]], image[[5, 0]], image[[1, 2]], image):
            model.net(torch.randn_like(rows), torch.rand(len(rows)), rows)
    assert [index.tolist() for index in indices] == [[0, 0, 1, 1, 2, 2], [2, 0, 1], [2, 0], [0, 1], [0, 0, 1, 1, 2, 2]]


def test_same_rows_maps_equal_numbers_and_one_sample_and_nothing_else() -> None:
    assert listed(same_rows(view("train", 3, 3))) == [0, 1, 2]
    assert listed(same_rows(view("val", 1, 4))) == [0] * 4
    assert same_rows(view("val", 2, 4)) is None


@pytest.mark.parametrize("mapping", [[0], [0, 1, 2, 9, 0, 0], [-1] * 6, None])
def test_a_row_map_of_the_wrong_length_or_range_is_refused(mapping: list[int] | None, tmp_path: Path) -> None:
    run = runtime(tmp_path)
    unet = SmallUNet()
    run.attach(unet, UNet(cls=SmallUNet, targets=TARGETS))
    with pytest.raises(ConditionError, match="which sample"), run.batch(batch(), phase="train", value_range=(0.0, 1.0), rows=lambda _: mapping):
        unet(*inputs(6))


def named_module(name: str, **contents: Any) -> ModuleType:
    module = ModuleType(name)
    for key, value in contents.items():
        if inspect.isclass(value):
            value.__module__ = name
        setattr(module, key, value)
    return module


def test_a_module_of_the_hosts_name_with_other_classes_is_left_alone() -> None:
    class DiffusionUNet(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return x

    class ResnetBlock(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    class FlowModel:
        def __init__(self, rate: float) -> None: ...

    class TrainRunner:
        def __init__(self, options: Mapping[str, Any]) -> None: ...

    for module in (
        named_module("src.archs.components.diffusion_unet", DiffusionUNet=DiffusionUNet, ResnetBlock=ResnetBlock),
        named_module("src.archs.components.diffusion_unet"),
        named_module("src.archs.flow_model", FlowModel=FlowModel),
        named_module("src.archs.flow_model", FlowModel=lambda arch_name: None),
        named_module("src.runner.train_runner", TrainRunner=TrainRunner),
        named_module("src.data.base_dataset", BaseOCTDataset=TrainRunner),
    ):
        assert sofl_seg.vlmfilm_host(module) is None, module.__name__
    for module in (named_module("med_seg_diff_pytorch.med_seg_diff_pytorch"), named_module("m", Unet=DiffusionUNet, MedSegDiff=FlowModel)):
        assert med_seg_diff_pytorch.vlmfilm_host(module) is None


def test_a_unet_of_the_family_is_recognised_by_structure_and_imported_ones_are_not() -> None:
    class ResnetBlock(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return x

    class AnyName(nn.Module):
        def __init__(self, dim: int, image_size: int, mask_channels: int = 1, input_img_channels: int = 1, dim_mult: tuple[int, ...] = (1,)) -> None:
            super().__init__()

        def forward(self, x: Tensor, time: Tensor, cond: Tensor) -> Tensor:
            return x

    module = named_module("src.archs.components.diffusion_unet", ResnetBlock=ResnetBlock, AnyName=AnyName)
    spec = sofl_seg.vlmfilm_host(module)
    assert spec is not None
    assert [unet.cls for unet in spec.unets] == [AnyName]
    AnyName.__module__ = "elsewhere"
    assert sofl_seg.vlmfilm_host(module) is None


def test_the_config_of_the_host_is_read_with_its_port_names() -> None:
    model = {"arch_name": "x", "use_vlm_film": True, "vlm_film_config": {"cond_dim": 8}, "vlm_film_decoder_stages": [0]}
    assert sofl_seg.read_config({"config": {"model": model}}) == {"cond_dim": 8, "use_vlm_film": True, "vlm_film_decoder_stages": [0]}
    assert sofl_seg.read_config({"config": {"model": None}}) == {}
    assert sofl_seg.read_resume({"config": {}}) is None


def test_the_real_med_seg_diff_trains_and_samples_with_film(tmp_path: Path) -> None:
    pytest.importorskip("einops")
    host = import_med_seg_diff()
    spec = med_seg_diff_pytorch.vlmfilm_host(host)
    assert spec is not None
    run = runtime(tmp_path)
    # Subclasses, so that the installed package itself stays unpatched for other tests.
    unet_class = type("Unet", (host.Unet,), {})
    diffusion_class = type("MedSegDiff", (host.MedSegDiff,), {})
    patch_host(
        host,
        HostSpec(name="m", unets=[UNet(cls=unet_class, targets=TARGETS)], models=[diffusion_class], steps=[steps_for(spec, diffusion_class)]),
        run,
    )
    unet = unet_class(dim=8, image_size=16, mask_channels=1, input_img_channels=1, dim_mults=(1, 2), full_self_attn=(False, False))
    diffusion = diffusion_class(unet, timesteps=3)
    image, mask = torch.rand(2, 1, 16, 16), torch.rand(2, 1, 16, 16).round()
    diffusion(mask, image).backward()
    assert all(parameter.grad is not None for parameter in unet.vlm_film.heads.parameters())
    randomise(unet.vlm_film)
    assert diffusion.sample(image).shape == mask.shape
    with pytest.raises(ConditionError):
        unet(mask, torch.zeros(2), image)


def steps_for(spec: HostSpec, cls: type) -> Steps:
    return Steps(cls=cls, phases=spec.steps[0].phases, value_range=spec.steps[0].value_range, batch=spec.steps[0].batch)


def import_med_seg_diff() -> ModuleType:
    """Import the one module of the package: its `__init__` asks for packages that the module does not need."""
    import importlib
    import importlib.util

    found = importlib.util.find_spec("med_seg_diff_pytorch")
    if found is None or not found.submodule_search_locations:
        pytest.skip("med-seg-diff-pytorch is not installed")
    path = Path(found.submodule_search_locations[0]) / "med_seg_diff_pytorch.py"
    spec = importlib.util.spec_from_file_location("third_party_med_seg_diff", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
