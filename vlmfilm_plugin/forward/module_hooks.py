"""The hooks on a UNet and its decoder blocks: open the context, modulate, close the context.

Instances, not closures: a deepcopied or unpickled UNet's hooks point at its own heads. Nothing here reaches an encoder.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmfilm_plugin.errors import ConditionError, HostError, SettingsError
from vlmfilm_plugin.film.architecture import Stage
from vlmfilm_plugin.film.freezing import refuse_unfrozen
from vlmfilm_plugin.film.heads import Head
from vlmfilm_plugin.film.kept import buffers_kept, random_streams_kept
from vlmfilm_plugin.film.layers import identity_for
from vlmfilm_plugin.film.layout import Layout
from vlmfilm_plugin.film.module import ATTRIBUTE, FilmModule
from vlmfilm_plugin.forward import context as conditioning
from vlmfilm_plugin.forward.axis_probe import AxisProbe
from vlmfilm_plugin.forward.context import ForwardContext
from vlmfilm_plugin.forward.first_look import FirstLook
from vlmfilm_plugin.forward.first_pass import ForwardMasks
from vlmfilm_plugin.forward.plan import Selection, modules_in
from vlmfilm_plugin.forward.recompute import NO_TASK, graph_task, stacks
from vlmfilm_plugin.forward.traced import refuse_tracer
from vlmfilm_plugin.forward.uncompiled import uncompiled
from vlmfilm_plugin.host_spec import Masks, OfCall
from vlmfilm_plugin.settings.mode import MODE_VARIABLE


@dataclass
class Expected:
    """What must still hold when the UNet first runs: its `__init__`, or a subclass's, may have gone on after FiLM was attached.

    Attributes:
        selection: how the blocks are found.
        layouts: of the blocks that carry FiLM.
        own_film: name of the argument of `forward` through which the UNet's own FiLM would be conditioned, or None.
        frozen_by: origin of `freeze_host: true`, or None.
    """

    selection: Selection
    layouts: tuple[Layout, ...]
    own_film: str | None = None
    frozen_by: str | None = None

    def check(self, unet: nn.Module, film: FilmModule) -> None:
        """Check that the blocks that carry FiLM are still those that the settings select, and that what is frozen still is.

        Raises:
            HostError: blocks appeared, or disappeared.
            SettingsError: parameters of the host train although it was frozen.
        """
        owner = type(unet).__name__
        now = [target.path for target in self.selection.find(unet)]
        attached = [stage.path for stage in film.architecture.stages]
        if now != attached:
            raise HostError(
                f"the decoder of {owner} has changed since FiLM was attached",
                {"found": ", ".join(now), "expected": ", ".join(attached) + "   (these carry FiLM)"},
                "build the whole decoder inside the class's `__init__`, or attach after the last change",
            )
        if self.frozen_by is not None:
            refuse_unfrozen(unet, self.frozen_by)

    def look(self, unet: nn.Module, film: FilmModule, values: Iterable[Any], probe: AxisProbe | None = None) -> FirstLook:
        """Return what checks the first forward, a call with these values."""
        inputs = {tuple(value.shape[2:]) for value in values if isinstance(value, Tensor)}
        is_stated = self.selection.groups is not None
        return FirstLook(type(unet).__name__, film.architecture.stages, self.layouts, is_stated=is_stated, inputs=inputs, probe=probe)


@dataclass
class CallValues:
    """Where the values of a call of the UNet are: its input, and the condition image.

    Attributes:
        arguments: names of the forward's arguments after self.
        x: the UNet's input (R, ...): the name of an argument, a function of the arguments by name, or None for the first.
        condition: the condition image likewise; None where there is none.
    """

    arguments: tuple[str, ...]
    x: OfCall | None = None
    condition: OfCall | None = None

    def by_name(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call by name."""
        return {**dict(zip(self.arguments, args, strict=False)), **kwargs}

    def input_of(self, arguments: Mapping[str, Any], owner: str) -> Tensor:
        """Return the UNet's input (R, ...).

        Raises:
            HostError: it is no tensor with rows.
        """
        first = next((name for name in self.arguments[:1] if name in arguments), next(iter(arguments), ""))
        found = arguments.get(first) if self.x is None else _value(self.x, arguments)
        if isinstance(found, Tensor) and found.dim():
            return found
        facts = {
            "found": type(found).__name__,
            "taken from": f"argument {first!r}" if self.x is None else repr(self.x),
            "expected": "a tensor (R, ...)",
        }
        raise HostError(f"cannot tell the rows of this call of {owner}", facts, "state `x`, the UNet's input, in the host adapter's `UNet`")

    def condition_of(self, arguments: Mapping[str, Any]) -> Any:
        """Return the condition image, or None."""
        return None if self.condition is None else _value(self.condition, arguments)


