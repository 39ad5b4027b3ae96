"""The one reader of YAML: a configuration, a file of settings, a questionnaire. Bounded, whatever the file holds.

YAML can say much in a few bytes: aliases of aliases expand without end, deep nesting overflows the stack, and of a key that stands twice
only the last counts. What is read here is limited in bytes, depth and expanded size, and holds every key once.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmfilm_plugin.errors import SettingsError

if TYPE_CHECKING:
    from yaml import Node

MOST_BYTES = 4 << 20
MOST_DEPTH = 64
MOST_VALUES = 200_000


class BadYaml(ValueError):
    """A text that is no YAML, or too much of it: where, what was found there, and what was expected."""

    def __init__(self, place: str, found: str, expected: str = "YAML in UTF-8") -> None:
        super().__init__(f"{place}: {found}, expected {expected}")
        self.place, self.found, self.expected = place, found, expected


def read_mapping(path: Path, what: str, fix: str) -> Mapping[str, Any]:
    """Read a file that holds a mapping; an empty one is an empty mapping.

    Args:
        what: the file's role, for messages: `the file of VLM_FILM_CONFIG`.
        fix: what to do where it holds something else.

    Raises:
        SettingsError: it cannot be read, or holds something else.
    """
    try:
        content = load(path)
    except OSError as error:
        facts = {"file": path, "error": " ".join(str(error).split())}
        raise SettingsError(f"cannot read {what}", facts, "give the path of a YAML file") from error
    except BadYaml as error:
        facts = {"file": path, "at": error.place, "found": error.found, "expected": error.expected}
        raise SettingsError(f"cannot read {what}", facts, f"correct {error.place}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        facts = {"file": path, "found": type(content).__name__, "expected": "a mapping"}
        raise SettingsError(f"cannot use {what}", facts, fix)
    return content


def load(path: Path) -> object:
    """Return what a YAML file holds.

    Raises:
        OSError: it cannot be read. BadYaml: it is no YAML, or more than the limits of this module.
    """
    # A device has no end, and opening a pipe waits for its other side.
    if not stat.S_ISREG(path.stat().st_mode):
        raise BadYaml("the file", "a folder, a device or a pipe", "a regular file")
    with open(path, "rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise BadYaml("the file", f"more than {MOST_BYTES >> 20} MiB", f"at most {MOST_BYTES >> 20} MiB")
    try:
        return loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadYaml("the file", f"byte {error.start} is no UTF-8") from error


def loads(text: str) -> object:
    """Return what a YAML text holds.

    Raises:
        BadYaml: as `load`.
    """
    import yaml

    try:
        _check_depth(text)
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_nodes(node)
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        place = f"line {error.problem_mark.line + 1}" if error.problem_mark is not None else "the file"
        raise BadYaml(place, " ".join(str(error.problem or error.context or error).split())) from error
    except BadYaml:
        raise
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        # An impossible date or number, or a tag such as `!!bool` on what is none: YAML's own constructors raise anything for these.
        raise BadYaml("the file", " ".join(str(error).split())[:200]) from error


def _check_depth(text: str) -> None:
    """Look at the events alone, which are made without recursion: composing a deep document is what overflows the stack."""
    import yaml

    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MOST_DEPTH:
                raise BadYaml(f"line {_line(event)}", f"more than {MOST_DEPTH} levels", f"at most {MOST_DEPTH} levels")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _line(part: Any) -> int:
    return int(part.start_mark.line) + 1


def _check_nodes(root: Node) -> None:
    """Refuse keys that stand twice, aliases of themselves, and documents that aliases expand beyond the limit."""
    sizes: dict[int, int | None] = {}

    def size(node: Node) -> int:
        known = sizes.get(id(node), 0)
        if known is None:
            raise BadYaml(f"line {_line(node)}", "an alias of what it stands in", "a value without itself")
        if known:
            return known
        sizes[id(node)] = None
        total = 1 + sum(map(size, _children(node)))
        if total > MOST_VALUES:
            raise BadYaml(f"line {_line(node)}", f"more than {MOST_VALUES} values, aliases expanded", f"at most {MOST_VALUES}")
        sizes[id(node)] = total
        return total

    size(root)


def _children(node: Node) -> list[Node]:
    import yaml

    if isinstance(node, yaml.SequenceNode):
        return list(node.value)
    if not isinstance(node, yaml.MappingNode):
        return []
    seen: set[tuple[str, str]] = set()
    for key, _ in node.value:
        # Scalars of one tag and text are one key; `<<` may be written once a mapping, like any other.
        if isinstance(key, yaml.ScalarNode):
            if (key.tag, key.value) in seen:
                raise BadYaml(f"line {_line(key)}", f"key {key.value!r} twice", "each key once")
            seen.add((key.tag, key.value))
    return [part for pair in node.value for part in pair]
