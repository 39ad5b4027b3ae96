"""The kinds of value a setting can have: how each is written in YAML, in Python and in the environment."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class EnvText(str):
    """Text from the environment: every kind is spelt as text there."""


_KINDS = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a finite number",
    "str": "text",
    "path": "a path",
    "stages": "a list of whole numbers >= 0",
    "texts": "a list of texts (in the environment a JSON list)",
}


def describe(rules: Mapping[str, Any]) -> str:
    """Return what a setting with these rules may be, in words."""
    text = "one of " + ", ".join(rules["choices"]) if rules["choices"] else _KINDS[rules["kind"]]
    if rules["low"] is not None:
        text += f" >= {rules['low']:g}"
    return text + (", or null" if rules["optional"] else "")


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


PARSERS = {
    "bool": _parse_bool,
    "int": _parse_int,
    "float": _parse_float,
    "str": _parse_str,
    "path": _parse_path,
    "stages": _parse_stages,
    "texts": _parse_texts,
}