def _value(what: OfCall, arguments: Mapping[str, Any]) -> Any:
    return what(arguments) if callable(what) else arguments.get(what)


class OpenContext:
    """Forward pre-hook of the UNet.

    Args:
        values: where its input and its condition image are.
        masks: where the mask is that spatial gates look at.
        expected: what is checked at the first forward.
    """

    def __init__(self, values: CallValues, masks: Masks, expected: Expected) -> None:
        self.values, self.masks, self.expected = values, masks, expected
        self._is_checked = False
        self.is_seen = False

    @uncompiled
    def __call__(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        film = getattr(unet, ATTRIBUTE, None)
        if film is None or kwargs is None:
            return  # Taken out by a hook of this very call, whose list of hooks torch had read before.
        if (look := _looked_at(film)) is not None:
            conditioning.push_context(ForwardContext(film, None, mode="off", look=look))
            return
        try:
            context = self._context_for(unet, film, args, kwargs)
            context.prepare()
        except Exception:
            # The closing hook runs all the same, but under torch.export: it must close this forward's context, not that of an outer one.
            if not torch.compiler.is_compiling():
                conditioning.push_context(ForwardContext(film, None))
            raise
        is_recorded = torch.jit.is_tracing() or torch.compiler.is_compiling()  # type: ignore[attr-defined, no-untyped-call]
        if not self.is_seen and not is_recorded and graph_task() == NO_TASK:
            context.look = self.expected.look(unet, film, (*args, *kwargs.values()))
        conditioning.push_context(context)

    def _context_for(self, unet: nn.Module, film: FilmModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ForwardContext:
        arguments = self.values.by_name(args, kwargs)
        mode = os.environ.get(MODE_VARIABLE, film.mode) if film.is_unpickled else film.mode
        if mode != film.mode:
            raise SettingsError(
                f"this {type(unet).__name__} carries FiLM in mode {film.mode}, but {MODE_VARIABLE} says otherwise",
                {"found": repr(mode), "expected": repr(film.mode)},
                "build the model in a process with the mode you want, and load its weights, instead of a pickled model",
            )
        if not self._is_checked:
            self.expected.check(unet, film)
            self._is_checked = True
        if self.expected.own_film is not None and arguments.get(self.expected.own_film) is not None:
            raise HostError(
                f"two FiLMs would act in this {type(unet).__name__}: its own and the plugin's",
                {"found": f"a call with `{self.expected.own_film}`, which conditions the UNet's own FiLM", "expected": "exactly one FiLM"},
                "switch the host's own FiLM off, or remove the plugin's: `handle.remove()`, or a run without VLM_FILM_MODE",
            )
        condition = conditioning.condition_for(film)
        if condition is None and film.mode == "off":
            return ForwardContext(film, None)
        if condition is None:
            raise ConditionError(
                f"{type(unet).__name__} was called with no condition in force",
                {"mode": film.mode, "expected": "a call inside a step method that a host adapter publishes, or inside `handle.condition(...)`"},
                "wrap the call: `with vlmfilm_plugin.running_batch(batch, phase=...):` or `with handle.condition(features=...):`",
            )
        if not conditioning.holds_now():
            raise ConditionError(
                f"{type(unet).__name__} runs again in backward(), and the condition of its forward is not known any more",
                {"found": "a condition from outside of this backward()", "likely": "a checkpoint function other than torch's around the whole UNet"},
                "use torch.utils.checkpoint; a host's own checkpoint function stands in its host adapter's `HostSpec.recompute`",
            )
        if film.mode != "off":
            refuse_tracer(type(unet).__name__)
        x, image = self.values.input_of(arguments, type(unet).__name__), self.values.condition_of(arguments)
        is_first_pass = any(running is film for running in stacks.first_passes)
        masks = None if is_first_pass else ForwardMasks(unet, film, args, kwargs, x, self.masks)
        return condition.open_context(film, x, image, masks)


class CloseContext:
    """Forward hook of the UNet; runs when its forward raises, too, then with no output."""

    def __init__(self, opened: OpenContext) -> None:
        self.opened = opened

    @uncompiled
    def __call__(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        film = getattr(unet, ATTRIBUTE)
        context = conditioning.pop_context(film)
        if context is not None:
            film.last_forward.features, film.last_forward.index = context.features, context.index
        has_run = [inputs.close() for inputs in film.compiled_inputs]
        if context is None or output is None or _looked_at(film) is not None:
            return
        idle = [stage for head, stage in enumerate(film.architecture.stages) if not (has_run[head] or head in context.ran)]
        if idle:
            raise HostError(
                f"{type(unet).__name__} ran, but FiLM did not at {len(idle)} of {len(film.architecture.stages)} decoder blocks",
                {
                    "idle": ", ".join(f"{stage.label} ({stage.path})" for stage in idle),
                    "likely": "these blocks were replaced after FiLM was attached, or the forward does not call them",
                    "expected": "every selected block runs in every forward",
                },
                "attach after the last change of the UNet, or select other `decoder_stages`",
            )
        if context.look is not None:
            if any(has_run) or context.look.is_ambiguous:
                context.look = _look_again(unet, film, self.opened.expected, args, kwargs)
            context.look.finish()
            self.opened.is_seen = True


def _looked_at(film: FilmModule) -> FirstLook | None:
    """Return what sees the blocks of a UNet that runs to be looked at alone."""
    return next((look for looking, look in reversed(stacks.looks) if looking is film), None)


def _look_again(unet: nn.Module, film: FilmModule, expected: Expected, args: tuple[Any, ...], kwargs: dict[str, Any]) -> FirstLook:
    """Run a UNet once more, without the compiler, gradients or FiLM, to see what its blocks do.

    Compiled code tells nothing; and where sizes do not tell channels from space, what runs inside the blocks may.
    """
    probe, modules = AxisProbe(), modules_in(unet)
    look = expected.look(unet, film, (*args, *kwargs.values()), probe)
    blocks = {stage.path: modules[stage.path] for stage in film.architecture.stages}
    stacks.looks.append((film, look))
    try:
        devices = {parameter.device for parameter in unet.parameters()}
        with probe.watching(blocks), torch.no_grad(), random_streams_kept(devices), buffers_kept(unet), torch.compiler.set_stance("force_eager"):
            unet(*args, **kwargs)
    finally:
        stacks.looks.pop()
    return look


class ModulateBlock:
    """Forward hook of a decoder block."""

    # Pickled before blocks could lie in another way.
    layout = Layout()

    def __init__(self, film: FilmModule, head: int, layout: Layout) -> None:
        self.film, self.head, self.inputs, self.layout = film, head, film.compiled_inputs[head], layout

    def __call__(self, block: nn.Module, args: Any, output: Any) -> Any:
        if torch.compiler.is_compiling() and not self.inputs.is_gated:
            # A context cannot be looked up from compiled code; the open context has left gamma and beta in the inputs.
            self.inputs.has_run = True
            if self.inputs.is_off:
                return None
            head, gamma, beta = self.film.head(self.head), self.inputs.gamma, self.inputs.beta
            if self.layout.output is None:
                return self.layout.modulate(head, output, gamma, beta)  # type: ignore[arg-type]
            x = self.layout.take(output, self.film.architecture.stages[self.head].path)
            return self.layout.put(output, self.layout.modulate(head, x, gamma, beta))  # type: ignore[arg-type]
        return self._modulate(output)

    @uncompiled
    def _modulate(self, output: Any) -> Any:
        stage, layout = self.film.architecture.stages[self.head], self.layout
        context = conditioning.context_of(self.film, stage.path)
        if context.look is not None:
            context.look.see(self.head, output)
        context.ran.add(self.head)
        if context.mode == "off":
            if context.recorder is not None:
                _assert_identity(layout.take(output, stage.path), self.film.head(self.head), stage, layout, context)
            return None
        x = layout.take(output, stage.path)
        gamma, beta = context.gamma_beta(self.head)
        if not layout.fits(x, *gamma.shape[:2]):
            facts = {
                "gamma": tuple(gamma.shape),
                "output": tuple(x.shape),
                "expected": f"equal rows and channels, channels at axis {layout.axis}, {layout.rank} dimensions of space",
            }
            raise ConditionError(
                f"cannot modulate block {stage.path!r}: gamma does not fit its output", facts, "pass one feature a row of the UNet's input"
            )
        result = layout.modulate(self.film.head(self.head), x, gamma, beta)
        if context.gate is not None:
            result = context.gate.apply(stage.index, x, result, layout)
        if context.recorder is not None:
            # Without a graph: what is saved for backward() must be the same when the block runs again, unrecorded.
            with torch.no_grad():
                context.recorder.record(stage, x, result, gamma, beta, context.cond_vec())
        return layout.put(output, result)


@torch.no_grad()
def _assert_identity(x: Tensor, head: Head, stage: Stage, layout: Layout, context: ForwardContext) -> None:
    """Check on a logged step that gamma 1 and beta 0 leave x alone to the bit."""
    gamma, beta = identity_for(x, layout.axis)
    y = layout.modulate(head, x, gamma, beta)
    if not bool(((y == x) | (y.isnan() & x.isnan())).all()):
        raise HostError(
            f"mode off changed the output of block {stage.path!r}",
            {"found": "gamma 1, beta 0 is not the identity here", "dtype": x.dtype},
            "report this",
        )
    if context.recorder is not None:
        context.recorder.record(stage, x, y, gamma, beta, None)
