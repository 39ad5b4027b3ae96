"""The hooks on a UNet and its decoder blocks: open the context, modulate, close the context.

Instances, not closures: a deepcopied or unpickled UNet's hooks point at its own heads. Nothing here reaches an encoder.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmfilm_plugin.errors import ConditionError, HostError, SettingsError
from vlmfilm_plugin.film.architecture import Stage
from vlmfilm_plugin.film.freezing import refuse_unfrozen
from vlmfilm_plugin.film.heads import Head
from vlmfilm_plugin.film.layers import identity_for
from vlmfilm_plugin.film.module import ATTRIBUTE, FilmModule
from vlmfilm_plugin.film.targets import match_targets, select_stages
from vlmfilm_plugin.forward import context as conditioning
from vlmfilm_plugin.forward.context import ForwardContext
from vlmfilm_plugin.forward.first_pass import ForwardMasks
from vlmfilm_plugin.forward.recompute import stacks
from vlmfilm_plugin.forward.traced import refuse_tracer
from vlmfilm_plugin.forward.uncompiled import uncompiled
from vlmfilm_plugin.host_spec import Masks
from vlmfilm_plugin.settings.mode import MODE_VARIABLE


@dataclass
class Expected:
    """What must still hold when the UNet first runs: its `__init__`, or a subclass's, may have gone on after FiLM was attached.

    Attributes:
        pattern: module path pattern of the blocks.
        decoder_stages: the selection, None for all.
        own_film: name of the argument of `forward` through which the UNet's own FiLM would be conditioned, or None.
        frozen_by: origin of `freeze_host: true`, or None.
    """

    pattern: str
    decoder_stages: tuple[int, ...] | None
    own_film: str | None = None
    frozen_by: str | None = None

    def check(self, unet: nn.Module, film: FilmModule) -> None:
        """Check that the blocks that carry FiLM are still those that the settings select, and that what is frozen still is.

        Raises:
            HostError: blocks appeared, or disappeared.
            SettingsError: parameters of the host train although it was frozen.
        """
        owner = type(unet).__name__
        matched = match_targets(dict(unet.named_modules()), self.pattern, owner=owner, origin="attachment")
        now = {target.path for target in select_stages(matched, self.decoder_stages, owner=owner, origin="attachment")}
        attached = {stage.path for stage in film.architecture.stages}
        if now != attached:
            raise HostError(
                f"the decoder of {owner} has changed since FiLM was attached",
                {"found": ", ".join(sorted(now)), "expected": ", ".join(sorted(attached)) + "   (these carry FiLM)"},
                "build the whole decoder inside the class's `__init__`, or attach after the last change",
            )
        if self.frozen_by is not None:
            refuse_unfrozen(unet, self.frozen_by)


class OpenContext:
    """Forward pre-hook of the UNet.

    Args:
        arguments: names of the forward's arguments after self; the first is the UNet's input.
        condition: name of the one that holds the condition image, or None.
        masks: where the mask is that spatial gates look at.
        expected: what is checked at the first forward.
    """

    def __init__(self, arguments: Sequence[str], condition: str | None, masks: Masks, expected: Expected) -> None:
        self.arguments, self.condition, self.masks, self.expected = tuple(arguments), condition, masks, expected
        self._is_checked = False

    @uncompiled
    def __call__(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        film = getattr(unet, ATTRIBUTE)
        try:
            context = self._context_for(unet, film, args, kwargs)
            context.prepare()
        except Exception:
            # The closing hook runs all the same, but under torch.export: it must close this forward's context, not that of an outer one.
            if not torch.compiler.is_compiling():
                conditioning.push_context(ForwardContext(film, None))
            raise
        conditioning.push_context(context)

    def _context_for(self, unet: nn.Module, film: FilmModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ForwardContext:
        arguments = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
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
        name = next((name for name in self.arguments[:1] if name in arguments), next(iter(arguments)))
        x, image = arguments[name], arguments.get(self.condition) if self.condition else None
        is_first_pass = any(running is film for running in stacks.first_passes)
        masks = None if is_first_pass else ForwardMasks(unet, film, args, kwargs, x, self.masks)
        return condition.open_context(film, x, image, masks)


class CloseContext:
    """Forward hook of the UNet; runs when its forward raises, too, then with no output."""

    @uncompiled
    def __call__(self, unet: nn.Module, args: Any, output: Any) -> None:
        film = getattr(unet, ATTRIBUTE)
        context = conditioning.pop_context(film)
        if context is not None:
            film.last_forward.features, film.last_forward.index = context.features, context.index
        has_run = [inputs.close() for inputs in film.compiled_inputs]
        if context is None or output is None:
            return
        idle = [stage for head, stage in enumerate(film.architecture.stages) if not (has_run[head] or head in context.ran)]
        if not idle:
            return
        raise HostError(
            f"{type(unet).__name__} ran, but FiLM did not at {len(idle)} of {len(film.heads)} decoder stages",
            {
                "idle": ", ".join(f"{stage.index} ({stage.path})" for stage in idle),
                "likely": "these blocks were replaced after FiLM was attached, or the forward does not call them",
                "expected": "every selected block runs in every forward",
            },
            "attach after the last change of the UNet, or select other `decoder_stages`",
        )


class ModulateBlock:
    """Forward hook of a decoder block."""

    def __init__(self, film: FilmModule, head: int) -> None:
        self.film, self.head, self.inputs = film, head, film.compiled_inputs[head]

    def __call__(self, block: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if torch.compiler.is_compiling() and not self.inputs.is_gated:
            # A context cannot be looked up from compiled code; the open context has left gamma and beta in the inputs.
            self.inputs.has_run = True
            return None if self.inputs.is_off else self.film.head(self.head).modulate(output, self.inputs.gamma, self.inputs.beta)  # type: ignore[arg-type]
        return self._modulate(output)

    @uncompiled
    def _modulate(self, output: Tensor) -> Tensor | None:
        stage = self.film.architecture.stages[self.head]
        context = conditioning.context_of(self.film, stage.path)
        context.ran.add(self.head)
        if context.mode == "off":
            if context.recorder is not None:
                _assert_identity(output, self.film.head(self.head), stage, context)
            return None
        gamma, beta = context.gamma_beta(self.head)
        if gamma.shape[:2] != output.shape[:2]:
            raise ConditionError(
                f"cannot modulate block {stage.path!r}: gamma does not fit its output",
                {"gamma": tuple(gamma.shape), "output": tuple(output.shape), "expected": "equal rows and channels"},
                "pass one feature a row of the UNet's input",
            )
        result = self.film.head(self.head).modulate(output, gamma, beta)
        if context.gate is not None:
            result = context.gate.apply(stage.index, output, result)
        if context.recorder is not None:
            # Without a graph: what is saved for backward() must be the same when the block runs again, unrecorded.
            with torch.no_grad():
                context.recorder.record(stage.index, output, result, gamma, beta, context.cond_vec())
        return result


@torch.no_grad()
def _assert_identity(x: Tensor, head: Head, stage: Stage, context: ForwardContext) -> None:
    """Check on a logged step that gamma 1 and beta 0 leave x alone to the bit."""
    gamma, beta = identity_for(x)
    y = head.modulate(x, gamma, beta)
    if not bool(((y == x) | (y.isnan() & x.isnan())).all()):
        raise HostError(
            f"mode off changed the output of block {stage.path!r}",
            {"found": "gamma 1, beta 0 is not the identity here", "dtype": x.dtype},
            "report this",
        )
    if context.recorder is not None:
        context.recorder.record(stage.index, x, y, gamma, beta, None)
