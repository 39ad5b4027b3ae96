"""The alarm of a training whose condition no longer reaches the decoder: gamma and beta that are the same for every image.

Notes
-----
1. A wired run may die all the same: features that are alike drive bounded heads to their bounds, gradients vanish there, and the loss
   falls since the network learns by heart. A spread pooled over channels does not see it: channels differ, images do not.
2. Nothing is computed in a step. The features of the last different images are kept, by reference; at a few steps the heads of that moment
   are asked what they make of them. So batches of one image, gradient accumulation and a weight decay that moves everything alike
   change nothing about the verdict.
3. Every process asks its heads at the same steps, inside a forward: under FSDP their parameters are gathered together there.
   The first one reads the answer, one transfer for all stages, and writes.
4. A share of entries at their bound is a likely cause and no verdict: healthy runs have 80 to 90 % there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from vlmfilm_plugin.film.kept import evaluating
from vlmfilm_plugin.film.module import FilmModule
from vlmfilm_plugin.film.statistics import differing_energy
from vlmfilm_plugin.film.verdict import LASTING, NUMBERS, StageVerdict, numbers_of, verdict_of
from vlmfilm_plugin.log import film_logger, is_rank_zero
from vlmfilm_plugin.settings.parsing import WITH_STATISTICS
from vlmfilm_plugin.settings.record import Settings

READ_AT = (25, 50, 100)
"""Training steps of this process at which the heads are asked, beside every logged one."""
ENERGY_AT = (1, 2)
"""Those at which condition vectors are compared, and no head is asked, if they have not been yet: with batches of one image it takes two."""
_KEPT = 32


@dataclass(frozen=True)
class Advice:
    """What to set, in the words of who trains.

    Attributes:
        center: takes out what all features share; None where it is done already.
        unbound: lifts bounds.
        slower: trains the heads more slowly.
    """

    center: str | None
    unbound: str = "`gamma_scale: null` and `beta_scale: null`"
    slower: str = "a smaller `film_lr_scale`"

    @classmethod
    def of(cls, film: FilmModule, center: str) -> Advice:
        """Return the advice for a FiLM whose features are centred by what `center` says."""
        return cls(None if any(step in WITH_STATISTICS for step in film.architecture.feature_transform) else center)

    def text(self, *, has_bounds: bool) -> str:
        """Return it as a sentence."""
        steps = [f"{self.center}, which takes out what all features share"] if self.center else []
        steps += [f"{self.unbound}, which lift the bounds"] if has_bounds else []
        return f"Start anew with {', else '.join([*steps, self.slower])}."


class ConditionAlarm:
    """Watches the condition of one UNet, and of its copies, over training steps.

    Args:
        every: so many steps apart the heads are asked, beside `READ_AT`; None: at no other step.
        says_energy: whether to write, once, which share of the condition vectors' energy differs between images.
    """

    def __init__(self, every: int | None, *, says_energy: bool = True) -> None:
        self._every, self._says_energy = every, says_energy
        # By key; rows that have none are told apart by their values, when they are read.
        self._kept: dict[object, tuple[Tensor, int]] = {}
        self._has_keys = True
        self._steps = 0
        self._last: object = None
        self._is_energy_due = False
        self._faint_since: dict[int | str, int] = {}
        self._dead: frozenset[int | str] = frozenset()

    @classmethod
    def of(cls, settings: Settings, *, says_energy: bool = True) -> ConditionAlarm:
        """Return one that asks on logged steps, too."""
        return cls(settings.film_log_every_n_steps_train if settings.film_debug_enabled else None, says_energy=says_energy)

    def collect(self, keys: Sequence[str] | None, features: Tensor) -> None:
        """Keep the rows (S, F) of a training batch, one key a row; of an image that is kept already, the later ones.

        Args:
            keys: None where images are told apart by the values of their rows.
        """
        if self._has_keys != (keys is not None):
            self.forget()
        self._has_keys = keys is not None
        named = list(enumerate([object() for _ in features] if keys is None else keys))
        for row, key in named[-_KEPT:]:
            self._kept.pop(key, None)
            self._kept[key] = features, row
        while len(self._kept) > _KEPT:
            del self._kept[next(iter(self._kept))]

    def forget(self) -> None:
        """Let go of the rows that are kept."""
        self._kept.clear()

    def is_due(self, step: int | None = None) -> bool:
        """Count a training batch of this step, or, where no step is known, a forward; tell whether to read, the same in every process."""
        if step is not None and step == self._last:
            return False  # accumulation
        self._last = step
        self._steps += 1
        self._is_energy_due = self._says_energy and self._steps in ENERGY_AT
        return self._asks_heads or self._is_energy_due

    @property
    def step(self) -> int:
        """Return the number of the last step that was counted, from 0, or what its caller called it."""
        return self._last if isinstance(self._last, int) else self._steps - 1

    @property
    def _asks_heads(self) -> bool:
        return self._steps in READ_AT or (self._every is not None and self.step % self._every == 0)

    def read(self, film: FilmModule, advice: Advice) -> dict[int | str, StageVerdict]:
        """Ask the heads, and write what there is to say; return the verdict of each stage, nothing where it cannot be known.

        Call it where a step is due, inside a forward of the UNet.
        """
        # A head of someone's own need not be as it is in evaluation: a run that is watched is the run that is not.
        stages = {stage.key: cast(nn.Module, film.head(place)) for place, stage in enumerate(film.architecture.stages)}
        with evaluating(film):
            return self.ask(stages, film.project, advice, next(film.parameters()).device)

    def ask(
        self, heads: Mapping[int | str, nn.Module], project: Callable[[Tensor], Tensor], advice: Advice, device: torch.device
    ) -> dict[int | str, StageVerdict]:
        """Do as `read` for heads by decoder stage, which take `project` of the rows that were collected on a device."""
        kept = [features[row] for features, row in self._kept.values() if features.device == device]
        if not kept:
            return {}
        asked = dict(heads) if self._asks_heads else {}
        with torch.no_grad(), evaluating(*heads.values()):
            rows = torch.stack(kept)
            if not self._has_keys:
                rows = torch.unique(rows, dim=0)
            cond_vec = project(rows)
            numbers = [differing_energy(cond_vec), *(number for head in asked.values() for number in numbers_of(head, cond_vec))]
        if len(rows) < 2 or not is_rank_zero():
            return {}
        values: list[float] = torch.stack(numbers).tolist()
        energy, size = values[0], len(NUMBERS)
        verdicts = {stage: verdict_of(values[1 + place * size : 1 + (place + 1) * size]) for place, stage in enumerate(asked)}
        if self._says_energy:
            self._says_energy = False
            self._write_energy(energy, len(rows))
        if verdicts:
            self._write_changes(verdicts, energy, len(rows), advice)
        return verdicts

    def _write_energy(self, energy: float, images: int) -> None:
        alike = ": the features are alike, and bounded heads may reach their bounds before they tell images apart" if energy < 0.1 else ""
        film_logger().info(
            "[VLM] condition at step %s: %.1f %% of the energy of the condition vectors differs between images (%d images)%s",
            self.step,
            100 * energy,
            images,
            alike,
        )

    def _write_changes(self, verdicts: Mapping[int | str, StageVerdict], energy: float, images: int, advice: Advice) -> None:
        faint = {stage: self._faint_since.get(stage, self._steps) for stage, verdict in verdicts.items() if verdict.is_faint}
        lasting = {stage for stage, since in faint.items() if self._steps - since >= LASTING}
        same = {stage for stage, verdict in verdicts.items() if verdict.is_same}
        before, dead = self._dead, frozenset(same | lasting | (self._dead & faint.keys()))
        self._faint_since, self._dead = faint, dead
        if before - dead:
            film_logger().info("[VLM] condition at step %s: it reaches decoder %s again", self.step, _named(before - dead))
        if dead - before:
            film_logger().warning("[FILM-WARN] %s", self._words(verdicts, dead, energy, images, advice))

    def _words(self, verdicts: Mapping[int | str, StageVerdict], dead: frozenset[int | str], energy: float, images: int, advice: Advice) -> str:
        alive = frozenset(verdicts) - dead
        rest = f" (it does reach {_named(alive)})" if alive else ", at none of those that carry FiLM"
        spread = max(verdicts[stage].relative_spread for stage in dead)
        shares = [share for stage in dead for share in verdicts[stage].at_bound.values() if share is not None]
        share = sum(shares) / len(shares) if shares else 0.0
        cause = ""
        if share > 0.5:
            cause = f" Likely cause: {100 * share:.0f} % of their entries lie at their bounds (`gamma_scale`, `beta_scale`), where gradients vanish."
        return (
            f"step {self.step}: the condition no longer reaches the decoder at {_named(dead)}{rest}: gamma and beta are the same for {images} "
            f"different images (their spread between images is {spread:.1g} of their distance from the identity, and {100 * energy:.2g} % of the "
            f"condition vectors' energy differs).{cause} The loss may fall all the same. {advice.text(has_bounds=bool(shares))}"
        )


def _named(stages: frozenset[int | str]) -> str:
    numbers = ", ".join(map(str, sorted(stages, key=lambda stage: [int(part) for part in str(stage).split(".")])))
    return f"stage {numbers}" if len(stages) == 1 else f"stages {numbers}"
