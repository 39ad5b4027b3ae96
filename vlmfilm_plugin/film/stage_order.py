"""Which decoder stage each block is of, and in which order blocks run. Works on names alone.

A stage is a resolution; stage 0 is next to the bottleneck. At attach nothing has run: groups and order are stated, or read off an example, or
the paths count them plainly. Names decide nothing else: `upcat_4` to `upcat_1` may run either way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from vlmfilm_plugin.errors import TargetMatchError, some_of
from vlmfilm_plugin.film.targets import is_inside, is_number, match_targets, natural, texts_of

Groups = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Target:
    """A block: `index` is its decoder stage, `block` its place in it in order of execution, None in a stage of one; `path` its module path."""

    index: int
    path: str
    block: int | None = None


def stated_groups(stages: object, unet: Any, *, owner: str, origin: str) -> list[tuple[str, ...]]:
    """Return the patterns of each stage as `UNet.stages` states them.

    Raises:
        TargetMatchError: that is no sequence of groups.
    """
    found = stages(unet) if callable(stages) else stages
    if isinstance(found, str) or not isinstance(found, Iterable) or isinstance(found, dict) or not (groups := list(found)):
        facts = {"found": f"{found!r}   (from {origin})", "expected": "a list with a pattern, or several, for each stage, bottleneck first"}
        raise TargetMatchError(f"cannot use the stages of {owner}", facts, "correct `stages`")
    return [texts_of(group, unet, what="stages", owner=owner, origin=origin) for group in groups]


def grouped(paths: Sequence[str], groups: Groups, names: Sequence[str], *, owner: str, origin: str) -> list[list[str]]:
    """Return the blocks of each stated stage, in order of execution.

    Args:
        paths: those of the blocks.
        groups: the patterns of each stage.
        names: all module paths.

    Raises:
        TargetMatchError: a block is of no stage or of two, a stage has no block, or the order within one cannot be told.
    """
    found: list[list[str]] = []
    for number, patterns in enumerate(groups):
        stage: list[str] = []
        for pattern in patterns:
            matched = [path for path in paths if is_inside(path, pattern)]
            if not matched:
                match_targets(names, pattern, owner=owner, what="stages", origin=origin)
                facts = {f"stage {number}": f"{pattern!r}   (from {origin})", "targets": some_of(paths, 6)}
                raise TargetMatchError(f"a stated stage of {owner} holds no FiLM target", facts, "correct `stages`, or `targets`")
            stage.extend(_in_order([path for path in matched if path not in stage], f"stage {number}", owner, origin))
        found.append(stage)
    stage_of: dict[str, int] = {}
    for number, stage in enumerate(found):
        for path in stage:
            if path in stage_of:
                facts = {"block": path, "found": f"stages {stage_of[path]} and {number}   (from {origin})", "expected": "one stage"}
                raise TargetMatchError(f"a FiLM target of {owner} is of two stages", facts, "correct `stages`")
            stage_of[path] = number
    rest = [path for path in paths if path not in stage_of]
    if rest:
        facts = {"without a stage": some_of(rest, 6), "stages": f"{_written(groups)}   (from {origin})"}
        raise TargetMatchError(f"FiLM targets of {owner} are of no stated stage", facts, "add them to `stages`, or narrow `targets`")
    return found


def plainly_numbered(paths: Sequence[str], names: Sequence[str] = (), *, owner: str, origin: str) -> list[list[str]]:
    """Return the blocks as stages of one block each, in the order that their paths count.

    Raises:
        TargetMatchError: the paths do not differ in one component alone that counts 0, 1, 2, ...; or they lie in one of several numbered
            modules, and count what is in it: `ups.0.*` beside `ups.1.0`.
    """
    place = _varying(paths)
    ordered = sorted(paths, key=natural)
    if len(paths) > 1 and (place is None or [path.split(".")[place] for path in ordered] != [str(number) for number in range(len(paths))]):
        raise TargetMatchError(
            f"cannot tell the order of the decoder blocks of {owner} from their names",
            {
                "targets": f"{some_of(paths, 6)}   (from {origin})",
                "expected": "paths that differ in one component, which counts 0, 1, 2, ... from the bottleneck",
            },
            "state `stages` (bottleneck first, one group a resolution, in order of execution), or attach with `example=`",
        )
    siblings = _siblings(paths, place, names)
    if siblings:
        raise TargetMatchError(
            f"the FiLM targets of {owner} are blocks of one resolution only, by their names",
            {"targets": f"{some_of(paths, 6)}   (from {origin})", "beside them": some_of(siblings, 6)},
            "widen `targets` to the whole decoder, or state `stages`",
        )
    return [[path] for path in ordered]


def by_size(sizes: Iterable[tuple[str, tuple[int, ...]]]) -> list[tuple[tuple[int, ...], list[str]]]:
    """Return blocks, each with its spatial size, in order of execution, in runs of one size."""
    return [(size, [path for path, _ in run]) for size, run in groupby(sizes, key=lambda each: each[1])]


def sizes_text(groups: Sequence[tuple[tuple[int, ...], list[str]]]) -> str:
    """Return such runs as a text: `16x16: ups.0.1; 32x32: ups.1.1`."""
    return "; ".join(f"{'x'.join(map(str, size))}: {', '.join(paths)}" for size, paths in groups)


def numbered(groups: Groups, blocks: str) -> list[Target]:
    """Return the blocks that may carry FiLM: all of each stage, or its last."""
    kept = [list(group[-1:] if blocks == "last" else group) for group in groups]
    return [
        Target(index, path, block if len(group) > 1 else None)  #
        for index, group in enumerate(kept)
        for block, path in enumerate(group)
    ]


def select_stages(targets: Sequence[Target], stages: Sequence[int] | None, *, owner: str, origin: str = "default") -> list[Target]:
    """Return the targets of the selected decoder stages in ascending order; None selects all.

    Raises:
        TargetMatchError: a stage does not exist.
    """
    if stages is None:
        return list(targets)
    known = {target.index for target in targets}
    wrong = sorted(set(stages) - known)
    if wrong:
        raise TargetMatchError(
            f"cannot select decoder stages of {owner}: no such stage",
            {
                "found": f"{sorted(set(stages))}   (from {origin})",
                "unknown": wrong,
                "expected": f"stages 0 (next to the bottleneck) to {max(known)} (full resolution)",
            },
            "correct `decoder_stages`, or take it out to use every stage",
        )
    return [target for target in targets if target.index in set(stages)]


def _in_order(paths: Sequence[str], what: str, owner: str, origin: str) -> list[str]:
    """Return the blocks that one pattern matched within a stage in order of execution."""
    place = _varying(paths)
    if len(paths) > 1 and (place is None or not all(is_number(path.split(".")[place]) for path in paths)):
        facts = {what: f"{some_of(paths, 6)}   (from {origin})", "expected": "paths that differ in one component, which is a number"}
        raise TargetMatchError(
            f"cannot tell the order of blocks in a stage of {owner} from their names", facts, "list them in `stages` in order of execution"
        )
    return sorted(paths, key=natural)


def _varying(paths: Sequence[str]) -> int | None:
    """Return the place of the one component in which paths differ; None where there is none, or more."""
    parts = [path.split(".") for path in paths]
    if len({len(each) for each in parts}) != 1:
        return None
    places = [place for place in range(len(parts[0])) if len({each[place] for each in parts}) > 1]
    return places[0] if len(places) == 1 else None


def _siblings(paths: Sequence[str], place: int | None, names: Sequence[str]) -> list[str]:
    """Return the modules like the first one in the numbered modules beside the one that they all lie in."""
    first = paths[0].split(".")
    outer = [spot for spot in range(place or 0) if is_number(first[spot])]
    same = [name.split(".") for name in names if name != paths[0]]
    return [
        ".".join(other)
        for spot in outer
        for other in same
        if len(other) == len(first)
        and is_number(other[spot])
        and other[spot] != first[spot]
        and other[:spot] + other[spot + 1 :] == first[:spot] + first[spot + 1 :]
    ]


def _written(groups: Groups) -> str:
    return "[" + ", ".join("[" + ", ".join(group) + "]" for group in groups) + "]"
