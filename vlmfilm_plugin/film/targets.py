"""Match decoder blocks by module path. Works on names alone: no torch, no host."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

from vlmfilm_plugin.errors import TargetMatchError


@dataclass(frozen=True)
class Target:
    """A matched block: `index` is its decoder stage, 0 next to the bottleneck; `path` its module path in the UNet."""

    index: int
    path: str


def match_targets(names: Iterable[str], pattern: str, *, owner: str, origin: str = "host adapter") -> list[Target]:
    """Match module paths against a pattern whose `*` stands for one path component, such as `ups.*.1`.

    Matches are numbered in the order of the numbers in their paths, so that `ups.10.1` follows `ups.9.1`.

    Raises:
        TargetMatchError: nothing matched; the message shows the closest module paths.
    """
    known = [name for name in names if name]
    parts = pattern.split(".")
    found = [name for name in known if _fits(name.split("."), parts)]
    if not found:
        closest = get_close_matches(pattern, known, n=2, cutoff=0.3)
        raise TargetMatchError(
            f"no module of {owner} matched the FiLM targets",
            {
                "targets": f"{pattern!r}   (from {origin})",
                "searched": f"{len(known)} modules, matched 0",
                **({"closest": ", ".join(map(repr, closest))} if closest else {}),
            },
            "correct `targets`: module paths as in `model.named_modules()`, with `*` for one component",
        )
    return [Target(index, path) for index, path in enumerate(sorted(found, key=_natural))]


def select_stages(targets: Sequence[Target], stages: Sequence[int] | None, *, owner: str, origin: str = "default") -> list[Target]:
    """Return the targets of the selected decoder stages in ascending order; None selects all.

    Raises:
        TargetMatchError: a stage does not exist.
    """
    if stages is None:
        return list(targets)
    by_index = {target.index: target for target in targets}
    wrong = sorted(set(stages) - set(by_index))
    if wrong:
        raise TargetMatchError(
            f"cannot select decoder stages of {owner}: no such stage",
            {
                "found": f"{sorted(set(stages))}   (from {origin})",
                "unknown": wrong,
                "expected": f"stages 0 (next to the bottleneck) to {len(targets) - 1} (full resolution)",
            },
            "correct `decoder_stages`, or take it out to use every stage",
        )
    return [by_index[index] for index in sorted(set(stages))]


def _fits(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    return len(parts) == len(pattern) and all(fnmatchcase(part, wanted) for part, wanted in zip(parts, pattern, strict=True))


def _natural(path: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in path.split(".")]
