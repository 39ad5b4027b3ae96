"""One UNet forward, as a spatial gate sees it, and where that forward's masks come from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from vlmfilm_plugin.errors import ConditionError
from vlmfilm_plugin.settings.junctions import JunctionGating


class MaskReader(Protocol):
    """Where a host holds the masks of one forward, each (R, 1, H, W) in [0, 1] or, of the truth, one a sample."""

    def state(self) -> Tensor:
        """Return the mask in the UNet's input."""

    def prediction(self) -> Tensor:
        """Return the mask that the UNet predicts: its forward is run once more, without a gate."""

    def truth(self, batch: Any) -> Tensor:
        """Return the ground truth of a batch (B, 1, H, W)."""


@dataclass(frozen=True)
class GateView:
    """One UNet forward, as a gate sees it.

    Attributes:
        x: the UNet's input (R, C, H, W): the current state of the mask, noise at the start of a solver.
        image: the condition image (R, C, H, W), or None.
        batch: the running batch of the host, or None where a caller gave the condition.
        phase: `train`, `val`, `test` or `predict`, or None likewise.
        rows: (R,) the sample of each row, or None where row i is sample i.
        samples: B, the samples of the running batch, or None.
        epoch: of the run, or None.
        junctions: the settings of `vessel_junctions`.
        masks: where this host holds its masks, or None.
    """

    x: Tensor
    image: Tensor | None
    batch: Any = None
    phase: str | None = None
    rows: Tensor | None = None
    samples: int | None = None
    epoch: int | None = None
    junctions: JunctionGating = field(default_factory=lambda: JunctionGating(enabled=True))
    masks: MaskReader | None = None

    def state(self) -> Tensor:
        """Return the mask in the UNet's input (R, 1, H, W); a host adapter says where it is.

        Raises:
            ConditionError: none does.
        """
        return self._known("state").state()

    def prediction(self) -> Tensor:
        """Return the mask (R, 1, H, W) that the UNet predicts here, in [0, 1]; one more forward of it, without gradients.

        Raises:
            ConditionError: the host adapter does not say what of the output is the mask.
        """
        return self._known("pred").prediction()

    def truth(self) -> Tensor:
        """Return the ground truth of the running batch (B, 1, H, W).

        Raises:
            ConditionError: the host adapter does not say where it is.
        """
        return self._known("gt").truth(self.batch)

    def _known(self, source: str) -> MaskReader:
        if self.masks is None:
            facts = {"source": source, "found": "a forward whose UNet is not known", "expected": "the call of an attached UNet"}
            raise ConditionError("cannot find the mask for a spatial gate", facts, "call the UNet, or give the gate itself")
        return self.masks
