"""Watch what trains and what runs in an activated process: one that was asked to be FiLM stops before its first update without it.

Imports torch when it is there, never before. Knows neither hosts nor settings; what is wrong is said by who asks for the watch.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from vlmfilm_plugin.errors import VlmFilmError
from vlmfilm_plugin.hosts.import_watch import when_ready
from vlmfilm_plugin.log import say

if TYPE_CHECKING:
    from torch.optim import Optimizer

# Networks of these packages are encoders, metrics or losses: a process that runs them alone has no decoder to steer.
_NO_HOSTS = frozenset({"lpips", "open_clip", "sentence_transformers", "timm", "torchmetrics", "torchvision", "transformers", "vlmfilm_plugin"})


class TrainingWatch:
    """The watch of one process.

    Args:
        is_attached: tells whether FiLM is in any module of this process, the host's own included.
        has_existed: tells whether it ever was, in no time.
        refusal: what is wrong where it is not, asked for at the first update with a description of the optimizer.
        check: judges an optimizer where it is; raises where FiLM does not train. Called before each update until it returns True.
        is_strict: False says what is wrong once and lets the process go on.

    Attributes:
        network: the class of a network that ran while FiLM was in none, or None.
        has_refused: whether an update was refused.
    """

    def __init__(
        self,
        is_attached: Callable[[], bool],
        has_existed: Callable[[], bool],
        refusal: Callable[[str], VlmFilmError],
        check: Callable[[Optimizer], bool],
        *,
        is_strict: bool,
    ) -> None:
        self._is_attached, self._has_existed, self._refusal, self._check, self._is_strict = is_attached, has_existed, refusal, check, is_strict
        self.network: str | None = None
        self.has_refused = False
        self._judged: WeakSet[Any] = WeakSet()
        self._seen: set[type] = set()
        self._forward: Any = None
        self._has_seen_enough = False
        self._is_compiling: Callable[[], bool] = lambda: False
        self._parameter: type = object

    def start(self) -> None:
        """Watch from the moment on in which torch is imported."""
        when_ready("torch", self._install)

    def stop_watching_networks(self) -> None:
        """Look at no forward any more: it is known what runs, and each call of a module would cost a little."""
        self._has_seen_enough = True
        if self._forward is not None:
            self._forward.remove()
            self._forward = None

    def _install(self, torch: ModuleType) -> None:
        from torch.nn import Parameter
        from torch.nn.modules.module import register_module_forward_pre_hook
        from torch.optim.optimizer import register_optimizer_step_pre_hook

        self._is_compiling, self._parameter = torch.compiler.is_compiling, Parameter

        def at_trace() -> int:
            self._judge(None)
            return 0

        # What `torch.compiler.assume_constant_result` marks, which imports dynamo: called for real while a compiled step is traced.
        at_trace._dynamo_marked_constant = True  # type: ignore[attr-defined]

        def before_update(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            if self._is_compiling():
                at_trace()
            elif optimizer not in self._judged:
                self._judge(optimizer)

        register_optimizer_step_pre_hook(before_update)
        if not self._has_seen_enough:
            self._forward = register_module_forward_pre_hook(self._before_forward)

    def _judge(self, optimizer: Optimizer | None) -> None:
        """Judge an update that is about to happen, of an unknown optimizer while it is compiled."""
        if optimizer is not None and not self._trains_modules(optimizer):
            self._judged.add(optimizer)
            return
        if self._is_attached():
            try:
                is_known = optimizer is not None and self._check(optimizer)
            except VlmFilmError as error:
                if self._is_strict:
                    raise
                say(f"WARNING: {error}")
                is_known = True
            if is_known:
                self._judged.add(optimizer)
            return
        self.has_refused = True
        refusal = self._refusal("an optimizer in compiled code" if optimizer is None else _described(optimizer))
        text = f"{type(refusal).__name__}: {refusal}"
        if not self._is_strict:
            say(f"WARNING: {text}")
            self._judged.add(optimizer)
            return
        sys.stdout.flush()
        if threading.current_thread() is not threading.main_thread():
            # A thread swallows SystemExit without a word.
            raise refusal
        # No exception that a host's loop may catch: the run would go on with its next batch.
        raise SystemExit(f"vlmfilm: {text}") from refusal

    def _trains_modules(self, optimizer: Optimizer) -> bool:
        return any(isinstance(parameter, self._parameter) for group in optimizer.param_groups for parameter in group["params"])

    def _before_forward(self, module: Any, args: Any) -> None:
        if self._is_compiling() or type(module) in self._seen:
            return
        if self._has_existed():
            self.stop_watching_networks()
            return
        module = getattr(module, "_orig_mod", module)
        package = type(module).__module__.partition(".")[0]
        if package != "torch":
            self._seen.add(type(module))
        if package not in _NO_HOSTS and _is_convolutional(module):
            self.network = f"{type(module).__module__}.{type(module).__qualname__}"
            self.stop_watching_networks()


def _is_convolutional(network: Any) -> bool:
    """Tell whether a network has two spatial convolutions of its own at least, as a segmentation network does and a wrapped encoder does not."""
    from torch.nn.modules.conv import _ConvNd

    found, waiting = 0, [network]
    while waiting and found < 2:
        module = waiting.pop()
        if type(module).__module__.partition(".")[0] in _NO_HOSTS:
            continue
        found += isinstance(module, _ConvNd) and max(module.kernel_size) > 1
        waiting.extend(module.children())
    return found >= 2


def _described(optimizer: Optimizer) -> str:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return f"{type(optimizer).__name__} over {len(parameters)} parameters"
