"""Questionnaires: multiple-choice questions in YAML, read strictly; those that ship stand in `questionnaires/`.

Knows nothing of models: a question is text here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmfilm_plugin.errors import SettingsError
from vlmfilm_plugin.settings.yaml_file import BadYaml, load

if TYPE_CHECKING:
    from vlmfilm_plugin.settings.record import Settings

LETTERS = "ABCDEFGH"
_DEFAULT_INSTRUCTION = "Answer with the letter of one option only."
_NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True)
class Question:
    """One question: its id, its text, and its options, letter -> meaning, from A on."""

    id: str
    text: str
    options: Mapping[str, str]


@dataclass(frozen=True)
class Questionnaire:
    """Questions that are asked about every image, each alone."""

    questions: tuple[Question, ...]
    instruction: str = _DEFAULT_INSTRUCTION

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """Return one name an answer, in the order of a feature: `contrast=A`."""
        return tuple(f"{question.id}={letter}" for question in self.questions for letter in question.options)

    def prompt(self, question: Question) -> str:
        """Return the text that asks one question."""
        return "\n".join([question.text, *(f"{letter}. {meaning}" for letter, meaning in question.options.items()), self.instruction])


def shipped() -> dict[str, Path]:
    """Return name -> file of the questionnaires that come with the package."""
    folder = Path(__file__).parent / "questionnaires"
    return {file.stem: file for file in folder.iterdir() if file.name.endswith(".yaml")}


def read_questionnaire(settings: Settings) -> Questionnaire:
    """Read the questionnaire of the settings: a shipped name, or the path of a YAML file.

    Raises:
        SettingsError: there is none of this name, the file cannot be read, or an entry of it is wrong; the message says which.
    """
    name, known = settings.questionnaire, shipped()
    file = known.get(name) or Path(name)
    origin = f"{name!r}   (from {settings.origin('questionnaire')})"
    if not file.is_file():
        facts = {"found": origin, "expected": f"one of {', '.join(sorted(known))}, or the path of a .yaml file"}
        raise SettingsError("cannot use setting `questionnaire`: there is none of this name", facts, "correct `questionnaire`")
    try:
        return parse(load(file))
    except BadYaml as error:
        facts = {"file": origin, "at": error.place, "found": error.found[:200], "expected": error.expected}
        raise SettingsError("cannot use this questionnaire", facts, f"correct {error.place}") from error
    except OSError as error:
        facts = {"file": origin, "at": "the file", "found": str(error), "expected": "a file that can be read"}
        raise SettingsError("cannot use this questionnaire", facts, "correct the file") from error


def parse(content: object) -> Questionnaire:
    """Turn what a YAML file holds into a questionnaire.

    Raises:
        ValueError: with the place, what was found there and what was expected.
    """
    held = _mapping(content, "the file", {"questions"}, {"questions", "instruction"})
    entries = held["questions"]
    if not isinstance(entries, list) or not entries:
        raise _wrong("questions", entries, "a list of one or more questions")
    questions = tuple(_question(entry, f"question {number}") for number, entry in enumerate(entries, 1))
    ids = [question.id for question in questions]
    twice = next((index for index, name in enumerate(ids) if name in ids[:index]), None)
    if twice is not None:
        raise _wrong(f"question {twice + 1}", f"id {ids[twice]!r} twice", "each id once")
    return Questionnaire(questions, _text(held.get("instruction", _DEFAULT_INSTRUCTION), "instruction"))


def _question(entry: object, place: str) -> Question:
    held = _mapping(entry, place, {"id", "text", "options"}, {"id", "text", "options"})
    name = _text(held["id"], f"{place}, id")
    if not _NAME.fullmatch(name):
        raise _wrong(f"{place}, id", name, "lower-case letters, digits and _, a letter first")
    place = f"{place} ({name})"
    options = held["options"]
    if not isinstance(options, dict) or not 2 <= len(options) <= len(LETTERS) or list(options) != list(LETTERS[: len(options)]):
        raise _wrong(f"{place}, options", options, f"2 to {len(LETTERS)} options under the letters A, B, ... in order")
    return Question(
        name, _text(held["text"], f"{place}, text"), {letter: _text(meaning, f"{place}, option {letter}") for letter, meaning in options.items()}
    )


def _wrong(place: str, found: object, expected: str) -> BadYaml:
    return BadYaml(place, found if isinstance(found, str) else repr(found), expected)


def _mapping(value: object, place: str, needed: set[str], allowed: set[str]) -> dict[str, Any]:
    if not isinstance(value, dict) or not needed <= set(value) <= allowed:
        found = sorted(map(str, value)) if isinstance(value, dict) else type(value).__name__
        raise _wrong(place, found, f"a mapping with {', '.join(sorted(needed))}, and nothing but {', '.join(sorted(allowed))}")
    return value


def _text(value: object, place: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _wrong(place, value, "text; quote yes, no, on, off and numbers")
    return " ".join(value.split())
