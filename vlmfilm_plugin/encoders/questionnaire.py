"""Fixed multiple-choice questions to a frozen Qwen2.5-VL; the feature is the log-probability of every answer.

Each number has a name and a meaning, which no other feature here has. Nothing is generated: one forward an image reads all answers.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from vlmfilm_plugin.encoders import _loading as loading
from vlmfilm_plugin.encoders._frozen import OnePassEncoder, Pack, Prepared
from vlmfilm_plugin.encoders._pooling import image_tokens, token_counts
from vlmfilm_plugin.encoders._questions import Questionnaire, read_questionnaire
from vlmfilm_plugin.encoders._qwen_text import QwenModel, language_model_of
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
        device = loading.device_of(model)
        grid = item.tensors["image_grid_thw"].to(device)
        tokens = self._image_tokens(model, item.tensors["pixel_values"].to(device, model.dtype), grid)
        ids, mask, ends = self._rows(len(tokens), device)
        is_image = ids == self.config.image_token_id
        embeds = model.get_input_embeddings()(ids)
        # The same image in every row: the tower runs once for all questions.
        embeds = embeds.masked_scatter(is_image[..., None], tokens.to(embeds).repeat(len(ids), 1))
        states = language_model_of(model)(
            inputs_embeds=embeds, position_ids=_positions(model, ids, mask, is_image, grid), attention_mask=mask, use_cache=False
        ).last_hidden_state
        # One row of logits a question: those of every token would be gigabytes.
        logits = model.lm_head(states[torch.arange(len(ids), device=states.device), ends.to(states.device)]).float().cpu()
        return torch.cat([row[choices].log_softmax(0) for row, choices in zip(logits, self._candidates, strict=True)])

    def _rows(self, image_tokens: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return ids and mask (questions, length) and the last real position of each row."""
        rows = [[*before, *[self.config.image_token_id] * image_tokens, *after] for before, after in self._prompts]
        return *self._padded(rows, device), torch.tensor([len(row) - 1 for row in rows])

    def _image_tokens(self, model: Any, patches: Tensor, grid: Tensor) -> Tensor:
        tower = model.visual if hasattr(model, "visual") else model.model.visual  # moved in transformers 4.52
        return image_tokens(tower(patches, grid_thw=grid), token_counts(grid, self.config.vision_config))[0]

    def _facts(self) -> dict[str, object]:
        asked = [(question.id, self.questionnaire.prompt(question), list(question.options)) for question in self.questionnaire.questions]
        digest = hashlib.blake2b(json.dumps(asked).encode(), digest_size=8).hexdigest()
        return {"encoder": "questionnaire", "mode": "answers", "questions": digest}


def _positions(model: Any, ids: Tensor, mask: Tensor, is_image: Tensor, grid: Tensor) -> Tensor:
    """Return the positions (3, questions, length) as the model counts them for text around an image."""
    index = (model.model if hasattr(model.model, "get_rope_index") else model).get_rope_index
    # transformers 5 tells image tokens by this instead of by their id.
    types = {"mm_token_type_ids": is_image.int()} if "mm_token_type_ids" in inspect.signature(index).parameters else {}
    positions: Tensor = index(input_ids=ids, image_grid_thw=grid.expand(len(ids), -1), attention_mask=mask, **types)[0]
    return positions
