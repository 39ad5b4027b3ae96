"""Which sample of the running batch each row of a UNet forward belongs to, as the host adapter maps them. Knows no features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmfilm_plugin.errors import ConditionError
from vlmfilm_plugin.host_spec import RowMap, RowView


class RowIndex:
    """The rows of the UNet forwards of one batch; the host adapter's map is asked once for each kind of forward.

    Args:
        rows: the host adapter's map.
        phase: `train`, `val`, `test` or `predict`.
        image: the batch's images (B, C, H, W).
    """

    def __init__(self, rows: RowMap, phase: str, image: Tensor) -> None:
        self._rows, self._phase, self._image = rows, phase, image
        self._known: dict[tuple[int, torch.device], Tensor | None] = {}
        self._mapped_condition: Tensor | None = None
        self._first: tuple[Tensor, list[int]] | None = None

    def of(self, x: Tensor, condition: Tensor | None) -> Tensor | None:
        """Return the sample of each row (R,), or None where row i is sample i.

        Args:
            x: the UNet's input (R, ...).
            condition: the condition image of the forward (R, C, h, w), or None.

        Raises:
            ConditionError: the map cannot tell, or names a sample that does not exist.
        """
        samples, rows = self._image.shape[0], x.shape[0]
        key = (rows, x.device)
        # The map of a batch of several may depend on the content of the condition image, which an ODE solver passes again and again.
        is_known = key in self._known and (samples == 1 or condition is self._mapped_condition)
        if not is_known:
            mapping: Any = self._rows(RowView(self._phase, samples, rows, self._image, condition, self._first))
            if mapping is None or len(mapping) != rows or (rows and not 0 <= min(mapping) <= max(mapping) < samples):
                raise self._unmapped(samples, rows)
            is_identity = list(mapping) == list(range(samples))
            self._known[key] = None if is_identity else torch.tensor(list(mapping), dtype=torch.long, device=x.device)
            self._mapped_condition = condition
            if self._first is None and condition is not None:
                self._first = condition, list(mapping)
        return self._known[key]

    def _unmapped(self, samples: int, rows: int) -> ConditionError:
        return ConditionError(
            "cannot tell which sample each row of this UNet forward belongs to",
            {
                "phase": self._phase,
                "rows": rows,
                "samples": samples,
                "expected": "rows that repeat the samples in order (training), or one sample a batch (sliding windows)",
            },
            "evaluate with batch size 1, or give the rows' own condition: `with handle.condition(features=...)`",
        )
