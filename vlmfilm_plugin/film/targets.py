"""Match decoder blocks by module path. Works on names alone: no torch, no host; `stage_order` says which stage each is of."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from vlmfilm_plugin.errors import TargetMatchError

REGEX = "re:"


def texts_of(given: object, unet: Any, *, what: str, owner: str, origin: str) -> tuple[str, ...]:
    """Return the patterns that were given as one, as several, or as a function of the UNet.

    Raises:
        TargetMatchError: it is something else, there are none, or a regular expression is none.
    """
    found = given(unet) if callable(given) else given
    patterns = (found,) if isinstance(found, str) else found
    is_list = isinstance(patterns, Iterable) and not isinstance(patterns, dict)
    listed = tuple(patterns) if is_list else ()  # type: ignore[arg-type]
    if not listed or not all(isinstance(pattern, str) and pattern for pattern in listed):
        by = f" returned by {given!r}" if callable(given) else ""
        facts = {
            "found": f"{found!r}{by}   (from {origin})",
            "expected": "a module path pattern, several, or a function of the UNet that returns paths",
        }
        raise TargetMatchError(f"cannot use the {what} of {owner}", facts, f"correct `{what}`")
    for pattern in listed:
        try:
            _matcher(pattern)
        except re.error as error:
            facts = {"found": f"{pattern!r}   (from {origin})", "error": str(error)}
            raise TargetMatchError(f"cannot use the {what} of {owner}: no regular expression", facts, f"correct `{what}`") from error
    return listed


def fits(path: str, pattern: str) -> bool:
    """Tell whether a module path is of a pattern: `*` for one component or a part of one, `**` for any number, `re:` for a regular expression."""
    return _matcher(pattern)(path)


def match_targets(
    names: Iterable[str], patterns: str | Sequence[str], *, owner: str, what: str = "targets", origin: str = "host adapter"
) -> list[str]:
    """Return the module paths that are of one of the patterns, in the order of the names.

    Raises:
        TargetMatchError: a pattern matched nothing; the message shows the closest module paths. Or a block was matched and one inside it.
    """
    known = [name for name in names if name]
    found: set[str] = set()
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        matched = [name for name in known if fits(name, pattern)]
        if not matched:
            raise _nothing(known, pattern, what, owner, origin)
        found.update(matched)
    ordered = [name for name in dict.fromkeys(known) if name in found]
    inner = [(outer, path) for path in ordered for outer in _around(path) if outer in found]
    if inner and what == "targets":
        facts = {"targets": f"{_shown(patterns)}   (from {origin})", **{f"around {path}": outer for outer, path in inner[:3]}}
        raise TargetMatchError(f"the FiLM targets of {owner} lie inside one another: FiLM would act twice", facts, "narrow `targets` to one of them")
    return ordered


def is_inside(path: str, pattern: str) -> bool:
    """Tell whether a pattern matches a module path, or that of a module around it."""
    return any(fits(outer, pattern) for outer in (path, *_around(path)))


def natural(path: str) -> list[tuple[int, int, str]]:
    """Return a key that orders paths by the numbers in them: `ups.10` follows `ups.9`."""
    return [(0, int(part), "") if is_number(part) else (1, 0, part) for part in path.split(".")]


def is_number(part: str) -> bool:
    """Tell whether a component is a place in a list of modules: 0, 1, 2, ...; `-1`, `01` and digits of other scripts are names."""
    return part.isascii() and part.isdecimal() and str(int(part)) == part


def _around(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


def _nothing(known: Sequence[str], pattern: str, what: str, owner: str, origin: str) -> TargetMatchError:
    closest = get_close_matches(pattern.removeprefix(REGEX), known, n=2, cutoff=0.3)
    return TargetMatchError(
        f"no module of {owner} matched the FiLM {what}",
        {
            what: f"{pattern!r}   (from {origin})",
            "searched": f"{len(known)} modules, matched 0",
            **({"closest": ", ".join(map(repr, closest))} if closest else {}),
        },
        f"correct `{what}`: module paths as in `model.named_modules()`, with `*` for one component, `**` for any number, or `re:` and an expression",
    )


def _shown(patterns: str | Sequence[str]) -> str:
    return ", ".join(map(repr, (patterns,) if isinstance(patterns, str) else patterns))


@functools.lru_cache(maxsize=512)
def _matcher(pattern: str) -> Callable[[str], bool]:
    if pattern.startswith(REGEX):
        expression = re.compile(pattern[len(REGEX) :])
        return lambda path: expression.fullmatch(path) is not None
    parts = tuple(pattern.split("."))
    return lambda path: _fits(tuple(path.split(".")), parts)


def _fits(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_fits(parts[skipped:], pattern[1:]) for skipped in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])
