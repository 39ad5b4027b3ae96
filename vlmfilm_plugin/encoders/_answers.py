"""The soft-seg port's features of answers (`use_logits_feature_cond`): Qwen2.5-VL answers three prompts in one line each, and the feature is
the score of every candidate at the place of each value: log-probabilities among the candidates, or their logits.

The questionnaire encoder asks better: each question alone, letters alone, nothing generated. This is for configurations and checkpoints of
the port, whose numbers it gives (its centring by the batch at hand apart).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from vlmfilm_plugin.encoders._frozen import Prepared, features_of
from vlmfilm_plugin.encoders._qwen_rows import last_states, logits_at
from vlmfilm_plugin.encoders._qwen_text import QwenTextEncoder
from vlmfilm_plugin.errors import EncoderError, SettingsError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from vlmfilm_plugin.settings.record import Settings

LEVELS = tuple("ABCDEFGH")
CAUSES = ("low_contrast", "motion", "overlap", "catheter", "clutter", "noise", "blur", "other")
SOURCES = ("background", "catheter", "bone", "saturation", "texture", "artifact", "blur", "other")
UNDECIDED = "unknown"

# The answer to each prompt: `name=value;name=value;name=value`, and the candidates of each value.
FORMS: tuple[Mapping[str, Sequence[str]], ...] = (
    {"continuity": LEVELS, "breaks": LEVELS, "cause": CAUSES},
    {"nonvessel": LEVELS, "fp_risk": LEVELS, "source": SOURCES},
    {"thin": LEVELS, "periphery": LEVELS, "visibility": LEVELS},
)


def check_prompts(settings: Settings) -> None:
    """Refuse other than the three prompts that the forms of the answers belong to.

    Raises:
        SettingsError: there are more or fewer.
    """
    if len(settings.prompts) != len(FORMS):
        facts = {
            "found": f"{len(settings.prompts)} prompts   (from {settings.origin('prompt_templates')})",
            "expected": "3, for answers of the forms " + ", ".join(";".join(f"{name}=.." for name in form) for form in FORMS),
        }
        raise SettingsError(
            "cannot use `use_logits_feature_cond` with these prompts", facts, "take the port's three `prompt_templates`, or `encoder: questionnaire`"
        )


class AnswerEncoder(QwenTextEncoder):
    """Encode images by the scores of the port's answers.

    Shape:
        feature: (N, F) float32, F = 74 with `logits_include_unknown`, else 72.
    """

    @property
    def feature_dim(self) -> int:
        """Return F, the candidates of all values of all answers."""
        return sum(len(candidates) for form in self.forms for candidates in form.values())

    @cached_property
    def forms(self) -> list[dict[str, Sequence[str]]]:
        """Return the candidates of each value of each answer."""
        extra = (UNDECIDED,) if self.settings.logits_include_unknown else ()
        return [{name: given if given is LEVELS else (*given, *extra) for name, given in form.items()} for form in FORMS]

    def encode_annotated(self, images: Sequence[Image]) -> tuple[Tensor, list[str]]:
        """Encode as `encode` does, and return the answers to each image, and the best candidate of each value, as one line of JSON."""
        by_prompt = [self.generate(images, prompt) for prompt in self.settings.prompts]
        rows, notes = [], []
        for image, answers in zip(images, zip(*by_prompt, strict=True), strict=True):
            scores = self.scores(image, answers)
            rows.append(self._feature(scores))
            notes.append(json.dumps({"answers": answers, "fields": self._best(answers, scores)}, ensure_ascii=False))
        return features_of(rows, self.feature_dim, "image"), notes

    def scores(self, image: Image, answers: Sequence[str]) -> list[Tensor]:
        """Return the scores of all candidates of each answer, (candidates,) each; alike for every candidate where an answer has not its form."""
        (found,) = self.run([image], lambda model, pack: [self._score(model, pack[0], answers)])
        return found

    def _score(self, model: Any, item: Prepared, answers: Sequence[str]) -> list[Tensor]:
        prompts = [self._prompt_ids(prompt) for prompt in self.settings.prompts]
        tokens = [self.tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True) for answer in answers]
        values = [_values(answer, form) for answer, form in zip(answers, self.forms, strict=True)]
        texts = [(before, [*after, *answer["input_ids"]]) for (before, after), answer in zip(prompts, tokens, strict=True)]
        states, lengths = last_states(self, model, item, texts)
        scores = []
        for row, (form, places) in enumerate(zip(self.forms, values, strict=True)):
            if places is None:
                count = sum(map(len, form.values()))
                scores.append(torch.full((count,), math.log(1 / count)))
                continue
            start = lengths[row] - len(tokens[row]["input_ids"])
            at = [start + _token_at(tokens[row]["offset_mapping"], place) - 1 for place in places]
            logits = logits_at(model, states, [row] * len(at), at)
            parts = [self._scale(line[self._first_ids(candidates)]) for line, candidates in zip(logits, form.values(), strict=True)]
            scores.append(torch.cat(parts))
        return scores

    def _scale(self, logits: Tensor) -> Tensor:
        scaled = logits / self.settings.logits_logit_temp
        return scaled if self.settings.logits_feature_mode == "logit" else scaled.log_softmax(0)

    def _first_ids(self, candidates: Sequence[str]) -> list[int]:
        return [self._first_id(candidate) for candidate in candidates]

    def _first_id(self, candidate: str) -> int:
        ids = self.tokenizer(candidate, add_special_tokens=False)["input_ids"]
        if not ids:
            facts = {"candidate": candidate, "found": "no token", "expected": "one or more"}
            raise EncoderError("cannot score answers with this tokenizer", facts, "use a published Qwen2.5-VL")
        return int(ids[0])

    def _feature(self, scores: Sequence[Tensor]) -> Tensor:
        if self.settings.logits_l2norm:
            scores = [part / (part.norm() + 1e-8) for part in scores]
        return torch.cat(list(scores))

    def _best(self, answers: Sequence[str], scores: Sequence[Tensor]) -> list[dict[str, dict[str, object]]]:
        best: list[dict[str, dict[str, object]]] = []
        for answer, form, part in zip(answers, self.forms, scores, strict=True):
            fields: dict[str, dict[str, object]] = {}
            start = 0
            for name, candidates in form.items():
                chances = part[start : start + len(candidates)].softmax(0)
                start += len(candidates)
                fields[name] = {"top": candidates[int(chances.argmax())], "top_p": round(float(chances.max()), 4)}
            best.append(fields if _values(answer, form) is not None else {})
        return best

    def _facts(self) -> dict[str, object]:
        s = self.settings
        scores = {"scores": s.logits_feature_mode, "temperature": s.logits_logit_temp, "l2norm": s.logits_l2norm, "unknown": s.logits_include_unknown}
        return {"encoder": "qwen2_5_vl", "mode": "answers", "prompt": list(s.prompts), "max_new_tokens": s.max_new_tokens, **scores}


def _values(answer: str, form: Mapping[str, Sequence[str]]) -> list[int] | None:
    """Return where each value starts in an answer, or None where it has not the form."""
    pattern = ";".join(f"{name}=({'[A-H]' if given is LEVELS else '[a-z_]+'})" for name, given in form.items())
    found = re.fullmatch(pattern, answer)
    return None if found is None else [found.start(number) for number in range(1, len(form) + 1)]


def _token_at(offsets: Sequence[Sequence[int]], place: int) -> int:
    return next(index for index, (start, end) in enumerate(offsets) if start <= place < end)
