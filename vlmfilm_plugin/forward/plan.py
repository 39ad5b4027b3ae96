"""Where FiLM goes in a UNet: its blocks by stage, their channels and layout, before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from vlmfilm_plugin.errors import HostError, SettingsError, TargetMatchError
from vlmfilm_plugin.film.architecture import Stage, is_count
from vlmfilm_plugin.film.layout import AXES, RANKS, Layout, convolutions_in, rank_of
from vlmfilm_plugin.film.module import MARKER
from vlmfilm_plugin.film.stage_order import Groups, Target, grouped, numbered, plainly_numbered, select_stages, stated_groups
from vlmfilm_plugin.film.targets import fits, match_targets, texts_of
from vlmfilm_plugin.forward.axis_probe import AxisProbe
from vlmfilm_plugin.forward.example import Example, layouts_seen, outputs_of, stages_by_size
from vlmfilm_plugin.host_spec import BLOCKS, Paths, UNet
from vlmfilm_plugin.settings.record import Settings


@dataclass(frozen=True)
class Selection:
    """How the blocks are found, in plain values: they are copied and pickled with the UNet, and found again at its first forward.

    Attributes:
        patterns: of the blocks.
        groups: the patterns of each stage; None: the paths count them.
        blocks: `all`, or the `last` of each stage.
        decoder_stages: the selection, None for all.
    """

    patterns: tuple[str, ...]
    groups: Groups | None
    blocks: str
    decoder_stages: tuple[int, ...] | None

    def find(self, unet: nn.Module, origin: str = "attachment", chosen_by: str = "attachment") -> list[Target]:
        """Return the blocks that carry FiLM, in order of execution.

        Raises:
            TargetMatchError: patterns, stages or selection do not fit this UNet.
        """
        owner, names = type(unet).__name__, list(modules_in(unet))
        paths = match_targets(names, self.patterns, owner=owner, origin=origin)
        if self.groups is None:
            stages = plainly_numbered(paths, names, owner=owner, origin=origin)
        else:
            stages = grouped(paths, self.groups, names, owner=owner, origin=origin)
        return select_stages(numbered(stages, self.blocks), self.decoder_stages, owner=owner, origin=chosen_by)


@dataclass(frozen=True)
class Plan:
    """Where FiLM goes: the blocks in order of execution, their layouts, and how they were found."""

    stages: tuple[Stage, ...]
    layouts: tuple[Layout, ...]
    selection: Selection


def modules_in(unet: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a UNet by path, FiLM's own left out; one that stands in two places has two paths."""
    return {path: module for path, module in unet.named_modules(remove_duplicate=False) if path and not f"{path}.".startswith(MARKER)}


def plan_of(unet: nn.Module, settings: Settings, spec: UNet, example: Example | None = None) -> Plan:
    """Plan FiLM for a UNet as its record and the settings say.

    Args:
        example: arguments of a forward, from which is read what is not stated.

    Raises:
        TargetMatchError: no blocks, or their stages cannot be told.
        HostError: their channels or their layout cannot be told.
        SettingsError: a spatial gate for blocks that have no two dimensions.
    """
    owner, modules = type(unet).__name__, modules_in(unet)
    _check_statements(spec, owner)
    given, origin = _targets(settings, spec.targets, owner)
    patterns = texts_of(given, unet, what="targets", owner=owner, origin=origin)
    paths = match_targets(modules, patterns, owner=owner, origin=origin)
    _refuse_shared(paths, modules, owner)
    seen, probe = {}, AxisProbe()
    if example is not None:
        seen = layouts_seen(modules, outputs_of(unet, example, {path: modules[path] for path in paths}, probe), spec, probe)
    groups: Groups | None = None
    if spec.stages is not None:
        groups = stated_groups(spec.stages, unet, owner=owner, origin="host adapter")
    elif seen:
        groups = stages_by_size({path: layout.sizes(features) for path, (layout, features) in seen.items()}, owner)
    selection = Selection(patterns, groups, settings.blocks or spec.blocks, settings.decoder_stages)
    targets = selection.find(unet, origin, settings.origin("decoder_stages"))
    layouts = tuple(seen[target.path][0] if seen else _layout(modules[target.path], spec, target.path) for target in targets)
    stages = []
    for target, layout in zip(targets, layouts, strict=True):
        read = int(seen[target.path][1].shape[layout.axis]) if seen else None
        stages.append(Stage(target.index, target.path, _channels(modules[target.path], target.path, spec, read), target.block))
    if settings.gate_name is not None and any(layout.rank != 2 for layout in layouts):
        facts = {"found": f"spatial_gate {settings.gate_name}   (from {settings.origin('spatial_gate')})", "blocks": f"of rank {layouts[0].rank}"}
        raise SettingsError(f"cannot gate FiLM in {owner}: a spatial gate acts in two dimensions", facts, "take the gate out")
    return Plan(tuple(stages), layouts, selection)


