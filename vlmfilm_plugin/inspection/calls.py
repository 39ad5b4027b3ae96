"""The calls of one forward as a tree: which module called which, in order, with the shapes that went in and came out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

Shape = tuple[int, ...]


@dataclass(eq=False)
class Call:
    """One call of a module.

    Attributes:
        path: of the module within the root; `<Class>.path` of one that is no part of it, within the outermost that is none.
        inputs: shapes of the tensors among its arguments, in order.
        output: shape of its output tensor; where it returned several, of the first one that has spatial dimensions.
        place: where that tensor is in the output: None for the output itself, else an index or a key.
        start, end: ticks of one clock.
    """

    path: str
    module: nn.Module
    parent: Call | None
    start: int
    end: int = 0
    children: list[Call] = field(default_factory=list)
    inputs: tuple[Shape, ...] = ()
    output: Shape | None = None
    place: int | str | None = None
    values: tuple[tuple[Any, ...], Mapping[str, Any]] | None = None

    def walk(self) -> Iterator[Call]:
        """Return this call and all below it, outermost first."""
        yield self
        for child in self.children:
            yield from child.walk()

    def above(self) -> Iterator[Call]:
        """Return the calls around this one, innermost first."""
        call = self.parent
        while call is not None:
            yield call
            call = call.parent


class CallRecorder:
    """Records every call below a root while its forward runs, by torch's hooks for all modules; each thread has calls of its own.

    Args:
        wants: asked with a module that nothing called, before its forward: whether to record it.
        done: gets the tree when that forward has returned; not where it raised.
        keeps_values: whether calls keep their arguments until the root has returned.
    """

    def __init__(self, wants: Callable[[nn.Module], bool], done: Callable[[Call, Any], None], *, keeps_values: bool = False) -> None:
        self._wants, self._done, self._keeps_values = wants, done, keeps_values
        self._local = threading.local()
        self._handles: list[Any] = []

    def __enter__(self) -> CallRecorder:
        self._handles = [
            global_hooks.register_module_forward_pre_hook(self._enter),
            global_hooks.register_module_forward_hook(self._leave, with_kwargs=True, always_call=True),
        ]
        return self

    def __exit__(self, *error: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        local = self._local
        stack: list[Call | nn.Module] = local.__dict__.setdefault("stack", [])
        local.clock = local.__dict__.get("clock", 0) + 1
        if not stack:
            local.paths = {id(each): path for path, each in module.named_modules()} if self._wants(module) else None
        if local.paths is None:
            stack.append(module)
            return
        if id(module) not in local.paths:
            # Called from within the root, and no part of it: by a solver, say, that was given a function.
            name = f"<{type(module).__name__}>"
            for path, each in module.named_modules():
                local.paths.setdefault(id(each), f"{name}.{path}" if path else name)
        outer = stack[-1] if stack else None
        parent = outer if isinstance(outer, Call) else None
        call = Call(local.paths[id(module)], module, parent, local.clock)
        if parent is not None:
            parent.children.append(call)
        stack.append(call)

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any = None) -> None:
        # Where a forward raised, torch gives hooks for all modules no keyword arguments: (module, args, output), and the output is None.
        local = self._local
        stack: list[Call | nn.Module] = local.__dict__.get("stack", [])
        if not any(_module_of(each) is module for each in stack):
            return
        while True:
            # What is above it raised: its own hook was not called, or found nothing.
            last = stack.pop()
            if _module_of(last) is module:
                break
        if not isinstance(last, Call):
            return
        local.clock += 1
        last.end = local.clock
        last.inputs = tuple(tuple(tensor.shape) for tensor in _tensors((args, kwargs)))
        last.place, tensor = spatial_in(output)
        last.output = None if tensor is None else tuple(tensor.shape)
        if self._keeps_values and last.children:
            last.values = args, kwargs
        if not stack and output is not None:
            self._done(last, output)


def _module_of(entry: Call | nn.Module) -> nn.Module:
    return entry.module if isinstance(entry, Call) else entry


def spatial_in(output: Any) -> tuple[int | str | None, Tensor | None]:
    """Return where the first tensor with spatial dimensions is in an output, and the tensor; else the first of any kind, or None."""
    if isinstance(output, Tensor):
        return None, output
    items: list[tuple[int | str, Any]] = []
    if isinstance(output, Mapping):
        items = [(key, value) for key, value in output.items() if isinstance(key, str)]
    elif isinstance(output, tuple | list):
        items = list(enumerate(output))
    elif hasattr(output, "__dataclass_fields__"):
        items = [(name, getattr(output, name)) for name in output.__dataclass_fields__]
    tensors = [(place, value) for place, value in items if isinstance(value, Tensor)]
    return next((each for each in tensors if each[1].dim() > 2), tensors[0] if tensors else (None, None))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _tensors(each)
