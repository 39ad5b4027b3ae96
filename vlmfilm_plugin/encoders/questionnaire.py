"""Fixed multiple-choice questions to a frozen Qwen2.5-VL; the feature is the log-probability of every answer.

Each number has a name and a meaning, which no other feature here has. Nothing is generated: one forward an image reads all answers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from vlmfilm_plugin.encoders._frozen import OnePassEncoder, Pack, Prepared
from vlmfilm_plugin.encoders._questions import Questionnaire, read_questionnaire
from vlmfilm_plugin.encoders._qwen_rows import last_states, logits_at
from vlmfilm_plugin.encoders._qwen_text import QwenModel
from vlmfilm_plugin.encoders.qwen2_5_vl import read_config
from vlmfilm_plugin.errors import EncoderError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from vlmfilm_plugin.settings.record import Settings


def from_settings(settings: Settings) -> QuestionnaireEncoder:
    """Build the encoder; the questionnaire and the configuration are read, weights are not.

    Raises:
        SettingsError: the questionnaire cannot be used.
        EncoderError: the model is not found, or is not a Qwen2.5-VL.
    """
    questionnaire = read_questionnaire(settings)
    return QuestionnaireEncoder(settings, read_config(settings), questionnaire)


class QuestionnaireEncoder(QwenModel, OnePassEncoder):
    """Encode images by the answers of the whole frozen model to fixed questions.

    Args:
        settings: model, dtype, device and preprocessing.
        config: the model's configuration, read already.
        questionnaire: what is asked about every image.

    Shape:
        feature: (N, F) float32, F = all options of all questions; log-probabilities <= 0, normalised within each question.
    """

    def __init__(self, settings: Settings, config: Any, questionnaire: Questionnaire) -> None:
        super().__init__(settings, config)
        self.questionnaire = questionnaire

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the name of each number of a feature: `contrast=A`."""
        return self.questionnaire.columns

    @property
    def feature_dim(self) -> int:
        """Return F, the number of options of all questions."""
        return len(self.columns)

    def encode_annotated(self, images: Sequence[Image]) -> tuple[Tensor, list[str]]:
        """Encode as `encode` does, and return the best answers to each image (see `note`)."""
        features = self.encode(images)
        return features, [self.note(row) for row in features]

    def note(self, feature: Tensor) -> str:
        """Return the best answer to each question as one line of JSON: {"contrast": "B: moderate", ...}.

        Shape:
            feature: (F,)
        """
        answers, start = {}, 0
        for question in self.questionnaire.questions:
            letter = list(question.options)[int(feature[start : start + len(question.options)].argmax())]
            answers[question.id] = f"{letter}: {question.options[letter]}"
            start += len(question.options)
        return json.dumps(answers, ensure_ascii=False)

    @cached_property
    def _prompts(self) -> list[tuple[list[int], list[int]]]:
        """Per question the token ids before and after those of the image."""
        return [self._prompt_ids(self.questionnaire.prompt(question)) for question in self.questionnaire.questions]

    @cached_property
    def _candidates(self) -> list[list[int]]:
        """Per question the token id of each letter."""
        return [[self._letter_id(letter) for letter in question.options] for question in self.questionnaire.questions]

    def _letter_id(self, letter: str) -> int:
        ids = self.tokenizer(letter, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            facts = {"letter": letter, "found": f"{len(ids)} tokens", "expected": "one token"}
            raise EncoderError("cannot read answers by letter with this tokenizer", facts, "use a published Qwen2.5-VL")
        return int(ids[0])

    def _features(self, model: Any, pack: Pack) -> list[Tensor]:
        return [self._log_probabilities(model, item) for item in pack]

    def _log_probabilities(self, model: Any, item: Prepared) -> Tensor:
        states, lengths = last_states(self, model, item, self._prompts)
        logits = logits_at(model, states, range(len(lengths)), [length - 1 for length in lengths])
        return torch.cat([row[choices].log_softmax(0) for row, choices in zip(logits, self._candidates, strict=True)])

    def _facts(self) -> dict[str, object]:
        asked = [(question.id, self.questionnaire.prompt(question), list(question.options)) for question in self.questionnaire.questions]
        digest = hashlib.blake2b(json.dumps(asked).encode(), digest_size=8).hexdigest()
        return {"encoder": "questionnaire", "mode": "answers", "questions": digest}
