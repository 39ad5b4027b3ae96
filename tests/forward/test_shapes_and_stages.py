"""FiLM on decoders of any shape: stages by resolution, several blocks a stage, one to three dimensions, channels last, tokens, tuples.

Every net is small and real; what a statement gets wrong must stop the first forward, and never modulate another axis.
"""

from __future__ import annotations

import copy
import json
import pickle
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from small_unet import randomise
from torch import Tensor, nn

from vlmfilm_plugin import FilmHandle, HostError, SettingsError, TargetMatchError, VlmFilmError, attach, to_port_layout
from vlmfilm_plugin.film.alarm import Advice, ConditionAlarm
from vlmfilm_plugin.run.log_fields import StepFacts
from vlmfilm_plugin.run.log_lines import Diagnostics, StageRecorder

FEATURES = 3
SMALL: dict[str, Any] = {"feature_dim": FEATURES, "cond_dim": 4, "text_mlp_hidden_dim": 4}
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
Pair = namedtuple("Pair", "first second")


@dataclass
class Result:
    sample: Tensor
    other: Tensor


class Output(OrderedDict[str, Tensor]):
    """A mapping as some libraries return it."""


@dataclass(frozen=True)
class Frozen:
    sample: Tensor


class Block(nn.Module):
    """Two convolutions, so that channels cannot be read off the last one; `form` shapes what is returned."""

    def __init__(self, channels: int, rank: int, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.form = CONVOLUTIONS[rank](channels, channels, 3, padding=1), CONVOLUTIONS[rank](channels, channels, 3, padding=1), form

    def forward(self, x: Tensor) -> Any:
        return self.form(torch.tanh(self.b(torch.tanh(self.a(x)))))


def plain(x: Tensor) -> Tensor:
    return x


class Net(nn.Module):
    """`ups.{stage}.{block}`, `counts[stage]` blocks at each of growing resolutions; upsampled behind the last block of a stage."""

    def __init__(
        self,
        rank: int = 2,
        counts: tuple[int, ...] = (2, 1, 3),
        channels: int = 4,
        form: Callable[[Tensor], Any] = plain,
        back: Callable[[Any], Tensor] = plain,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = CONVOLUTIONS[rank](1, channels, 2 ** (len(counts) - 1), stride=2 ** (len(counts) - 1))
        self.ups = nn.ModuleList(nn.ModuleList(Block(channels, rank, form) for _ in range(count)) for count in counts)
        # Transposed blocks are targets as well.
        self.grow = nn.ModuleList(TRANSPOSED[rank](channels, channels, 2, stride=2) for _ in counts[1:])
        self.last, self.back, self.order = CONVOLUTIONS[rank](channels, 1, 1), back, list(range(len(counts)))

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for place in self.order:
            for block in self.ups[place]:
                h = h + self.back(block(h))
            if place + 1 < len(self.order):
                h = self.grow[place](h)
        return self.last(h)


def image(rank: int = 2, rows: int = 2, size: int = 16) -> Tensor:
    return torch.randn(rows, 1, *([size] * rank), generator=torch.Generator().manual_seed(1))


def call(handle: FilmHandle, x: Tensor) -> Tensor:
    with handle.condition(torch.randn(x.shape[0], FEATURES, generator=torch.Generator().manual_seed(2))):
        return handle.unet(x)


def by_hand(net: Net, handle: FilmHandle, x: Tensor, axis: int = 1) -> Tensor:
    """Return the output with FiLM written out: gamma and beta along `axis` of each block's features."""
    film, features = handle.film, torch.randn(x.shape[0], FEATURES, generator=torch.Generator().manual_seed(2))
    pairs = iter([film.head(position)(film.project(film.transform(features))) for position in range(len(handle.stages))])
    h = net.stem(x)
    for place, stage in enumerate(net.ups):
        for block in stage:
            y = torch.tanh(block.b(torch.tanh(block.a(h))))
            gamma, beta = (each.reshape(*each.shape[:2], *[1] * (y.dim() - 2)) for each in next(pairs))
            h = h + gamma * y + beta
        h = net.grow[place](h) if place + 1 < len(net.ups) else h
    return net.last(h)


STATED: dict[str, Any] = {"targets": "ups.*.*", "stages": ["ups.0", "ups.1", "ups.2"], "channels": 4}


# Stages and heads


def test_a_stage_is_a_resolution_with_a_head_for_each_block_and_one_of_one_block_keeps_its_name() -> None:
    handle = attach(Net(), **STATED, **SMALL)
    assert [(stage.label, stage.path) for stage in handle.stages] == [
        *(("0.0", "ups.0.0"), ("0.1", "ups.0.1"), ("1", "ups.1.0")),
        *(("2.0", "ups.2.0"), ("2.1", "ups.2.1"), ("2.2", "ups.2.2")),
    ]
    names = {".".join(name.split(".")[:-3]) for name in handle.film.state_dict() if ".mlp." in name}
    assert names == {"heads.0.0", "heads.0.1", "heads.1", "heads.2.0", "heads.2.1", "heads.2.2"}
    randomise(handle.film)
    torch.testing.assert_close(call(handle, image()), by_hand(handle.unet, handle, image()))


def test_selected_stages_are_resolutions_and_last_is_one_block_each() -> None:
    handle = attach(Net(), **STATED, decoder_stages=[0, 2], blocks="last", **SMALL)
    assert [(stage.index, stage.block, stage.path) for stage in handle.stages] == [(0, None, "ups.0.1"), (2, None, "ups.2.2")]
    assert {name.split(".")[1] for name in handle.film.heads.state_dict()} <= {"ln", "mlp"} or len(handle.film.heads) == 2
    call(handle, image())
    assert set(handle.statistics()) == {0, 2}
    both = attach(Net(), **STATED, decoder_stages=[2, 1], **SMALL)
    call(both, image())
    assert list(both.statistics()) == [1, "2.0", "2.1", "2.2"]


def test_gradients_reach_each_head_and_off_is_plain_to_the_bit() -> None:
    for rank in (1, 2, 3):
        net = Net(rank)
        expected = net(image(rank)).detach()
        handle = attach(net, **STATED, **SMALL)
        randomise(handle.film)
        with handle.mode("off"), torch.no_grad():
            assert torch.equal(net(image(rank)), expected)
        y = call(handle, image(rank))
        assert float((y - expected).abs().max()) > 1e-3
        y.square().mean().backward()
        assert all(float(head.mlp[2].weight.grad.abs().sum()) > 0 for head in handle.film.all_heads())
        torch.testing.assert_close(y, by_hand(net, handle, image(rank)))
        handle.remove()
        assert torch.equal(net(image(rank)), expected)


def test_checkpoints_tell_blocks_and_load_into_nothing_else() -> None:
    handle, again = attach(Net(), **STATED, **SMALL), attach(Net(), **STATED, **SMALL)
    randomise(handle.film)
    again.unet.load_state_dict(handle.unet.state_dict())
    assert torch.equal(call(handle, image()), call(again, image()))
    last = attach(Net(), **STATED, blocks="last", **SMALL)
    with pytest.raises(VlmFilmError, match="another architecture") as caught:
        last.unet.load_state_dict(handle.unet.state_dict())
    assert "0.1 (ups.0.1" in str(caught.value) and "blocks=all" in str(caught.value)


def test_the_ports_layout_has_one_head_a_stage() -> None:
    with pytest.raises(VlmFilmError, match="one head a stage"):
        to_port_layout(attach(Net(), **STATED, **SMALL).unet.state_dict())
    assert to_port_layout(attach(Net(), **STATED, blocks="last", **SMALL).unet.state_dict())


def test_the_alarm_and_the_log_lines_tell_blocks_apart(capsys: pytest.CaptureFixture[str]) -> None:
    handle = attach(Net(), **STATED, **SMALL, film_debug_lines="full")
    with torch.no_grad():
        for head in handle.film.all_heads():
            head.mlp[2].bias.fill_(1.0)
        handle.film.head(1).mlp[2].weight.normal_()
    alarm = ConditionAlarm.of(handle.settings)
    alarm.collect(["a", "b"], torch.randn(2, FEATURES))
    assert alarm.is_due(0)
    verdicts = alarm.read(handle.film, Advice.of(handle.film, "`feature_transform: center`"))
    assert {key for key, verdict in verdicts.items() if verdict.is_same} == {"0.0", 1, "2.0", "2.1", "2.2"} and len(verdicts) == 6
    assert "at stages 0.0, 1, 2.0, 2.1, 2.2 (it does reach stage 0.1)" in capsys.readouterr().out
    recorder = StageRecorder(Diagnostics(handle.settings), StepFacts("train", 0, 0, 0, 2, "on", "post_block2", "image"), verdicts)
    x, gamma = torch.randn(2, 4, 3, 3), torch.ones(2, 4, 1, 1)
    for stage in (*handle.stages, *handle.stages):
        recorder.record(stage, x, x, gamma, 0 * gamma, None)
    lines = [json.loads(line.split("] ", 1)[1]) for line in capsys.readouterr().out.splitlines()]
    assert [(line["film_stage_idx"], line.get("film_block_idx")) for line in lines] == [(0, 0), (0, 1), (1, None), (2, 0), (2, 1), (2, 2)]
    assert lines[1]["gamma_between_images"] > 0 == lines[0]["gamma_between_images"]


def test_copies_and_pickles_use_their_own_heads() -> None:
    handle = attach(Net(), **STATED, **SMALL)
    randomise(handle.film)
    expected = call(handle, image())
    for twin in (copy.deepcopy(handle.unet), pickle.loads(pickle.dumps(handle.unet))):
        with handle.condition(torch.randn(2, FEATURES, generator=torch.Generator().manual_seed(2))):
            assert torch.equal(twin(image()), expected)
            twin.vlm_film.head(1).mlp[2].bias.data.add_(1.0)
            assert not torch.equal(twin(image()), expected)
    assert torch.equal(call(handle, image()), expected)


def test_compiled_blocks_are_verified_and_modulated_alike() -> None:
    for form, back, options in ((plain, plain, {}), (second, first, {"output": 1})):
        handle = attach(Net(1, form=form, back=back), **STATED, **options, **SMALL)
        randomise(handle.film)
        expected = call(attached_like(handle, form, back, options), image(1))
        torch._dynamo.reset()
        compiled = torch.compile(handle.unet, backend="eager")
        with handle.condition(torch.randn(2, FEATURES, generator=torch.Generator().manual_seed(2))):
            torch.testing.assert_close(compiled(image(1)), expected)
    wrong = attach(Net(1), targets="ups.*.*", stages=[["ups.0", "ups.1"], "ups.2"], channels=4, **SMALL)
    torch._dynamo.reset()
    with pytest.raises(HostError, match="one stage have several resolutions"), wrong.condition(torch.randn(2, FEATURES)):
        torch.compile(wrong.unet, backend="eager")(image(1))


def second(x: Tensor) -> tuple[Tensor, Tensor]:
    return x * 2, x


def first(output: tuple[Tensor, Tensor]) -> Tensor:
    return output[1]


def attached_like(handle: FilmHandle, form: Any, back: Any, options: dict[str, Any]) -> FilmHandle:
    twin = attach(Net(1, form=form, back=back), **STATED, **options, **SMALL)
    twin.unet.load_state_dict(handle.unet.state_dict())
    return twin


# Where features and channels are


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous()


def channels_first(x: Tensor) -> Tensor:
    return x.movedim(-1, 1)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("channels", [4, 8])
def test_channels_last_and_tokens_are_modulated_along_their_channels(rank: int, channels: int) -> None:
    # With 8 channels the middle stage has as many positions along each axis.
    net = Net(rank, channels=channels, form=channels_last, back=channels_first)
    handle = attach(net, **{**STATED, "channels": channels}, channel_axis=-1, **SMALL)
    randomise(handle.film)
    torch.testing.assert_close(call(handle, image(rank)), by_hand(net, handle, image(rank)))


@pytest.mark.parametrize(
    ("form", "back", "output"),
    [
        (lambda x: (x, x), lambda y: y[0], 0),
        (lambda x: (x * 2, x), lambda y: y[1], 1),
        (lambda x: (x * 2, x), lambda y: y[1], -1),
        (lambda x: [x, None], lambda y: y[0], 0),
        (lambda x: Pair(x, x), lambda y: y.second, 1),
        (lambda x: {"h": x, "skip": x}, lambda y: y["h"], "h"),
        (lambda x: Output(sample=x), lambda y: y["sample"], "sample"),
        (lambda x: Result(x, x), lambda y: y.sample, "sample"),
        (lambda x: Frozen(x), lambda y: y.sample, "sample"),
    ],
)
def test_the_stated_element_of_an_output_alone_is_modulated(form: Any, back: Any, output: Any) -> None:
    kinds = []

    def noted(y: Any) -> Tensor:
        kinds.append(type(y))
        found: Tensor = back(y)
        return found

    net = Net(form=form, back=noted)
    handle = attach(net, **STATED, output=output, **SMALL)
    randomise(handle.film)
    torch.testing.assert_close(call(handle, image()), by_hand(net, handle, image()))
    assert set(kinds) == {type(form(image()))}


@pytest.mark.parametrize("output", [None, 2, "h", -3])
def test_a_tuple_without_its_element_stops_the_first_forward(output: Any) -> None:
    handle = attach(Net(form=second, back=first), **STATED, output=output, **SMALL)
    for _ in range(2):
        with pytest.raises(HostError, match="no tensor where its features should be") as caught:
            call(handle, image())
    assert "output" in str(caught.value.fix)
    with handle.mode("off"), pytest.raises(HostError):
        handle.unet(image())


def test_a_three_dimensional_net_is_never_modulated_along_depth() -> None:
    # Batch 1 and as many slices as channels: gamma (1, C, 1, 1) would broadcast along depth.
    net = Net(3, counts=(1,), channels=8)
    handle = attach(net, targets="ups.*.*", stages=["ups.0"], channels=8, **SMALL)
    randomise(handle.film)
    x = image(3, rows=1, size=8)
    torch.testing.assert_close(call(handle, x), by_hand(net, handle, x))
    wrong = attach(Net(3, counts=(1,), channels=8), targets="ups.*.*", stages=["ups.0"], channels=8, rank=2, **SMALL)
    with pytest.raises(HostError, match="another rank"):
        call(wrong, x)


@pytest.mark.parametrize("rank", [2, 3])
def test_an_axis_that_no_size_tells_is_told_by_the_convolutions_and_never_taken_for_another(rank: int) -> None:
    x = image(rank, rows=1, size=4)
    silent: dict[str, Any] = {"targets": "ups.*.*", "stages": ["ups.0"], "channels": 4}
    net = Net(rank, counts=(2,))
    handle = attach(net, **silent, **SMALL)
    randomise(handle.film)
    torch.testing.assert_close(call(handle, x), by_hand(net, handle, x))
    moved = Net(rank, counts=(2,), form=channels_last, back=channels_first)
    with pytest.raises(HostError, match="cannot tell where the channels"):
        call(attach(moved, **silent, **SMALL), x)
    told = attach(Net(rank, counts=(2,)), targets="ups.*.*", stages=["ups.0"], example=(x,), **SMALL)
    assert [stage.channels for stage in told.stages] == [4, 4]
    with pytest.raises(HostError, match="cannot tell where the channels"):
        attach(Net(rank, counts=(2,), form=channels_last, back=channels_first), targets="ups.*.*", stages=["ups.0"], example=(x,), **SMALL)


def test_unknown_rank_axis_or_channels_are_refused_at_attach() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(4, 4)])

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[0](x)

    for options in ({}, {"rank": 1}, {"channel_axis": -1}):
        with pytest.raises(HostError, match="how the features of a block lie") as caught:
            attach(Tokens(), targets="blocks.0", channels=4, **options, **SMALL)
        assert ("rank" in str(caught.value.fix)) == ("rank" not in options)
    handle = attach(Tokens(), targets="blocks.0", channels=4, rank=1, channel_axis=-1, **SMALL)
    randomise(handle.film)
    x = torch.randn(1, 4, 4)
    y = call(handle, x)
    film = handle.film
    gamma, beta = film.head(0)(film.project(torch.randn(1, FEATURES, generator=torch.Generator().manual_seed(2))))
    torch.testing.assert_close(
        y, handle.unet.blocks[0]._parameters["bias"] * gamma.flatten() + x @ handle.unet.blocks[0].weight.T * gamma.flatten() + beta.flatten()
    )
    with pytest.raises(HostError, match="cannot tell the channels"):
        attach(Net(), targets="ups.*.*", stages=["ups.0", "ups.1", "ups.2"], **SMALL)


