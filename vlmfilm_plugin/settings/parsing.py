"""The kinds of value a setting can have: how each is written in YAML, in Python and in the environment."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any


class EnvText(str):
    """Text from the environment: every kind is spelt as text there."""


class BadEntries(ValueError):
    """A value made of named entries, of which some are wrong: entry -> what was found and what was expected."""

    def __init__(self, entries: Mapping[str, str]) -> None:
        super().__init__("; ".join(f"{name}: {text}" for name, text in entries.items()))
        self.entries = dict(entries)


def setting(
    default: object, kind: str, *, choices: tuple[str, ...] = (), low: float | None = None, high: float | None = None, optional: bool = False
) -> Any:
    """Declare a field of a record of settings: its default, its kind, and what it may be."""
    return field(default=default, metadata={"kind": kind, "choices": choices, "low": low, "high": high, "optional": optional})


_KINDS = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a finite number",
    "str": "text",
    "path": "a path",
    "stages": "a list of whole numbers >= 0",
    "texts": "a list of texts (in the environment a JSON list)",
    "targets": "a module path pattern, or a list of them (in the environment a JSON list)",
    "stages_or_all": "same_as_film, or a list of whole numbers >= 0",
    "junctions": "a mapping of its entries (in the environment a JSON object)",
    "transform": "none, or one or several of center, standardize and l2norm in order, with at most one of the first two",
}

TRANSFORM_STEPS = ("center", "standardize", "l2norm")
WITH_STATISTICS = ("center", "standardize")
"""Steps of `feature_transform` that need statistics of training images."""
CONTROLS = ("constant", "random", "zero")
"""What may take the place of features, for runs that are trained without the condition."""


def describe(rules: Mapping[str, Any]) -> str:
    """Return what a setting with these rules may be, in words."""
    text = "one of " + ", ".join(rules["choices"]) if rules["choices"] else _KINDS[rules["kind"]]
    if rules["low"] is not None:
        text += f" >= {rules['low']:g}"
    if rules["high"] is not None:
        text += f" and <= {rules['high']:g}"
    return text + (", or null" if rules["optional"] else "")


def check(rules: Mapping[str, Any], raw: object, is_text: bool) -> object:
    """Return the value of a field with these rules, as it was written in `raw`.

    Raises:
        TypeError, ValueError, OverflowError: it is none.
    """
    if raw is None or (is_text and str(raw).strip().lower() in {"none", "null", "~"}):
        if rules["optional"]:
            return None
        if rules["kind"] == "transform":
            return ()
        raise ValueError(raw)
    value = PARSERS[rules["kind"]](raw, is_text)
    is_outside = (rules["low"] is not None and value < rules["low"]) or (rules["high"] is not None and value > rules["high"])
    if is_outside or (rules["choices"] and value not in rules["choices"]):
        raise ValueError(raw)
    return value


def _parse_bool(raw: object, is_text: bool) -> bool:
    if isinstance(raw, bool):
        return raw
    word = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if is_text and str(raw).strip().lower() in word:
        return word[str(raw).strip().lower()]
    raise ValueError(raw)


def _parse_int(raw: object, is_text: bool) -> int:
    if is_text:
        return int(str(raw))
    if isinstance(raw, bool) or not isinstance(raw, int):
        raise TypeError(raw)
    return raw


def _parse_float(raw: object, is_text: bool) -> float:
    # YAML 1.1 reads `1e-3` as text, so text is fine here; true and false are not numbers.
    if isinstance(raw, bool) or not isinstance(raw, int | float | str):
        raise TypeError(raw)
    value = float(raw)
    if value != value or value in (float("inf"), float("-inf")):
        raise ValueError(raw)
    return value


def _parse_str(raw: object, is_text: bool) -> str:
    if not isinstance(raw, str) or not raw.strip():
        raise TypeError(raw)
    return str(raw)


def _parse_path(raw: object, is_text: bool) -> str:
    return _parse_str(str(raw) if isinstance(raw, Path) else raw, is_text)


def _parse_stages(raw: object, is_text: bool) -> tuple[int, ...]:
    items: object = raw
    if is_text:
        items = [int(part) for part in str(raw).strip().strip("[]()").split(",") if part.strip()]
    if isinstance(items, int) and not isinstance(items, bool):
        items = [items]
    if not isinstance(items, list | tuple) or not items or not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in items):
        raise ValueError(raw)
    return tuple(sorted(set(items)))


def _parse_texts(raw: object, is_text: bool) -> tuple[str, ...]:
    items = json.loads(str(raw)) if is_text else raw
    if not isinstance(items, list | tuple) or not items:
        raise TypeError(raw)
    return tuple(_parse_str(item, is_text) for item in items)


def _parse_targets(raw: object, is_text: bool) -> str | tuple[str, ...] | Callable[[Any], Any]:
    if callable(raw):
        return raw
    is_list = str(raw).lstrip().startswith("[") if is_text else not isinstance(raw, str)
    return _parse_texts(raw, is_text) if is_list else _parse_str(raw, is_text)


def _parse_transform(raw: object, is_text: bool) -> tuple[str, ...]:
    items: object = raw
    if isinstance(raw, str):
        items = [] if raw.strip().lower() == "none" else [part.strip().strip("\"'") for part in raw.strip().strip("[]()").split(",") if part.strip()]
        if not items and raw.strip().lower() not in {"none", "[]", "()"}:
            raise ValueError(raw)
    if not isinstance(items, list | tuple) or not are_steps(items):
        raise ValueError(raw)
    return tuple(items)


def are_steps(items: Sequence[object]) -> bool:
    """Tell whether these are the steps of a transform of features."""
    return all(item in TRANSFORM_STEPS for item in items) and sum(item in WITH_STATISTICS for item in items) <= 1


def _parse_stages_or_all(raw: object, is_text: bool) -> tuple[int, ...] | None:
    return None if raw in ("same_as_film", None) else _parse_stages(raw, is_text)


PARSERS: dict[str, Callable[[Any, bool], Any]] = {
    "bool": _parse_bool,
    "int": _parse_int,
    "float": _parse_float,
    "str": _parse_str,
    "path": _parse_path,
    "stages": _parse_stages,
    "texts": _parse_texts,
    "targets": _parse_targets,
    "stages_or_all": _parse_stages_or_all,
    "transform": _parse_transform,
}
