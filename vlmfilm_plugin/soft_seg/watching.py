"""The alarm of a model that applies FiLM by hand: what `apply_vlm_film` shows it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vlmfilm_plugin.film.alarm import Advice, ConditionAlarm
from vlmfilm_plugin.forward.recompute import NO_TASK, graph_task
from vlmfilm_plugin.soft_seg.call import Call

_ADVICE = Advice(
    "`VLMConditioner(feature_transform='center')` and its `fit` before the first step",
    "heads with `gamma_scale=None` and `beta_scale=None`",
    "a smaller learning rate for the heads",
)


class Watch:
    """Watches the heads of one model over its training forwards, of which a call of a stage that has been called begins the next."""

    def __init__(self) -> None:
        self._alarm = ConditionAlarm(None, says_energy=False)
        self._called: set[int] = set()

    def see(self, call: Call, cond_vec: Tensor, heads: Mapping[int | str, nn.Module], stage: int) -> None:
        """Note the call of a stage that a training conditions on cond_vec (B, D); what is run again in backward() is none.

        Without keys in `_dbg` images are told apart inside a batch alone: what one image is projected to changes with every step.
        """
        if not (call.is_training and torch.is_grad_enabled()) or graph_task() != NO_TASK:
            return
        if stage in self._called:
            self._called.clear()
        is_first = not self._called
        self._called.add(stage)
        if not is_first:
            return
        keys = call.keys(cond_vec.shape[0])
        if keys is None:
            self._alarm.forget()
        self._alarm.collect(keys, cond_vec.detach())
        if self._alarm.is_due(call.step):
            self._alarm.ask(heads, lambda rows: rows, _ADVICE, cond_vec.device)