@pytest.mark.parametrize(
    "wrong", [{"rank": 0}, {"rank": 4}, {"rank": True}, {"channel_axis": 0}, {"channel_axis": 2}, {"output": 1.5}, {"channels": 0}, {"channels": "4"}]
)
def test_fields_that_no_block_can_have_are_named(wrong: dict[str, Any]) -> None:
    net = Net()
    with pytest.raises(HostError, match="record `UNet` is wrong") as caught:
        attach(net, **{**STATED, **wrong}, **SMALL)
    assert next(iter(wrong)) in caught.value.facts
    assert not hasattr(net, "vlm_film")


@pytest.mark.parametrize("channels", [5, {"ups.*.*": 5}, lambda block: 5])
def test_wrong_channels_stop_the_first_forward(channels: Any) -> None:
    with pytest.raises(HostError, match="other channels than were attached"):
        call(attach(Net(), **{**STATED, "channels": channels}, **SMALL), image())


@pytest.mark.parametrize("channels", [{"ups.0.*": 4}, {"ups.*.*": 4, "ups.0.0": 5}, lambda block: None, lambda block: 0])
def test_channels_that_are_not_stated_once_for_each_block_are_refused(channels: Any) -> None:
    with pytest.raises(HostError, match="what is stated is none"):
        attach(Net(), **{**STATED, "channels": channels}, **SMALL)


