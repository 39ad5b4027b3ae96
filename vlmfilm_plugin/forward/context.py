"""How a condition reaches a block: conditions in force, and the context of one UNet forward.

Notes
-----
1. A *condition* is in force around forwards (a step method, `handle.condition(...)`). A *context* belongs to one UNet forward: the
   features of its rows, the step, the mode. Entering the UNet opens it, leaving it closes it, exceptions included.
2. Autograd may run a block again inside `backward()`, on another thread, when the forward is over and another forward's context is
   the latest; or the whole UNet, under another condition. So a function that activation checkpointing keeps is bound to what is
   open at that moment (`recompute.bind`) and re-enters it whenever and wherever it runs. The stacks are thread-local: they are set
   by the code that then runs there.
3. With reentrant checkpointing a context that is re-entered computes its projection anew: a shared graph would be run backward
   through twice. With the other kind it keeps what was computed: the second run must save the tensors that the first one did.
4. A block that finds no context raises. It never guesses. What runs inside a `backward()` takes nothing that was opened outside of it,
   or in another one: a checkpoint function of someone's own is refused, not conditioned on what happens to be the latest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from vlmfilm_plugin.errors import ConditionError
from vlmfilm_plugin.forward.recompute import NO_TASK, graph_task, stacks, watch

if TYPE_CHECKING:
    from vlmfilm_plugin.film.architecture import Stage
    from vlmfilm_plugin.film.gate_view import MaskReader
    from vlmfilm_plugin.film.gates import SpatialGate
    from vlmfilm_plugin.film.module import FilmModule
    from vlmfilm_plugin.forward.first_look import FirstLook


class Recorder(Protocol):
    """Receives what one block did; present on logged steps only."""

    def record(self, stage: Stage, before: Tensor, after: Tensor, gamma: Tensor, beta: Tensor, cond_vec: Tensor | None) -> None:
        """Take the features of a block before and after FiLM, gamma and beta (R, C, 1, 1), cond_vec (S, D), None in mode off."""


@dataclass
class ForwardContext:
    """The condition of one UNet forward.

    Attributes:
        film: the FiLM module of the UNet that runs.
        features: (S, F), one row a sample: a leaf without grad; None in mode `off`.
        index: (R,) the sample of each row, or None where row i is sample i.
        shared: what was computed for the samples: kept for a whole batch in evaluation, for one forward in training, never where None.
        own: the same for the rows.
        recorder: takes statistics, on logged steps only.
        ran: heads whose blocks have run.
        look: checks what blocks do, in the UNet's first forward only.
        gate: where FiLM acts; None is everywhere.
        waits: FiLM is the identity, since the transform of features has no statistics yet.
        task: the `backward()` in which this is open, if any.
        mode: that of the FiLM module when this was made, also where a block is run again later.
    """

    film: FilmModule
    features: Tensor | None
    index: Tensor | None = None
    shared: dict[Any, Any] | None = field(default_factory=dict)
    own: dict[Any, Any] | None = field(default_factory=dict)
    recorder: Recorder | None = None
    ran: set[int] = field(default_factory=set)
    gate: SpatialGate | None = None
    waits: bool = False
    task: int = NO_TASK
    mode: str = ""
    look: FirstLook | None = None

    def __post_init__(self) -> None:
        self.mode = self.mode or self.film.mode

    def cond_vec(self) -> Tensor:
        """Return the condition vectors of the samples (S, D)."""
        cached: Tensor | None = None if self.shared is None else self.shared.get("cond_vec")
        if cached is None:
            if self.features is None:
                raise ConditionError("this UNet forward has no features", {"mode": self.film.mode}, "report this: only mode off needs none")
            cached = self.film.project(self.features)
            if self.shared is not None:
                self.shared["cond_vec"] = cached
        return cached

    def gamma_beta(self, head: int) -> tuple[Tensor, Tensor]:
        """Return gamma and beta of head `head` for the rows, each (R, C, 1, 1)."""
        pair: tuple[Tensor, Tensor] | None = None if self.own is None else self.own.get(head)
        if pair is None:
            pair = self.film.head(head)(self.cond_vec())
            if self.waits:
                # By the heads all the same: a parameter without a gradient stops DDP.
                pair = 1 + 0 * pair[0], 0 * pair[1]
            if self.index is not None:
                pair = pair[0].index_select(0, self.index), pair[1].index_select(0, self.index)
            if self.own is not None:
                self.own[head] = pair
        return pair

    def prepare(self) -> None:
        """Compute gamma and beta of every head, and put them where compiled blocks find them; in mode `off` there are none."""
        for head, inputs in enumerate(self.film.compiled_inputs):
            inputs.is_off = self.mode == "off"
            if not inputs.is_off:
                inputs.gamma, inputs.beta = self.gamma_beta(head)
                inputs.is_gated = self.gate is not None

    def reentered(self, *, keep: bool) -> ForwardContext:
        """Return this context for a function that is run again now (note 3); what it does was recorded the first time."""
        if keep:
            return replace(self, task=graph_task(), recorder=None, look=None)
        is_first = graph_task() == NO_TASK
        watching = (self.recorder, self.look) if is_first else (None, None)
        return replace(self, task=graph_task(), shared=None, own=None, recorder=watching[0], look=watching[1])

    def fill_compiled(self) -> Callable[[], None]:
        """Put gamma and beta where compiled blocks find them; return what puts back what stood there."""
        used = [(head, inputs) for head, inputs in enumerate(self.film.compiled_inputs) if inputs.is_used]
        before = [(inputs, inputs.gamma, inputs.beta, inputs.is_gated, inputs.is_off, inputs.has_run) for _, inputs in used]
        for head, inputs in used:
            inputs.is_off = self.mode == "off"
            if not inputs.is_off:
                inputs.gamma, inputs.beta = self.gamma_beta(head)
            inputs.is_gated = self.gate is not None

        def undo() -> None:
            for inputs, gamma, beta, is_gated, is_off, has_run in before:
                inputs.gamma, inputs.beta, inputs.is_gated, inputs.is_off, inputs.has_run = gamma, beta, is_gated, is_off, has_run

        return undo


class Condition(Protocol):
    """What is in force around UNet forwards."""

    @property
    def is_for_all(self) -> bool:
        """Tell whether this condition is a published batch, meant for every UNet, rather than one UNet's own."""

    def serves(self, film: FilmModule) -> bool:
        """Tell whether this condition is meant for the UNet that holds `film`."""

    def open_context(self, film: FilmModule, x: Tensor, image: Tensor | None, masks: MaskReader | None) -> ForwardContext:
        """Return the context of a forward with input x (R, ...) and condition image (R, C, h, w) or None.

        Args:
            masks: where the host holds its masks; None: this forward only serves the gate of another, is not gated and not logged.
        """


