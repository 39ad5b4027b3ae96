"""Keep a function out of compiled code without loading the compiler: `torch.compiler.disable` imports torch._dynamo at once (0.8 s)."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

import wrapt

F = TypeVar("F", bound=Callable[..., Any])

COMPILER = "torch._dynamo"


def uncompiled(function: F) -> F:
    """Return `function`, to be called as it is: compiled code that reaches it breaks there, and nothing below it is compiled."""
    disabled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        return (disabled[0] if disabled else function)(*args, **kwargs)

    def compiler_loaded(compiler: Any) -> None:
        # `run` itself is not compiled, and not followed either; below it nothing is.
        compiler.decorators.skip(run)
        disabled.append(compiler.disable(function))

    if COMPILER in sys.modules:
        compiler_loaded(sys.modules[COMPILER])
    else:
        wrapt.register_post_import_hook(compiler_loaded, COMPILER)
    return cast(F, run)