# The first forward


def reversed_net() -> Net:
    net = Net(counts=(1, 1, 1))
    net.order.reverse()
    net.stem, net.grow = nn.Conv2d(1, 4, 1), nn.ModuleList([nn.Identity(), nn.MaxPool2d(2), nn.MaxPool2d(2)])
    return net


def test_plain_numbers_that_run_the_other_way_stop_the_first_forward() -> None:
    handle = attach(reversed_net(), targets="ups.*.0", channels=4, **SMALL)
    with pytest.raises(HostError, match="another order"):
        call(handle, image())


def test_statements_that_the_forward_contradicts_name_what_ran() -> None:
    one_too_many = attach(Net(counts=(1, 1, 1)), targets="ups.*.0", stages=[["ups.0", "ups.1"], ["ups.2"]], channels=4, **SMALL)
    with pytest.raises(HostError, match="several resolutions") as caught:
        call(one_too_many, image())
    assert "stages=[['ups.0.0'], ['ups.1.0'], ['ups.2.0']]" in str(caught.value.fix)
    permuted = attach(Net(counts=(1, 1, 1)), targets="ups.*.0", stages=["ups.1", "ups.0", "ups.2"], channels=4, **SMALL)
    with pytest.raises(HostError, match="another order"):
        call(permuted, image())
    split = attach(Net(), targets="ups.*.*", stages=["ups.0.0", "ups.0.1", "ups.1", "ups.2"], channels=4, **SMALL)
    with pytest.raises(HostError, match="several stages have one resolution"):
        call(split, image())


