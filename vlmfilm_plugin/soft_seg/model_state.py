"""What `apply_vlm_film` remembers of one model between calls; it dies with the model, and no two models share it."""

from __future__ import annotations

import os
import weakref
from collections.abc import Hashable, Sequence
from typing import Any

from vlmfilm_plugin.features.shuffle import Shuffle
from vlmfilm_plugin.run.log_lines import ModelLines
from vlmfilm_plugin.settings.layers import layers_of, resolve
from vlmfilm_plugin.settings.mode import PREFIX
from vlmfilm_plugin.soft_seg.call import Call
from vlmfilm_plugin.soft_seg.watching import Watch

_ATTRIBUTE = "_vlmfilm_lines"

# By identity: a model may compare equal to another one, or not be hashable.
_states: dict[int, tuple[weakref.ref[Any], ModelState]] = {}


class ModelState:
    """The log lines of one model, and where in its training it is."""

    def __init__(self) -> None:
        self.lines = ModelLines()
        self.watch = Watch()
        self._validation_calls = 0
        self._was_training = True
        self._validations = 0
        self._written: Hashable = None

    def enter(self, call: Call) -> None:
        """Note a call: the first one in training after a validation reports that validation."""
        if call.is_training and not self._was_training:
            self.lines.report_validation(self._validation_calls)
            self._validation_calls, self._validations = 0, self._validations + 1
        self._was_training = call.is_training
        self._validation_calls += not call.is_training and call.debug is not None

    def shuffled(self, call: Call, permutation: Sequence[int], note: str) -> None:
        """Write `[FILM-SHUFFLE]` once an epoch: by the model's own count, else by the validations that are over."""
        self.lines.shuffled(call.epoch if isinstance(call.epoch, int) else ("validations", self._validations), permutation, note)

    def write_pairs(self, shuffle: Shuffle, names: Sequence[str], permutation: Sequence[int], step: int) -> None:
        """Write who gets whose condition; once for all stages and forwards of a batch."""
        batch = (step, tuple(names))
        if batch != self._written:
            self._written = batch
            shuffle.pairs.write(((names[row], names[other]) for row, other in enumerate(permutation)), step)


def state_of(model: Any, heads: Any) -> ModelState:
    """Return the state of a model; where none is given, of its heads."""
    owner = heads if model is None else model
    known = _states.get(id(owner))
    if known is not None and known[0]() is owner:
        return known[1]
    place = id(owner)
    try:
        reference = weakref.ref(owner, lambda _: _states.pop(place, None))
    except TypeError:
        return _state_inside(owner, heads)
    state = ModelState()
    _states[place] = reference, state
    return state


def _state_inside(owner: Any, heads: Any) -> ModelState:
    """Return the state of an object that nothing can refer to weakly: it holds its state itself, or its heads do."""
    state = getattr(owner, _ATTRIBUTE, None)
    if not isinstance(state, ModelState):
        state = ModelState()
        try:
            setattr(owner, _ATTRIBUTE, state)
        except (AttributeError, TypeError):
            return state_of(None, heads)
    return state


_shuffles: dict[tuple[tuple[str, str], ...], Shuffle] = {}


def shuffle_of_environment() -> Shuffle:
    """Return the rule of mode `shuffle` that the environment asks for (`VLM_FILM_SHUFFLE_SEED`, `VLM_FILM_CONFIG`, ...).

    Raises:
        SettingsError: a variable or the file holds a wrong setting.
    """
    variables = {name: value for name, value in os.environ.items() if name.startswith(PREFIX)}
    key = tuple(sorted(variables.items()))
    if key not in _shuffles:
        _shuffles.clear()
        _shuffles[key] = Shuffle.from_settings(resolve(layers_of(variables)))
    return _shuffles[key]
