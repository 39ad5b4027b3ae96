"""UNets of libraries: which of those that a process builds are the ones that FiLM was asked for.

A library's UNet says nothing of its use: beside the one that trains there may be a frozen teacher, or a net that a metric runs. FiLM must be
there before the optimizer is built, so each UNet gets it when it is built, as the identity and without a draw from the host's random stream;
at a forward it is known what trains and what was loaded, and one that is neither, beside one that is, becomes plain again.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Set
from types import ModuleType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet, ref

from vlmfilm_plugin.errors import ConditionError
from vlmfilm_plugin.host_spec import HostSpec, UNet
from vlmfilm_plugin.hosts.wrapping import Undo, replace, undo_all, when_built
from vlmfilm_plugin.log import film_logger

if TYPE_CHECKING:
    from vlmfilm_plugin.forward.handle import FilmHandle
    from vlmfilm_plugin.run.runtime import Runtime

_MARK = "__vlmfilm_library__"


class _BuiltWithoutWeights(Exception):
    """A UNet was built on the meta device inside a call that can build it with weights."""


class _Loading(threading.local):
    is_caught = False


class LibraryUNets:
    """The UNets of libraries in one process.

    Args:
        runtime: returns the run; first asked when a UNet is built.
        has_host: tells whether a host was recognised whose own host adapter says which UNets it has.
    """

    def __init__(self, runtime: Callable[[], Runtime], has_host: Callable[[], bool]) -> None:
        self._runtime, self._has_host = runtime, has_host
        self._undecided: WeakSet[Any] = WeakSet()
        self._attached: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
        self._loading = _Loading()

    def patch(self, module: ModuleType, spec: HostSpec) -> Undo:
        """Watch for UNets of one module of a library; a second call for the same classes changes nothing."""
        cutting = {name: getattr(module, name) for name in spec.windows if not hasattr(getattr(module, name), _MARK)}
        undos: list[Undo] = [replace(module, name, _one_image_at_a_time(function, self._has_film)) for name, function in cutting.items()]
        for unet in spec.unets:
            if _MARK in vars(unet.cls):
                continue
            undos += [when_built(unet.cls, functools.partial(self._built, unet)), replace(unet.cls, _MARK, True)]
            if "from_pretrained" in dir(unet.cls):
                undos.append(self._watch_loading(unet.cls))
        return undo_all(undos)

    def is_attached(self, film: Any) -> bool:
        """Tell whether a FiLM module counts: one of a library's UNet does where that UNet trains; all others do."""
        for unet in list(self._attached):
            if getattr(unet, "vlm_film", None) is film:
                return self._attached[unet] or _trains(unet, _held_by_optimizers())
        return True

    def _built(self, spec: UNet, unet: Any) -> None:
        from vlmfilm_plugin.film.module import ATTRIBUTE

        if self._has_host() or hasattr(unet, ATTRIBUTE):
            return
        if any(parameter.is_meta for parameter in unet.parameters()):
            if self._loading.is_caught:
                raise _BuiltWithoutWeights
            film_logger().warning("[VLM] WARNING: a %s was built on the meta device, without weights: it has no FiLM", type(unet).__name__)
            return
        runtime = self._runtime()
        runtime.watch_loaders()
        handle = runtime.attach(unet, spec)
        if handle is None:
            return
        self._attached[unet] = False
        if runtime.mode != "off":
            self._undecided.add(unet)
        unet.register_forward_pre_hook(_Decide(self, handle), prepend=True)

    def decide(self, unet: Any, handle: FilmHandle) -> None:
        """Decide about a UNet that is about to run: it keeps its FiLM, or becomes plain again."""
        import torch

        if torch.compiler.is_compiling():
            return
        if unet in self._attached and not self._attached[unet] and torch.is_grad_enabled() and any(p.requires_grad for p in unet.parameters()):
            self._attached[unet] = True
        if unet not in self._undecided:
            return
        others = [other for other in self._attached if other is not unet]
        if not others and not torch.is_grad_enabled():
            return  # Nothing to tell it from, in a sampler's every forward.
        held = _held_by_optimizers()
        if _is_meant(unet, held):
            self._undecided.discard(unet)
            return
        meant = [other for other in others if _is_meant(other, held)]
        if meant:
            self._undecided.discard(unet)
            del self._attached[unet]
            handle.remove()
            film_logger().info(
                "[VLM] left plain: a %s that no optimizer holds and no FiLM was loaded into, beside the %s that FiLM is for",
                type(unet).__name__,
                type(meant[0]).__name__,
            )

    def _has_film(self) -> bool:
        return len(self._attached) > 0 and self._runtime().mode != "off"

    def _watch_loading(self, cls: Any) -> Undo:
        """Have a class method that builds without weights build with them: what is not in the file, FiLM, would stay without any."""
        original = inspect.getattr_static(cls, "from_pretrained")
        library = self

        def from_pretrained(owner: Any, *args: Any, **kwargs: Any) -> Any:
            import torch

            call = original.__get__(None, owner)
            outer, library._loading.is_caught = library._loading.is_caught, True
            try:
                return call(*args, **kwargs)
            except _BuiltWithoutWeights:
                library._loading.is_caught = False
                # Without weights nothing is drawn for them.
                with torch.random.fork_rng():
                    return call(*args, **{**kwargs, "low_cpu_mem_usage": False})
            finally:
                library._loading.is_caught = outer

        functools.update_wrapper(from_pretrained, getattr(original, "__func__", original))
        return replace(cls, "from_pretrained", classmethod(from_pretrained))