def test_blocks_that_are_shared_called_twice_or_not_at_all_are_refused() -> None:
    shared = Net()
    shared.ups[2][1] = shared.ups[2][0]
    with pytest.raises(TargetMatchError, match="name a module twice"):
        attach(shared, **STATED, **SMALL)
    twice = Net(counts=(1, 1, 1))
    handle = attach(twice, targets="ups.*.0", channels=4, **SMALL)
    twice.back = lambda y: y if y.shape[-1] < 16 else twice.ups[2][0].forward(y) + 0 * twice.ups[0][0](twice.stem(image()))
    with pytest.raises(HostError, match="more than once"):
        call(handle, image())
    idle = Net(counts=(1, 1, 1))
    idle.order = [0, 1]
    with pytest.raises(HostError, match="did not at 1 of 3"):
        call(attach(idle, targets="ups.*.0", channels=4, **SMALL), image())


def test_a_pattern_of_one_resolution_only_is_refused() -> None:
    net = Net()
    for pattern in ("ups.0.*", "ups.2.*", r"re:ups\.2\.\d"):
        with pytest.raises(TargetMatchError, match="one resolution only"):
            attach(net, targets=pattern, channels=4, **SMALL)
        with pytest.raises(TargetMatchError, match="one resolution only"):
            attach(net, targets=pattern, example=(image(),), **SMALL)
    stated = attach(net, targets="ups.2.*", stages=["ups.2"], channels=4, **SMALL)
    assert [stage.label for stage in stated.stages] == ["0.0", "0.1", "0.2"]


