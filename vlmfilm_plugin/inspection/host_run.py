"""Inside a host's own process: wait for its first real UNet forward, note what was seen, and end the process there.

Nothing of the host is changed; torch's hooks for all modules, and for all optimizers, are what sees it. The process ends at once, as if it
were killed: an exception would be caught, and answered with a checkpoint.
"""

from __future__ import annotations

import atexit
import functools
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
import wrapt
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from vlmfilm_plugin.files import new_file
from vlmfilm_plugin.inspection.blocks import blocks_in
from vlmfilm_plugin.inspection.callers import host_callers, site_of_caller
from vlmfilm_plugin.inspection.calls import Call, CallRecorder
from vlmfilm_plugin.inspection.decoder import Decoder, find_decoder, unet_around
from vlmfilm_plugin.inspection.look import nothing_found, seen_unet
from vlmfilm_plugin.inspection.report import Inspection
from vlmfilm_plugin.inspection.sighting import Sighting, facts_of
from vlmfilm_plugin.inspection.starter import adapter_for
from vlmfilm_plugin.rows.ledger import Ledger
from vlmfilm_plugin.rows.loaders import watch_loaders

# Forwards of a UNet without a batch of a data loader: some scripts try their net on noise, count its parameters, and go on.
_MOST_TRIALS = 4
_COMPILER = "torch._dynamo"
_SECONDS_TO_BE_ENDED = 5.0


class HostRun:
    """The watch in one process.

    Args:
        result: where what was seen is written; whoever reads it ends the run.
    """

    def __init__(self, result: Path) -> None:
        self._result, self._pid = result, os.getpid()
        self._ledger = Ledger()
        self._without: WeakSet[nn.Module] = WeakSet()
        self._roots: list[Call] = []
        self._trial: Sighting | None = None
        self._trials = 0
        self._optimizers: list[str] = []
        self._files: list[str] = []
        self._raised = ""
        self._recorder = CallRecorder(self._wants, self._done, keeps_values=True)

    def start(self) -> None:
        """Begin to watch."""
        watch_loaders(self._ledger)
        self._recorder.__enter__()
        register_optimizer_step_pre_hook(self._before_update)
        self._watch(torch.optim.Optimizer, "__init__", self._note_optimizer)
        for name in ("load", "save"):
            self._watch(torch, name, functools.partial(self._note_file, f"torch.{name}"))
        self._watch(nn.Module, "load_state_dict", functools.partial(self._note_file, "load_state_dict"))
        wrapt.register_post_import_hook(lambda module: torch.compiler.set_stance("force_eager"), _COMPILER)
        before = sys.excepthook

        def excepthook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
            self._raised = f"{kind.__name__}: {error}"
            before(kind, error, trace)

        sys.excepthook = excepthook
        atexit.register(self._at_exit)

    def _watch(self, owner: Any, name: str, note: Any) -> None:
        def around(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
            note(instance, args)
            return wrapped(*args, **kwargs)

        wrapt.wrap_function_wrapper(owner, name, around)

    def _note_optimizer(self, optimizer: Any, args: Any) -> None:
        self._optimizers.append(f"{type(optimizer).__module__}.{type(optimizer).__qualname__} at {site_of_caller()}")

    def _note_file(self, what: str, instance: Any, args: Any) -> None:
        named = (
            f"({os.fspath(args[0])!r})" if args and isinstance(args[0], str | os.PathLike) else f" of {type(instance).__name__}" if instance else ""
        )
        text = f"{what}{named} at {site_of_caller()}"
        if text not in self._files:
            self._files.append(text)

    def _wants(self, module: nn.Module) -> bool:
        # A worker of a data loader may run modules too: its images, never the UNet.
        return torch.utils.data.get_worker_info() is None and module not in self._without

    def _done(self, root: Call, output: Any) -> None:
        decoder = find_decoder(root)
        if decoder is None:
            self._without.add(root.module)
            if any(True for _ in blocks_in(root)):
                self._roots.append(root)
                _forget_values(root)
            return
        sighting = self._sighting(decoder)
        _forget_values(root)
        self._trials += 1
        if self._ledger.is_used or self._trials >= _MOST_TRIALS:
            self._finish(sighting)
        self._trial = sighting

    def _sighting(self, decoder: Decoder) -> Sighting:
        unet = unet_around(decoder)
        facts = facts_of(decoder.root, unet, host_callers(), self._ledger)
        return Sighting(seen_unet(decoder, unet), type(unet.module), facts)

    def _before_update(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self._trial is not None:
            self._finish(self._trial)
        if os.getpid() == self._pid:
            self._write(self._result, self._nothing(f"before the first update of {type(optimizer).__name__}"))
            _end()

    def _finish(self, sighting: Sighting) -> None:
        seen, facts = sighting.unet, sighting.facts
        facts.optimizers, facts.files = self._optimizers, self._files
        self._write(self._result, Inspection((seen,)).as_json() | {"run": facts.as_json()} | adapter_for(sighting))
        _end()

    def _nothing(self, when: str) -> dict[str, Any]:
        text = str(nothing_found(f"the script, {when},", self._roots)) if self._roots else ""
        return {"unets": [], "when": when, "seen": text, "run": {"optimizers": self._optimizers, "files": self._files}}

    def _at_exit(self) -> None:
        if os.getpid() != self._pid or multiprocessing.parent_process() is not None:
            return
        if self._trial is not None:
            self._finish(self._trial)
        when = f"which raised {self._raised}" if self._raised else "up to its end"
        self._write(self._result.with_name(f"{self._result.name}.{self._pid}"), self._nothing(when))

    def _write(self, path: Path, content: dict[str, Any]) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        if path.exists():
            return  # another rank was first
        with new_file(path, "what was seen", force=True) as file:
            file.write(json.dumps(content).encode())


def _forget_values(root: Call) -> None:
    for call in root.walk():
        call.values = None


def _end() -> None:
    """End the process as it is: no handler of the host's writes anything any more."""
    # Whoever reads the result ends this process, and with it the one that started it: that would go on when this one has ended.
    time.sleep(_SECONDS_TO_BE_ENDED)
    for child in multiprocessing.active_children():
        child.terminate()
    os._exit(0)


_run: HostRun | None = None


def start(result: str) -> None:
    """Watch this process for its first UNet forward, once."""
    global _run
    if _run is None:
        _run = HostRun(Path(result))
        _run.start()
