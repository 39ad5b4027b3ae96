"""Which sample became which row of a collated batch, proved from their values; what cannot be proved is nobody's.

A collate function may drop, sort, flatten or repeat samples: counting proves nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from vlmfilm_plugin.rows.leaves import FEW, LeafPath, leaves, plain, some_values, values_of_rows

# Of each row, the samples it may be.
_Candidates = list[set[int]]
# The leaves of one place in all samples: (sample, leaf), in order.
_Column = list[tuple[int, Any]]


def prove_rows(samples: Sequence[Any], batch: Any, *, is_in_order: bool, is_full: bool) -> dict[LeafPath, tuple[int | None, ...]]:
    """Return which sample each row of the batch's tensors is.

    A leaf of the batch counts where every row of it is a row of the samples' leaves of the same place, else of any place; all leaves with
    as many rows must agree. A row that two samples fit (constant masks, say) is told by exclusion where the batch is a permutation of them.

    Args:
        is_in_order: whether the collate function is known to stack the samples in order; that decides between samples which look alike.
        is_full: compare every value; else some of each row.

    Returns:
        By place of a tensor, the sample of each of its rows, or None where that is not proved. Tensors of which nothing is known are left out.
    """
    columns = _columns(samples)
    found: dict[int, dict[LeafPath, _Candidates]] = defaultdict(dict)
    named = set()
    for path, leaf in leaves(batch):
        rows = _row_count(leaf)
        if rows and (candidates := _candidates(leaf, path, columns, is_full=is_full)) is not None:
            found[rows][path] = candidates
            if isinstance(plain(leaf), Tensor):
                named.add(path)
    proved: dict[LeafPath, tuple[int | None, ...]] = {}
    for rows, group in found.items():
        agreed: _Candidates = [set.intersection(*(candidates[row] for candidates in group.values())) for row in range(rows)]
        resolved = _resolve(agreed, len(samples), is_in_order=is_in_order)
        proved.update({path: resolved for path in group if path in named})
    return proved


def _columns(samples: Sequence[Any]) -> dict[LeafPath, _Column]:
    columns: dict[LeafPath, _Column] = defaultdict(list)
    for number, sample in enumerate(samples):
        for path, leaf in leaves(sample):
            # A sample that is a list (of crops, say) is flattened by its collate function.
            columns[path[1:] if isinstance(sample, list) and path else path].append((number, leaf))
    return columns


def _row_count(leaf: Any) -> int:
    if isinstance(leaf, list | tuple):
        return len(leaf)
    tensor = plain(leaf)
    return tensor.shape[0] if tensor is not None and tensor.dim() and tensor.numel() else 0


def _candidates(leaf: Any, path: LeafPath, columns: dict[LeafPath, _Column], *, is_full: bool) -> _Candidates | None:
    """Return the samples that each row may be, or None where a row is no sample's."""
    if path in columns:
        return _match(leaf, columns[path], is_full=is_full)
    matches = [match for column in columns.values() if (match := _match(leaf, column, is_full=is_full)) is not None]
    return [set.union(*(match[row] for match in matches)) for row in range(len(matches[0]))] if matches else None


def _match(leaf: Any, column: _Column, *, is_full: bool) -> _Candidates | None:
    tensor = plain(leaf)
    if tensor is None or tensor.dim() == 1:
        values = list(leaf) if tensor is None else tensor.tolist()
        return _look_up(values, [(number, _scalar(item)) for number, item in column])
    rows: dict[torch.Size, list[tuple[int, Tensor]]] = {tensor.shape[1:]: []}
    for number, item in column:
        held = plain(item)
        if held is not None and held.shape == tensor.shape[1:]:
            rows[held.shape].append((number, held))
    fitting = rows[tensor.shape[1:]]
    if not fitting:
        return None
    # In the batch's type: collate functions make float32 of float64.
    known = _texts_of(torch.stack([some_values(held, FEW) for _, held in fitting]).to(tensor.dtype))
    candidates = _look_up(_texts_of(values_of_rows(tensor, FEW)), list(zip((number for number, _ in fitting), known, strict=True)))
    if candidates is None or not is_full:
        return candidates
    whole = [{number for number, held in fitting if number in each and _is_equal(tensor[row], held)} for row, each in enumerate(candidates)]
    return whole if all(whole) else None


def _look_up(rows: Sequence[Hashable], known: Sequence[tuple[int, Hashable]]) -> _Candidates | None:
    numbers: dict[Hashable, set[int]] = defaultdict(set)
    for number, value in known:
        numbers[value].add(number)
    found = [numbers.get(value, set()) for value in rows]
    return found if all(found) else None


def _scalar(item: Any) -> Hashable:
    tensor = plain(item)
    if tensor is not None:
        return tensor.item() if tensor.numel() == 1 else None
    return None if isinstance(item, list | tuple) else item


def _texts_of(values: Tensor) -> list[bytes]:
    """Return the rows of (R, K) as bytes; NumPy has no bfloat16."""
    array = (values.float() if values.dtype == torch.bfloat16 else values).cpu().numpy()
    return [row.tobytes() for row in array]


def _is_equal(row: Tensor, held: Tensor) -> bool:
    wanted = held.to(row.dtype)
    # NaN in an image is a NaN in its row, too.
    return torch.equal(row, wanted) or bool(((row == wanted) | ((row != row) & (wanted != wanted))).all())


def _resolve(candidates: _Candidates, samples: int, *, is_in_order: bool) -> tuple[int | None, ...]:
    rows: list[int | None] = [next(iter(each)) if len(each) == 1 else None for each in candidates]
    if len(rows) == samples and None in rows:
        if is_in_order and all(row in each for row, each in enumerate(candidates)):
            return tuple(range(samples))
        while True:
            taken = {row for row in rows if row is not None}
            news = [(row, each - taken) for row, each in enumerate(candidates) if rows[row] is None and len(each - taken) == 1]
            if not news or len({next(iter(each)) for _, each in news}) < len(news):
                break
            for row, each in news:
                rows[row] = next(iter(each))
    return tuple(rows)
