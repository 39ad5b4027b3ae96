"""The shape of a message, and the error tree."""

from __future__ import annotations

import inspect
import pickle

import pytest

from vlmfilm_plugin import errors
from vlmfilm_plugin.errors import VlmFilmError

CLASSES = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, VlmFilmError)]


def test_message_has_headline_aligned_facts_in_order_and_one_fix() -> None:
    error = VlmFilmError("cannot do it", {"found": 1, "expected at most": "2"}, "do less")
    assert str(error).splitlines() == ["cannot do it", "  found:            1", "  expected at most: 2", "  fix:              do less"]


def test_facts_keep_their_type_and_do_not_alias_the_callers_mapping() -> None:
    facts = {"width": 3}
    error = VlmFilmError("no", facts)
    facts["width"] = 4
    assert error.facts == {"width": 3}
    assert error.fix is None
    assert "fix" not in str(error)


def test_headline_alone_is_the_whole_message() -> None:
    assert str(VlmFilmError("no")) == "no"


@pytest.mark.parametrize("cls", CLASSES)
def test_every_error_survives_pickling_between_processes(cls: type[VlmFilmError]) -> None:
    error = cls("cannot do it", {"found": (1, 2)}, "do less")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is cls
    assert (copy.headline, copy.facts, copy.fix, str(copy)) == (error.headline, error.facts, error.fix, str(error))


def test_tree_is_the_one_drawn_in_the_module_docstring() -> None:
    assert {cls.__name__ for cls in CLASSES} == {word for word in errors.__doc__.replace("─", " ").split() if word.endswith("Error")}
    parents = {cls.__name__: cls.__base__.__name__ for cls in CLASSES}
    assert parents.pop("VlmFilmError") == "RuntimeError"
    assert parents.pop("TargetMatchError") == "HostError"
    assert parents.pop("MissingFeatureError") == "ConditionError"
    assert parents.pop("NarrowRangeError") == "ImageReadError"
    assert parents.pop("UnsteadyEncoderError") == "EncoderError"
    assert set(parents.values()) == {"VlmFilmError"}
