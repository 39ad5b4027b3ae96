"""The decoder among the blocks of a net: the last run of sizes that do not fall, and in it the blocks whose paths are of one pattern."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

from vlmfilm_plugin.inspection.blocks import ONE, Block, blocks_in
from vlmfilm_plugin.inspection.calls import Call


@dataclass
class Decoder:
    """A decoder that was found.

    Attributes:
        pattern: of its blocks' paths, `*` for numbers, or the class that they have in common.
        blocks: in order of execution.
        others: patterns of further decoders in the same net, with their sizes.
        uncovered: sizes of the run, above that of the bottleneck, at which no block is.
        after: blocks that run behind the last one.
        is_nested: blocks of the same pattern build other decoders before this one.
    """

    root: Call
    pattern: str
    blocks: list[Block]
    others: list[tuple[str, list[Block]]] = field(default_factory=list)
    uncovered: list[tuple[int, ...]] = field(default_factory=list)
    after: list[Block] = field(default_factory=list)
    is_nested: bool = False

    @property
    def twice(self) -> list[str]:
        """Return the blocks that ran more than once."""
        paths = [block.path for block in self.blocks]
        return list(dict.fromkeys(path for path in paths if paths.count(path) > 1))

    @property
    def stages(self) -> list[list[Block]]:
        """Return the blocks of each resolution, in order of execution."""
        return [list(group) for _, group in groupby(self.blocks, key=lambda block: block.size)]


def find_decoder(root: Call) -> Decoder | None:
    """Return the decoder of what ran below a call, or None."""
    blocks = [block for block in blocks_in(root) if block.size]
    runs = _runs(blocks)
    for place in reversed(range(len(runs))):
        first, run = runs[place]
        kept = _without_bottleneck(run, blocks[first - 1] if first else None)
        groups = _groups(kept)
        if not groups:
            continue
        pattern, chosen = groups[0]
        decoder = Decoder(root, pattern, chosen)
        known = {id(block) for block in chosen}
        decoder.others = [(name, group) for name, group in groups[1:] if group[0].kind > ONE and not known & set(map(id, group))]
        earlier = [_groups(_without_bottleneck(each, blocks[start - 1] if start else None)) for start, each in runs[:place]]
        decoder.is_nested = any(masked(block.path) == pattern for found in earlier for _, group in found[:1] for block in group)
        decoder.others += [found[0] for found in earlier if found and found[0][0] != pattern and found[0][1][0].kind > ONE]
        sizes = {block.size for block in chosen}
        decoder.uncovered = list(dict.fromkeys(block.size for block in kept if block.size not in sizes and block.size != run[0].size))
        decoder.after = [block for block in blocks[blocks.index(chosen[-1]) + 1 :] if block.kind > ONE or block.area < chosen[-1].area]
        return decoder
    return None


def unet_around(decoder: Decoder) -> Call:
    """Return the innermost call of a class that is not torch's own, with the whole decoder and with what leads down to its bottleneck."""
    outer = [list(block.call.above())[::-1] for block in decoder.blocks]
    common: list[Call] = [level[0] for level in zip(*outer, strict=False) if all(call is level[0] for call in level)]
    for call in reversed(common):
        earlier = [block for block in blocks_in(call) if block.call.end < decoder.blocks[0].call.start]
        is_foreign = type(call.module).__module__.split(".")[0] == "torch"
        # A net may hand its blocks to a helper that calls them, and that it holds beside them.
        has_them = not call.path or all(block.path.startswith(f"{call.path}.") for block in decoder.blocks)
        if has_them and not is_foreign and any(block.area > decoder.blocks[0].area for block in earlier):
            return call
    return decoder.root


def masked(path: str) -> str:
    """Return a path with `*` for its numbers."""
    return re.sub(r"\d+", "*", path)


def _runs(blocks: Sequence[Block]) -> list[tuple[int, list[Block]]]:
    """Return the runs in which sizes do not fall, each with the place of its first block."""
    runs: list[tuple[int, list[Block]]] = []
    for place, block in enumerate(blocks):
        if not place or block.area < blocks[place - 1].area or len(block.size) != len(blocks[place - 1].size):
            runs.append((place, []))
        runs[-1][1].append(block)
    return runs


def _without_bottleneck(run: Sequence[Block], before: Block | None) -> list[Block]:
    """Return a run less the blocks of its smallest size that no skip connection feeds: those are the way down, and the bottleneck."""
    kept, last = [], before
    for block in run:
        is_fed = last is not None and last.size == block.size and block.channels_in > last.channels
        if block.size != run[0].size or is_fed:
            kept.append(block)
        last = block
    return kept


def _groups(run: Sequence[Block]) -> list[tuple[str, list[Block]]]:
    """Return the blocks of one pattern, or else of one class, that have at least two resolutions; the best first."""
    found: dict[tuple[bool, str, int], list[Block]] = {}
    for block in run:
        found.setdefault((True, masked(block.path), block.kind), []).append(block)
        cls = type(block.call.module)
        if cls.__module__.split(".")[0] != "torch":
            found.setdefault((False, cls.__name__, block.kind), []).append(block)
    for (is_pattern, name, kind), group in found.items():
        sizes = {block.size for block in group}
        # One level with one convolution less, under the same name.
        if is_pattern and kind > ONE:
            group += [block for block in run if block.kind == ONE and masked(block.path) == name and block.size not in sizes]
            group.sort(key=lambda block: block.call.end)
    # Of one channel inside a net is a map of attention.
    wide = {key: group for key, group in found.items() if all(block.channels > 1 for block in group[:-1])}
    several = [(key, group) for key, group in wide.items() if len({block.size for block in group}) > 1]
    several.sort(key=lambda each: (-each[0][2], -len({block.size for block in each[1]}), not each[0][0], -len(each[1])))
    return [(name, group) for (_, name, _), group in several]
