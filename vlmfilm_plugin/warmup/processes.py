"""The processes of a warm-up: which share of the images each takes, its progress bar, and the reports of all.

Owns accelerate's process state and tqdm; both are imported only where they are needed.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

Item = TypeVar("Item")

# A process that has finished waits for the others, however long their share takes.
_PATIENCE = timedelta(days=30)


@dataclass
class WarmupReport:
    """What a warm-up did: images asked for, features that were there, features encoded, and (path, error) of each image that failed."""

    total: int = 0
    hits: int = 0
    encoded: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0
    stores: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain values."""
        failures = [{"path": path, "error": error} for path, error in self.failures]
        return {**vars(self), "failures": failures, "failed": len(failures)}

    @classmethod
    def from_json(cls, text: bytes) -> WarmupReport:
        """Return the report whose fields `text` holds."""
        values = json.loads(text)
        return cls(**{**values, "failures": [(path, error) for path, error in values["failures"]]})

    def merged(self, others: Sequence[WarmupReport]) -> WarmupReport:
        """Return the sum of this and other ranks' reports; they ran at the same time."""
        parts = [self, *others]
        return WarmupReport(
            sum(part.total for part in parts),
            sum(part.hits for part in parts),
            sum(part.encoded for part in parts),
            sorted(failure for part in parts for failure in part.failures),
            max(part.seconds for part in parts),
            sorted({store for part in parts for store in part.stores}),
        )


@dataclass(frozen=True)
class Ranks:
    """This process among those of a launcher: `index` of `count`, `local` on its machine."""

    index: int = 0
    count: int = 1
    local: int = 0
    is_owner: bool = False

    @classmethod
    def join(cls) -> Ranks:
        """Join the processes that `torchrun` or `accelerate launch` started; alone where nothing did."""
        if int(os.environ.get("WORLD_SIZE") or 1) <= 1:
            return cls()
        import torch
        from accelerate import PartialState

        is_owner = not torch.distributed.is_initialized()
        # Gloo also beside GPUs: a few short reports are all that is exchanged.
        state = PartialState(cpu=not torch.cuda.is_available(), backend="gloo", timeout=_PATIENCE) if is_owner else PartialState()
        return cls(state.process_index, state.num_processes, state.local_process_index, is_owner)

    def share(self, items: Sequence[Item]) -> list[Item]:
        """Return this process's share, every `count`-th item: large and small images are spread alike."""
        return list(items[self.index :: self.count])

    def device(self, device_map: str | None) -> str | None:
        """Return the one device that an encoder placed by `auto` shall use beside others, or None to leave it."""
        import torch

        return f"cuda:{self.local}" if self.count > 1 and device_map == "auto" and torch.cuda.is_available() else None

    def others(self, mine: WarmupReport) -> list[WarmupReport]:
        """Exchange reports with every process, once all have come here; return the others'.

        A process that left earlier with an exit code other than 0 would make the launcher end the others.
        """
        if self.count == 1:
            return []
        if self.is_owner:
            gathered = self._gather_and_leave(mine)
        else:
            from accelerate.utils import gather_object

            gathered = gather_object([mine])
        return [report for index, report in enumerate(gathered) if index != self.index]

    def _gather_and_leave(self, mine: WarmupReport) -> list[WarmupReport]:
        """Gather all reports over the group that this process made, and end that group.

        Every tensor of the exchange is kept until the group has ended. A thread of gloo lets go of them some time after the exchange; where
        it is the last, it needs the lock of Python, which the end of the group holds while it waits for that thread (torch 2.5 hangs so).
        """
        import torch
        from accelerate import PartialState
        from torch import distributed

        content = torch.tensor(list(json.dumps(vars(mine)).encode()), dtype=torch.uint8)
        size = torch.tensor([len(content)])
        sizes = [torch.zeros_like(size) for _ in range(self.count)]
        distributed.all_gather(sizes, size)
        padded = torch.zeros(int(max(sizes)), dtype=torch.uint8)
        padded[: len(content)] = content
        contents = [torch.zeros_like(padded) for _ in range(self.count)]
        distributed.all_gather(contents, padded)
        distributed.destroy_process_group()
        PartialState._reset_state()
        return [WarmupReport.from_json(bytes(text[: int(length)].tolist())) for text, length in zip(contents, sizes, strict=True)]


class WarmupProgress:
    """A tqdm bar on stderr: images a second, hits, misses, time left; one line a process."""

    def __init__(self, ranks: Ranks, total: int, is_shown: bool) -> None:
        self._name = "warmup" if ranks.count == 1 else f"warmup rank {ranks.index}/{ranks.count}"
        self._position, self._total, self._is_shown = ranks.local, total, is_shown
        self._counts = {"hits": 0, "misses": 0, "failed": 0}
        self._bar: Any = None

    def __enter__(self) -> WarmupProgress:
        from tqdm import tqdm

        self._bar = tqdm(
            total=self._total,
            desc=self._name,
            unit="image",
            position=self._position,
            file=sys.stderr,
            mininterval=0.5,
            disable=not self._is_shown,
        )
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._bar.close()

    def add(self, *, hits: int = 0, encoded: int = 0, failed: int = 0) -> None:
        """Count images that were there, that were encoded, and that failed; the last two are the misses."""
        self._counts["hits"] += hits
        self._counts["misses"] += encoded + failed
        self._counts["failed"] += failed
        self._bar.set_postfix(self._counts, refresh=False)
        self._bar.update(hits + encoded + failed)
