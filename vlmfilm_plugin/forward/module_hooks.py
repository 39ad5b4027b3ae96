"""The hooks on a UNet and its decoder blocks: open the context, modulate, close the context.

Instances, not closures: a deepcopied or unpickled UNet's hooks point at its own heads. Nothing here reaches an encoder.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from vlmfilm_plugin.errors import ConditionError, HostError, SettingsError
from vlmfilm_plugin.film.architecture import Stage
from vlmfilm_plugin.film.heads import Head
from vlmfilm_plugin.film.layers import identity_for
from vlmfilm_plugin.film.module import ATTRIBUTE, FilmModule
from vlmfilm_plugin.forward import context as conditioning
from vlmfilm_plugin.forward.context import ForwardContext
from vlmfilm_plugin.settings.mode import MODE_VARIABLE

F = TypeVar("F", bound=Callable[..., Any])


def _uncompiled(function: F) -> F:
    """Keep a function out of compiled code; torch's own decorator has no types."""
    disable: Any = torch.compiler.disable
    return cast(F, disable(function))


class OpenContext:
    """Forward pre-hook of the UNet.

    Args:
        arguments: names of the forward's arguments after self; the first is the UNet's input.
        condition: name of the one that holds the condition image, or None.
    """

    def __init__(self, arguments: Sequence[str], condition: str | None) -> None:
        self.arguments, self.condition = tuple(arguments), condition

    @_uncompiled
    def __call__(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        film = getattr(unet, ATTRIBUTE)
        try:
            context = self._context_for(unet, film, {**dict(zip(self.arguments, args, strict=False)), **kwargs})
            if film.mode != "off":
                context.prepare()
        except Exception:
            # The closing hook runs all the same: it must close this forward's context, not that of an outer one.
            conditioning.push_context(ForwardContext(film, None))
            raise
        conditioning.push_context(context)

    def _context_for(self, unet: nn.Module, film: FilmModule, arguments: Mapping[str, Any]) -> ForwardContext:
        mode = os.environ.get(MODE_VARIABLE, film.mode) if film.is_unpickled else film.mode
        if mode != film.mode:
            raise SettingsError(
                f"this {type(unet).__name__} carries FiLM in mode {film.mode}, but {MODE_VARIABLE} says otherwise",
                {"found": repr(mode), "expected": repr(film.mode)},
                "build the model in a process with the mode you want, and load its weights, instead of a pickled model",
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
        name = next((name for name in self.arguments[:1] if name in arguments), next(iter(arguments)))
        return condition.open_context(film, arguments[name], arguments.get(self.condition) if self.condition else None)


class CloseContext:
    """Forward hook of the UNet; runs when its forward raises, too, then with no output."""

    @_uncompiled
    def __call__(self, unet: nn.Module, args: Any, output: Any) -> None:
        film = getattr(unet, ATTRIBUTE)
        context = conditioning.pop_context(film)
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
            return None if self.film.mode == "off" else self.film.head(self.head).modulate(output, self.inputs.gamma, self.inputs.beta)  # type: ignore[arg-type]
        return self._modulate(output)

    @_uncompiled
    def _modulate(self, output: Tensor) -> Tensor | None:
        stage = self.film.architecture.stages[self.head]
        context = conditioning.context_of(self.film, stage.path)
        context.ran.add(self.head)
        if self.film.mode == "off":
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
        result = context.gated(output, self.film.head(self.head).modulate(output, gamma, beta))
        if context.recorder is not None:
            context.recorder.record(stage.index, output, result, gamma, beta, context.cond_vec())
        return result


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
