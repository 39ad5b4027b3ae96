"""Answers to fixed questions as a feature, with a real tiny Qwen2.5-VL; and what is refused in a questionnaire."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_encoders import noise
from transformers import Qwen2_5_VLForConditionalGeneration

from vlmfilm_plugin.encoders._questions import LETTERS, read_questionnaire, shipped
from vlmfilm_plugin.encoders.base import AnnotatedEncoder, encode_annotated
from vlmfilm_plugin.encoders.questionnaire import QuestionnaireEncoder
from vlmfilm_plugin.encoders.registry import build_encoder
from vlmfilm_plugin.errors import EncoderError, SettingsError
from vlmfilm_plugin.settings.layers import resolve

SIZES = ((64, 64), (200, 90), (30, 30), (64, 64))
TWO = """
questions:
  - {id: contrast, text: 'How strong?', options: {A: weak, B: strong}}
  - {id: side, text: 'A much longer question: which side of the image holds more?', options: {A: left, B: right, C: "no side"}}
"""


def _encoder(folder: Path | str, **values: object) -> QuestionnaireEncoder:
    encoder = build_encoder(resolve([("arguments", {"encoder": "questionnaire", "model_name": str(folder), **values})]))
    assert isinstance(encoder, QuestionnaireEncoder)
    return encoder


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    return noise(SIZES)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def to_file(text: str) -> Path:
        (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
        return tmp_path / "mine.yaml"

    return to_file


def _by_plain_forwards(encoder: QuestionnaireEncoder, folder: Path, image: Image.Image) -> torch.Tensor:
    """Return the feature of an image by one ordinary forward of the whole model a question: no batch, no padding."""
    model: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).eval()
    inputs = encoder.image_processor(images=[image], return_tensors="pt")
    found = []
    for question in encoder.questionnaire.questions:
        before, after = encoder._prompt_ids(encoder.questionnaire.prompt(question))
        row = torch.tensor([[*before, *[encoder.config.image_token_id] * int(inputs["image_grid_thw"].prod() // 4), *after]])
        types = (row == encoder.config.image_token_id).int()
        with torch.no_grad():
            logits = model(input_ids=row, attention_mask=torch.ones_like(row), mm_token_type_ids=types, **inputs).logits[0, -1]
        letters = [encoder.tokenizer.convert_tokens_to_ids(letter) for letter in question.options]
        found.append(logits[letters].log_softmax(0))
        model.model.rope_deltas = None
    return torch.cat(found)


@pytest.mark.parametrize("name", ["angiography", "general"])
def test_answers_equal_those_of_plain_forwards(name: str, tiny_qwen: Path, images: list[Image.Image]) -> None:
    encoder = _encoder(tiny_qwen, questionnaire=name)
    features = encoder.encode(images)
    assert features.shape == (len(images), encoder.feature_dim) and features.dtype == torch.float32
    for image, feature in zip(images[:3], features, strict=False):
        torch.testing.assert_close(feature, _by_plain_forwards(encoder, tiny_qwen, image), atol=1e-5, rtol=1e-5)


def test_batched_and_one_by_one_are_the_same(tiny_qwen: Path, images: list[Image.Image]) -> None:
    together = _encoder(tiny_qwen).encode(images)
    alone = torch.cat([_encoder(tiny_qwen, max_patches_per_batch=1).encode([image]) for image in images])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_an_answer_does_not_depend_on_the_other_questions(tiny_qwen: Path, images: list[Image.Image], write: Callable[[str], Path]) -> None:
    both = _encoder(tiny_qwen, questionnaire=str(write(TWO))).encode(images)
    one = _encoder(tiny_qwen, questionnaire=str(write("\n".join(TWO.strip().splitlines()[:2])))).encode(images)
    torch.testing.assert_close(both[:, :2], one, atol=1e-5, rtol=1e-5)


def test_probabilities_of_a_question_sum_to_one_and_depend_on_the_image(tiny_qwen: Path, images: list[Image.Image]) -> None:
    encoder = _encoder(tiny_qwen)
    features, start = encoder.encode(images), 0
    for question in encoder.questionnaire.questions:
        torch.testing.assert_close(features[:, start : start + len(question.options)].exp().sum(1), torch.ones(len(images)))
        start += len(question.options)
    assert start == encoder.feature_dim and features[:3].std(0).min() > 0 and torch.equal(features[0] == features[1], torch.zeros(start).bool())


def test_one_forward_an_image_and_the_tower_once(tiny_qwen: Path, images: list[Image.Image]) -> None:
    encoder, counts = _encoder(tiny_qwen), {"tower": 0, "language": 0}

    def counter(name: str) -> Callable[..., None]:
        return lambda *_: counts.update({name: counts[name] + 1})

    with encoder.using_module() as model:
        model.model.visual.register_forward_pre_hook(counter("tower"))  # type: ignore[union-attr]
        model.model.language_model.register_forward_pre_hook(counter("language"))  # type: ignore[union-attr]
        model.generate = lambda *_, **__: pytest.fail("text was generated")  # type: ignore[assignment]
    encoder.encode(images)
    assert counts == {"tower": len(images), "language": len(images)}


def test_columns_name_every_number_and_the_note_is_the_best_answer(tiny_qwen: Path, images: list[Image.Image], write: Callable[[str], Path]) -> None:
    encoder = _encoder(tiny_qwen, questionnaire=str(write(TWO)))
    assert encoder.columns == ("contrast=A", "contrast=B", "side=A", "side=B", "side=C") and encoder.feature_dim == 5
    assert encoder.note(torch.tensor([-2.0, -0.1, -5.0, -3.0, -0.2])) == '{"contrast": "B: strong", "side": "C: no side"}'
    features, notes = encode_annotated(encoder, images)
    assert notes == [encoder.note(row) for row in features] and all("\n" not in note and json.loads(note) for note in notes)
    assert isinstance(encoder, AnnotatedEncoder) and torch.equal(features, encoder.encode(images))


def test_building_reads_no_weights_and_no_images_give_no_features(tiny_qwen: Path) -> None:
    encoder = _encoder(tiny_qwen)
    assert encoder.feature_dim == len(encoder.columns) and encoder.identity.fingerprint.startswith("questionnaire-") and not encoder.is_loaded
    assert encode_annotated(encoder, [])[0].shape == (0, encoder.feature_dim)


def test_identity_follows_the_questions_and_not_their_file(tiny_qwen: Path, write: Callable[[str], Path], tmp_path: Path) -> None:
    def fingerprint(**values: object) -> str:
        return _encoder(tiny_qwen, **values).identity.fingerprint

    copied = tmp_path / "angiography copy.yaml"
    copied.write_text(shipped()["angiography"].read_text(encoding="utf-8"), encoding="utf-8")
    assert fingerprint() == fingerprint(questionnaire=str(copied)) == fingerprint(dtype="bfloat16", device_map="cpu")
    changes = [TWO, TWO.replace("strong}", "fair}"), TWO.replace("How strong?", "How weak?"), TWO + "instruction: Say a letter.\n"]
    found = {fingerprint(questionnaire=str(write(text))) for text in changes} | {fingerprint(), fingerprint(questionnaire="general")}
    assert len(found) == 6


def test_the_shipped_ones_are_well_formed() -> None:
    assert sorted(shipped()) == ["angiography", "general"]
    for name in shipped():
        questionnaire = read_questionnaire(resolve([("arguments", {"questionnaire": name})]))
        assert 6 <= len(questionnaire.questions) <= 8 and len(set(questionnaire.columns)) == len(questionnaire.columns)


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("", "the file"),
        ("[1, 2]", "the file"),
        ("questions: {", "line 1"),
        ("questions: []", "questions"),
        ("questions: [1]", "question 1"),
        (TWO + "extra: 1\n", "the file"),
        (TWO + "instruction: 3\n", "instruction"),
        (TWO.replace("id: side", "id: contrast"), "question 2"),
        (TWO.replace("id: side", "id: Side!"), "question 2, id"),
        (TWO.replace("text: 'How strong?', ", ""), "question 1"),
        (TWO.replace("A: weak, ", ""), "question 1 (contrast), options"),
        (TWO.replace("A: weak, B: strong", "B: weak, A: strong"), "question 1 (contrast), options"),
        (TWO.replace("A: weak, B: strong", "A: weak, C: strong"), "question 1 (contrast), options"),
        (TWO.replace("B: strong", "B: yes"), "question 1 (contrast), option B"),
        (TWO.replace("B: strong", 'B: " "'), "question 1 (contrast), option B"),
        (TWO.replace("B: strong", "A: strong"), "line 3"),
        (TWO.replace("A: weak, B: strong", ", ".join(f"{letter}: x" for letter in LETTERS + "I")), "question 1 (contrast), options"),
    ],
)
def test_a_wrong_questionnaire_is_refused_at_its_place(text: str, at: str, write: Callable[[str], Path], tiny_qwen: Path) -> None:
    with pytest.raises(SettingsError, match="questionnaire") as caught:
        _encoder(tiny_qwen, questionnaire=str(write(text)))
    assert caught.value.facts["at"] == at and caught.value.facts["expected"] and caught.value.fix
    assert "arguments: questionnaire" in str(caught.value.facts["file"])


@pytest.mark.parametrize("name", ["angiografy", "no/such.yaml", "."])
def test_a_questionnaire_that_is_not_there_is_refused_with_the_known_ones(name: str, tiny_qwen: Path) -> None:
    with pytest.raises(SettingsError, match="none of this name") as caught:
        _encoder(tiny_qwen, questionnaire=name)
    assert "angiography, general" in str(caught.value.facts["expected"])


def test_a_file_that_is_not_text_is_refused(tmp_path: Path, tiny_qwen: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(SettingsError, match="cannot use this questionnaire"):
        _encoder(tiny_qwen, questionnaire=str(tmp_path / "x.yaml"))


def test_a_relative_path_is_relative_to_the_base_and_a_name_is_no_path(write: Callable[[str], Path]) -> None:
    folder = write(TWO).parent
    (folder / "angiography").mkdir()
    read = read_questionnaire(resolve([("arguments", {"questionnaire": "mine.yaml"})], base_dir=folder))
    assert [question.id for question in read.questions] == ["contrast", "side"]
    assert resolve([("arguments", {"questionnaire": "angiography"})], base_dir=folder).questionnaire == "angiography"


def test_an_image_token_in_a_question_is_refused(tiny_qwen: Path, images: list[Image.Image], write: Callable[[str], Path]) -> None:
    with pytest.raises(EncoderError, match="image token"):
        _encoder(tiny_qwen, questionnaire=str(write(TWO.replace("How strong?", "<|image_pad|>?")))).encode(images[:1])


def test_another_model_than_qwen2_5_vl_is_refused(tmp_path: Path) -> None:
    from transformers import CLIPConfig

    CLIPConfig().save_pretrained(tmp_path)
    with pytest.raises(EncoderError, match="'clip'"):
        _encoder(tmp_path)