@contextmanager
def in_force(condition: Condition) -> Iterator[None]:
    """Put a condition in force for the forwards inside the block."""
    watch.enter()
    stacks.conditions.append(condition)
    outer, stacks.task = stacks.task, graph_task()
    try:
        yield
    finally:
        stacks.task = outer
        _remove_last(stacks.conditions, condition)
        watch.leave()


def _remove_last(stack: list[Any], item: object) -> None:
    # By identity: a condition may hold tensors, which do not compare.
    for position in range(len(stack) - 1, -1, -1):
        if stack[position] is item:
            del stack[position]
            return


def condition_for(film: FilmModule) -> Condition | None:
    """Return the innermost condition in force for the UNet that holds `film`; one of its own wins over a published batch."""
    serving = [condition for condition in reversed(stacks.conditions) if condition.serves(film)]
    return next((condition for condition in serving if not condition.is_for_all), serving[0] if serving else None)


def batch_in_force() -> Condition | None:
    """Return the innermost published batch on this thread: a condition that serves every UNet."""
    return next((condition for condition in reversed(stacks.conditions) if condition.is_for_all), None)


def holds_now() -> bool:
    """Tell whether what is in force belongs to what runs: inside a `backward()`, whether it was put in force there."""
    return stacks.task == graph_task()


def push_context(context: ForwardContext) -> None:
    """Open a context; `pop_context` of the same UNet closes it."""
    watch.enter()
    context.task = graph_task()
    stacks.contexts.append(context)
    if stacks.opened is not None:
        stacks.opened.append(context.film)


def pop_context(film: FilmModule) -> ForwardContext | None:
    """Close the innermost context of `film` and return it; nothing happens where none is open."""
    for position in range(len(stacks.contexts) - 1, -1, -1):
        if stacks.contexts[position].film is film:
            context: ForwardContext = stacks.contexts[position]
            for _ in stacks.contexts[position:]:
                watch.leave()
            del stacks.contexts[position:]
            return context
    return None


def context_of(film: FilmModule, path: str) -> ForwardContext:
    """Return the innermost open context of `film`.

    Raises:
        ConditionError: a block ran outside its UNet's forward, or again inside `backward()` without its context.
    """
    task = graph_task()
    for context in reversed(stacks.contexts):
        if context.film is film and context.task == task:
            found: ForwardContext = context
            return found
    raise ConditionError(
        f"block {path!r} ran without the condition of a UNet forward",
        {
            "likely": "the UNet's forward was called directly instead of the UNet, or a checkpoint function other than torch's ran the block again",
            "expected": "the block runs inside a call of its UNet",
        },
        "call `unet(...)`; where a host has a checkpoint function of its own, its host adapter names that in `HostSpec.recompute`",
    )