def _check_statements(spec: UNet, owner: str) -> None:
    facts: dict[str, object] = {}
    if spec.rank is not None and (isinstance(spec.rank, bool) or spec.rank not in RANKS):
        facts["rank"] = f"{spec.rank!r}, expected one of {RANKS}: the number of spatial dimensions"
    if spec.channel_axis is not None and (isinstance(spec.channel_axis, bool) or spec.channel_axis not in AXES):
        facts["channel_axis"] = f"{spec.channel_axis!r}, expected 1 for (B, C, ...) or -1 for (B, ..., C)"
    if spec.blocks not in BLOCKS:
        facts["blocks"] = f"{spec.blocks!r}, expected one of {', '.join(BLOCKS)}"
    if isinstance(spec.output, bool) or not isinstance(spec.output, int | str | None):
        facts["output"] = f"{spec.output!r}, expected an index, a name, or None"
    if not (spec.channels is None or callable(spec.channels) or isinstance(spec.channels, Mapping) or is_count(spec.channels)):
        facts["channels"] = f"{spec.channels!r}, expected a whole number >= 1, a mapping of paths, or a function of the block"
    if facts:
        raise HostError(f"cannot attach FiLM to {owner}: its record `UNet` is wrong", facts, "correct these fields")


def _targets(settings: Settings, targets: Mapping[str, Paths], owner: str) -> tuple[Paths, str]:
    if settings.targets is not None:
        return settings.targets, settings.origin("targets")
    if settings.apply_point in targets:
        return targets[settings.apply_point], "host adapter"
    raise HostError(
        f"cannot apply FiLM {settings.apply_point} in {owner}",
        {"found": f"apply_point {settings.apply_point!r}   (from {settings.origin('apply_point')})", "expected": f"one of {sorted(targets)}"},
        "correct `apply_point`",
    )


def _refuse_shared(paths: Sequence[str], modules: Mapping[str, nn.Module], owner: str) -> None:
    first: dict[int, str] = {}
    for path in paths:
        other = first.setdefault(id(modules[path]), path)
        if other != path:
            facts = {"found": f"{other} and {path} are one module", "expected": "blocks of their own: a head acts at one place"}
            raise TargetMatchError(f"the FiLM targets of {owner} name a module twice", facts, "narrow `targets` to one of them")


def _layout(block: nn.Module, spec: UNet, path: str) -> Layout:
    """Return the layout of a block as it is stated, or as its convolutions say."""
    ranks = {rank_of(convolution) for convolution in convolutions_in(block)}
    lacking = [
        name for name, is_known in (("rank", spec.rank is not None or len(ranks) == 1), ("channel_axis", spec.channel_axis or ranks)) if not is_known
    ]
    if lacking:
        found = f"convolutions of rank {', '.join(map(str, sorted(ranks)))}" if ranks else "no convolution in it"
        facts = {"block": f"{path} ({type(block).__name__})", "found": found, "unknown": ", ".join(lacking)}
        stated = " and ".join(f"`{name}`" for name in lacking)
        raise HostError("cannot tell how the features of a block lie", facts, f"state {stated}, or attach with `example=`")
    rank = next(iter(ranks)) if spec.rank is None else spec.rank
    is_known_kind = isinstance(_resnet_convolution(block), nn.Module)
    return Layout(rank, spec.channel_axis or 1, spec.output, is_stated=spec.channel_axis is not None or is_known_kind)


def _channels(block: nn.Module, path: str, spec: UNet, seen: int | None) -> int:
    """Return C of a block: stated, else read off it.

    Raises:
        HostError: it is not stated and cannot be read, or an example shows another.
    """
    stated = spec.channels
    if isinstance(stated, Mapping):
        found = {value for pattern, value in stated.items() if fits(path, pattern)}
        value: Any = next(iter(found)) if len(found) == 1 else None
    else:
        value = stated(block) if callable(stated) else stated
    if stated is not None and not is_count(value):
        facts = {"block": path, "found": f"{value!r} of {stated!r}", "expected": "a whole number >= 1"}
        raise HostError("cannot tell the channels of a block: what is stated is none", facts, "correct `channels`")
    if stated is None:
        return output_channels(block, path) if seen is None else seen
    if seen is not None and seen != value:
        facts = {"block": path, "stated": str(value), "example": str(seen)}
        raise HostError("cannot modulate a block: the example has other channels than are stated", facts, "correct `channels` or `channel_axis`")
    return int(value)


def output_channels(block: nn.Module, path: str = "") -> int:
    """Return C of the output of a block that shows it: of `block2.proj` in a ResnetBlock of the MedSegDiff kind, or of its only convolution.

    Raises:
        HostError: it has none of them: which of several convolutions gives the output is not guessed.
    """
    known = _resnet_convolution(block)
    convolutions = [known] if known is not None else convolutions_in(block)
    if len(convolutions) == 1:
        return cast(int, convolutions[0].out_channels)
    raise HostError(
        f"cannot tell the channels of a {type(block).__name__}",
        {**({"block": path} if path else {}), "found": f"{len(convolutions)} convolutions in it", "expected": "one, or channels that are stated"},
        "state `channels` in the host adapter's `UNet` or in `attach(...)`, or attach with `example=`",
    )


def _resnet_convolution(block: nn.Module) -> nn.Module | None:
    found = getattr(getattr(block, "block2", None), "proj", None)
    return found if isinstance(found, nn.Module) and found in convolutions_in(block) else None