def _one_image_at_a_time(function: Callable[..., Any], has_film: Callable[[], bool]) -> Callable[..., Any]:
    """Return a function that cuts windows, refused with several images while FiLM looks at each: a call's rows may be windows of several."""

    # No proxy: a host may pickle it by name.
    @functools.wraps(function)
    def windows(*args: Any, **kwargs: Any) -> Any:
        from vlmfilm_plugin.forward.context import batch_in_force

        inputs = args[0] if args else next(iter(kwargs.values()))
        if inputs.shape[0] > 1 and has_film() and batch_in_force() is not None:
            raise ConditionError(
                f"cannot tell which image each window of {function.__name__} belongs to",
                {"found": f"{inputs.shape[0]} images in one call", "expected": "one image a call: its windows may be as many as you like"},
                "evaluate with batch size 1",
            )
        return function(*args, **kwargs)

    setattr(windows, _MARK, True)
    return windows


def _is_meant(unet: Any, held: Set[int]) -> bool:
    """Tell whether FiLM is for this UNet: it was loaded into it, or it trains."""
    return bool(unet.vlm_film.was_loaded) or _trains(unet, held)


def _trains(unet: Any, held: Set[int]) -> bool:
    return any(id(parameter) in held for parameter in unet.parameters() if parameter.requires_grad)


def _held_by_optimizers() -> Set[int]:
    """Return the ids of the parameters that optimizers hold; looks at every object of the process."""
    from vlmfilm_plugin.run.training_check import living_optimizers

    return {id(parameter) for each in living_optimizers() for group in each.param_groups for parameter in group["params"]}


class _Decide:
    """Forward pre-hook of a library's UNet; a copy, or one that was unpickled, is not asked again."""

    def __init__(self, library: LibraryUNets, handle: FilmHandle) -> None:
        # Here, not in the library: it holds the UNet, and so is collected with it.
        self._library, self.handle = ref(library), handle

    def __call__(self, unet: Any, args: Any) -> None:
        library = self._library()
        if library is not None:
            library.decide(unet, self.handle)

    def __deepcopy__(self, memo: Any) -> _Nothing:
        return _Nothing()

    def __reduce__(self) -> Any:
        return _Nothing, ()


class _Nothing:
    def __call__(self, unet: Any, args: Any) -> None:
        return None
