"""The first forward of an attached UNet, against what was stated of it: order, stages, output, rank, channels and their axis."""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from itertools import pairwise
from typing import Any

from vlmfilm_plugin.errors import HostError
from vlmfilm_plugin.film.architecture import Stage
from vlmfilm_plugin.film.layout import Layout, kind_of
from vlmfilm_plugin.film.stage_order import by_size, sizes_text
from vlmfilm_plugin.forward.axis_probe import AxisProbe
from vlmfilm_plugin.log import film_logger

_STATE = "state what is so in the host adapter's `UNet`, or in `attach(...)`; `example=` reads it off one forward"


class FirstLook:
    """Sees each block's output once, as it comes.

    Args:
        owner: the UNet's class, by name.
        stages: the blocks that carry FiLM, in the order in which they are to run.
        layouts: of each.
        is_stated: someone stated the stages; else the paths counted them.
        inputs: the spatial sizes of what the UNet was called with.
        probe: asked where channels are.
    """

    def __init__(
        self,
        owner: str,
        stages: Sequence[Stage],
        layouts: Sequence[Layout],
        *,
        is_stated: bool,
        inputs: Container[tuple[int, ...]] = (),
        probe: AxisProbe | None = None,
    ) -> None:
        self._owner, self._stages, self._layouts, self._is_stated, self._inputs, self._probe = owner, stages, layouts, is_stated, inputs, probe
        self._sizes: dict[int, tuple[int, ...]] = {}
        self._is_plain: list[bool] = []

    @property
    def is_ambiguous(self) -> bool:
        """Tell whether nobody stated the axis of the channels, and in every block another one could be meant as well."""
        return not any(self._is_plain)

    def see(self, head: int, output: Any) -> None:
        """Check one block's output.

        Raises:
            HostError: it is not what was stated, or the block runs a second time.
        """
        stage, layout = self._stages[head], self._layouts[head]
        if head in self._sizes:
            facts = {"block": stage.path, "found": "it ran twice in one forward", "expected": "once: a head acts at one place"}
            raise HostError(f"cannot modulate {self._owner}: a block runs more than once", facts, "take it out of `targets`")
        x = layout.take(output, stage.path)
        shape = tuple(x.shape)
        if x.dim() != layout.rank + 2:
            expected = f"{layout.rank + 2} dimensions: rows, channels and {layout.rank} of space"
            facts = {"block": stage.path, "found": f"a tensor {shape}, {x.dim()} dimensions", "expected": expected}
            raise HostError(f"cannot modulate {self._owner}: a block has another rank than was attached", facts, f"correct `rank`: {_STATE}")
        if shape[layout.axis] != stage.channels:
            facts = {
                "block": stage.path,
                "found": f"{kind_of(output)}: {shape[layout.axis]} at axis {layout.axis}",
                "expected": f"{stage.channels} channels at axis {layout.axis}",
            }
            raise HostError(
                f"cannot modulate {self._owner}: a block has other channels than were attached",
                facts,
                f"correct `channels` or `channel_axis`: {_STATE}",
            )
        # Of one channel, gamma and beta are one number a row wherever it is.
        self._is_plain.append(layout.is_stated or stage.channels == 1 or shape[-layout.axis] != stage.channels)
        self._sizes[head] = layout.sizes(x)
        if self._probe is not None:
            self._probe.judge(stage.path, x)

    def finish(self) -> None:
        """Check the order of the blocks, their stages, and that some block told where channels are.

        Raises:
            HostError: blocks ran in another order, blocks of a stage have different sizes, or stages one size; or it could not be told.
        """
        ran = list(self._sizes)
        if ran != sorted(ran):
            raise self._wrong("blocks ran in another order than was attached", "order")
        is_flat = not self._is_stated and set(self._sizes.values()) <= {self._sizes[ran[0]]} and self._sizes[ran[0]] in self._inputs
        if is_flat and len(ran) > 1:
            film_logger().info("[VLM] stages of %s: its blocks all have the resolution of the input, so each is a stage", self._owner)
        for before, after in pairwise(ran):
            first, second = self._sizes[before], self._sizes[after]
            is_one_stage = self._stages[before].index == self._stages[after].index
            if is_one_stage and first != second:
                raise self._wrong("the blocks of one stage have several resolutions", "stages")
            if not is_one_stage and first == second and not is_flat:
                raise self._wrong("several stages have one resolution", "stages")
            if not is_one_stage and math.prod(first) > math.prod(second):
                raise self._wrong("a stage is smaller than the one before: stage 0 is next to the bottleneck", "order")
        if self.is_ambiguous and not (self._probe is not None and self._probe.is_first):
            stage, layout = self._stages[ran[0]], self._layouts[ran[0]]
            facts = {
                "block": stage.path,
                "found": f"{stage.channels} at axis 1 and at axis -1, in each block that carries FiLM",
                "used": f"axis {layout.axis}, which nobody stated, and their convolutions do not bear out",
            }
            raise HostError(
                f"cannot tell where the channels of {self._owner} are", facts, "state `channel_axis`: 1 for (B, C, ...), -1 for (B, ..., C)"
            )

    def _wrong(self, what: str, kind: str) -> HostError:
        groups = by_size((self._stages[head].path, size) for head, size in self._sizes.items())
        facts = {
            "attached": ", ".join(f"{stage.label} ({stage.path})" for stage in self._stages),
            "ran": sizes_text(groups),
            "taken from": "what was stated" if self._is_stated else "the numbers in the paths",
        }
        if kind == "stages" and [math.prod(size) for size, _ in groups] == sorted({math.prod(size) for size, _ in groups}):
            return HostError(f"cannot modulate {self._owner}: {what}", facts, f"state `stages={[paths for _, paths in groups]}`")
        return HostError(
            f"cannot modulate {self._owner}: {what}", facts, f"correct `{'stages` or `targets' if kind == 'order' else 'stages'}`: {_STATE}"
        )