@pytest.mark.parametrize("targets", [["ups.0", "ups.0.0"], "ups.**", lambda net: ["ups.1", "ups.1.0.a"]])
def test_parents_and_children_together_are_refused(targets: Any) -> None:
    with pytest.raises(TargetMatchError, match="inside one another"):
        attach(Net(), targets=targets, **SMALL)


def test_a_function_says_the_paths_and_the_net_can_still_be_pickled() -> None:
    handle = attach(Net(), **{**STATED, "targets": lambda net: [f"ups.{i}.0" for i in range(len(net.ups))]}, **SMALL)
    assert [stage.path for stage in handle.stages] == ["ups.0.0", "ups.1.0", "ups.2.0"]
    twin = pickle.loads(pickle.dumps(handle.unet))
    with handle.condition(torch.zeros(1, FEATURES)):
        twin(image())
    with pytest.raises(TargetMatchError, match="closest"):
        attach(Net(), targets=lambda net: ["ups.0.7"], **SMALL)


# An example


def test_an_example_tells_what_is_not_stated_and_leaves_the_net_as_it_was() -> None:
    net = Net(form=second, back=first)
    net.ups[0].add_module("norm", nn.BatchNorm2d(4))
    net.stem = nn.Sequential(net.stem, nn.BatchNorm2d(4), nn.Dropout(0.5))
    before, flags = copy.deepcopy(net.state_dict()), [module.training for module in net.modules()]
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    handle = attach(net, targets=r"re:ups\.\d\.\d", output=1, example=(image(),), **SMALL)
    assert torch.equal(torch.rand(1), expected)
    assert [stage.label for stage in handle.stages] == ["0.0", "0.1", "1", "2.0", "2.1", "2.2"] and {stage.channels for stage in handle.stages} == {4}
    handle.remove()
    assert [module.training for module in net.modules()] == flags
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())


