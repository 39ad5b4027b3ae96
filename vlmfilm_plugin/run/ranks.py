"""The processes of a distributed run, as far as they must agree on a value; alone, each function is that of one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch.distributed

T = TypeVar("T")


def place() -> tuple[int, int]:
    """Return the number of this process and how many there are."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def of_first(make: Callable[[], T]) -> T:
    """Return what `make` returns in the first process; all processes must call this. What it raises there is raised in every process."""
    rank, count = place()
    if count == 1:
        return make()
    held: list[tuple[T | None, Exception | None]] = [(None, None)]
    if rank == 0:
        try:
            held = [(make(), None)]
        except Exception as error:  # the others wait for an answer
            held = [(None, error)]
    torch.distributed.broadcast_object_list(held, src=0)
    made, failure = held[0]
    if failure is not None:
        raise failure
    return made  # type: ignore[return-value]


def gathered(make: Callable[[], T]) -> Sequence[T]:
    """Return what `make` returns in each process, in their order; all processes must call this. What it raises anywhere is raised everywhere."""
    _, count = place()
    if count == 1:
        return [make()]
    mine: tuple[T | None, Exception | None]
    try:
        mine = (make(), None)
    except Exception as error:  # the others wait for an answer
        mine = (None, error)
    held: list[tuple[T | None, Exception | None]] = [(None, None)] * count
    torch.distributed.all_gather_object(held, mine)
    for _, failure in held:
        if failure is not None:
            raise failure
    return [made for made, _ in held]  # type: ignore[misc]
