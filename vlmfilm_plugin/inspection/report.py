"""What was seen of a UNet: the public result, as a table and as JSON. No torch is needed to read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class SeenStage:
    """One decoder stage: the blocks of one resolution.

    Attributes:
        index: 0 is next to the bottleneck.
        paths: of the blocks within the UNet, in order of execution.
        channels: of each block's output.
        size: spatial size of the output.
    """

    index: int
    paths: tuple[str, ...]
    channels: tuple[int, ...]
    size: tuple[int, ...]

    def as_json(self) -> dict[str, Any]:
        """Return plain data; `channels` is a number where all blocks have as many."""
        channels = self.channels[0] if len(set(self.channels)) == 1 else list(self.channels)
        return {"index": self.index, "paths": list(self.paths), "channels": channels, "size": list(self.size)}


@dataclass(frozen=True, kw_only=True)
class SeenUNet:
    """A UNet as one forward showed it.

    Attributes:
        cls: its class, `module:Class`.
        path: where it is in the module that was called; empty for that module itself.
        pattern: of the blocks' paths, `*` for numbers; or the class that they have in common.
        stages: bottleneck first.
        rank: the number of spatial dimensions.
        output: which element of a block's output holds the features; None: the output is a tensor.
        others: further decoders of it, each a pattern with its blocks; FiLM may act there by a host adapter's statement.
        after: blocks that run behind the decoder.
        uncovered: sizes on the way up at which none of these blocks is.
        warnings: what to look at before this becomes a host adapter.
        refusal: why no host adapter can be made of it; empty where one can.
    """

    cls: str
    path: str
    pattern: str
    stages: tuple[SeenStage, ...]
    rank: int
    output: int | str | None = None
    others: Mapping[str, tuple[str, ...]]
    after: tuple[str, ...] = ()
    uncovered: tuple[tuple[int, ...], ...] = ()
    warnings: tuple[str, ...] = ()
    refusal: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "class": self.cls,
            "path": self.path,
            "pattern": self.pattern,
            "rank": self.rank,
            "output": self.output,
            "stages": [stage.as_json() for stage in self.stages],
            "others": {pattern: list(paths) for pattern, paths in self.others.items()},
            "after": list(self.after),
            "uncovered": [list(size) for size in self.uncovered],
            "warnings": list(self.warnings),
            "refusal": self.refusal,
        }

    def table(self) -> str:
        """Return the decoder as a table, a line a stage."""
        blocks = sum(len(stage.paths) for stage in self.stages)
        where = f" at {self.path!r}" if self.path else ""
        head = f"UNet {self.cls}{where}: {self.rank}-D, {len(self.stages)} stages, {blocks} blocks of {self.pattern}"
        rows = [("stage", "size", "channels", "blocks")]
        for stage in self.stages:
            channels = stage.as_json()["channels"]
            shown = str(channels) if isinstance(channels, int) else ", ".join(map(str, channels))
            rows.append((str(stage.index), size_text(stage.size), shown, ", ".join(stage.paths)))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in rows]
        notes = [f"warning: {warning}" for warning in self.warnings] + ([f"no host adapter: {self.refusal}"] if self.refusal else [])
        return "\n".join([head, *lines, *notes])


@dataclass(frozen=True)
class Inspection:
    """What one forward showed.

    Attributes:
        unets: one for each UNet; a decoder inside another UNet is among its `others`.
    """

    unets: tuple[SeenUNet, ...]

    def as_json(self) -> dict[str, Any]:
        """Return plain data: `{"unets": [{"class": ..., "stages": [...], "warnings": [...], ...}]}`."""
        return {"unets": [unet.as_json() for unet in self.unets]}

    def __str__(self) -> str:
        return "\n\n".join(unet.table() for unet in self.unets)


def unets_from(content: Mapping[str, Any]) -> Inspection:
    """Return an inspection from its `as_json()`."""
    return Inspection(tuple(_unet_from(each) for each in content["unets"]))


def _unet_from(each: Mapping[str, Any]) -> SeenUNet:
    stages = []
    for stage in each["stages"]:
        channels = stage["channels"]
        count = len(stage["paths"])
        stages.append(
            SeenStage(
                index=stage["index"],
                paths=tuple(stage["paths"]),
                channels=(channels,) * count if isinstance(channels, int) else tuple(channels),
                size=tuple(stage["size"]),
            )
        )
    return SeenUNet(
        cls=each["class"],
        path=each["path"],
        pattern=each["pattern"],
        stages=tuple(stages),
        rank=each["rank"],
        output=each["output"],
        others={pattern: tuple(paths) for pattern, paths in each["others"].items()},
        after=tuple(each["after"]),
        uncovered=tuple(tuple(size) for size in each["uncovered"]),
        warnings=tuple(each["warnings"]),
        refusal=each["refusal"],
    )


def size_text(size: Sequence[int]) -> str:
    """Return a spatial size as people write it: 64x64."""
    return "x".join(map(str, size))