def test_an_example_by_name_and_names_that_run_backwards() -> None:
    net = reversed_net()
    with pytest.raises(TargetMatchError, match="sizes do not grow"):
        attach(net, targets="ups.*.0", example={"x": image()}, **SMALL)
    with pytest.raises(HostError, match="cannot run Net on the example"):
        attach(Net(), targets="ups.*.0", example=(image(), 3), **SMALL)
    assert not any(module._forward_hooks for module in net.modules())


def test_an_example_that_contradicts_statements_is_refused() -> None:
    for wrong in ({"channels": 5}, {"rank": 3}):
        with pytest.raises(HostError):
            attach(Net(), targets="ups.*.*", example=image(), **wrong, **SMALL)


def test_a_spatial_gate_is_for_two_dimensions() -> None:
    with pytest.raises(SettingsError, match="two dimensions"):
        attach(Net(3), **STATED, spatial_gate="vessel_junctions", **SMALL)
    handle = attach(Net(3), **STATED, **SMALL)
    with pytest.raises(VlmFilmError, match="spatial gate"), handle.condition(torch.ones(1, FEATURES), gate=torch.ones(1, 1, 4, 4)):
        handle.unet(image(3))
    last = attach(Net(form=channels_last, back=channels_first), **STATED, channel_axis=-1, **SMALL)
    randomise(last.film)
    with torch.no_grad(), last.condition(torch.ones(1, FEATURES), gate=torch.zeros(1, 1, 16, 16)):
        gated = last.unet(image())
    with torch.no_grad(), last.mode("off"):
        assert torch.equal(gated, last.unet(image()))


# Values of a call


def test_the_rows_and_the_condition_image_are_functions_of_the_arguments() -> None:
    seen: list[Tensor] = []

    class Late(Net):
        def forward(self, t: float, both: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(both[:, :1])

    def gate(view: Any) -> None:
        seen.extend([view.x, view.image])

    x = torch.cat([image(), 2 * image()], dim=1)
    handle = attach(Late(), **STATED, x="both", condition=lambda a: a["both"][:, :-1], **SMALL)
    with handle.condition(torch.ones(2, FEATURES), gate=gate):
        handle.unet(0.5, both=x)
    assert torch.equal(seen[0], x) and torch.equal(seen[1], x[:, :-1])
    blind = attach(Late(), **STATED, **SMALL)
    with pytest.raises(HostError, match="rows of this call"), blind.condition(torch.ones(2, FEATURES)):
        blind.unet(0.5, x)
