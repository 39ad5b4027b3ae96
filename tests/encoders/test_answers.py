"""The port's features of answers: every score is the whole model's own at the place of a value; what has not its form decides nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_encoders import noise
from transformers import Qwen2_5_VLForConditionalGeneration

from vlmfilm_plugin.encoders._answers import CAUSES, LEVELS, SOURCES, AnswerEncoder
from vlmfilm_plugin.encoders.base import encode_annotated
from vlmfilm_plugin.encoders.registry import build_encoder
from vlmfilm_plugin.errors import SettingsError
from vlmfilm_plugin.settings.layers import resolve

ANSWERS = ("continuity=A;breaks=B;cause=motion", "nonvessel=C;fp_risk=H;source=bone", "thin=A;periphery=D;visibility=G")
PROMPTS = ["How connected are the vessels?", "What else is there to see in it?", "How thin?"]
# Name, candidates, and where the value starts, for each answer.
FIELDS = (
    (("continuity=", LEVELS), ("breaks=", LEVELS), ("cause=", CAUSES)),
    (("nonvessel=", LEVELS), ("fp_risk=", LEVELS), ("source=", SOURCES)),
    (("thin=", LEVELS), ("periphery=", LEVELS), ("visibility=", LEVELS)),
)


def encoder(folder: Path, **values: object) -> AnswerEncoder:
    given = {
        "use_text_prompt_cond": True,
        "use_logits_feature_cond": True,
        "prompt_templates": PROMPTS,
        "max_new_tokens": 2,
        "model_name": str(folder),
    }
    built = build_encoder(resolve([("arguments", {**given, **values})]))
    assert isinstance(built, AnswerEncoder)
    return built


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    return noise(((64, 64), (90, 60)))


def plain_scores(own: AnswerEncoder, folder: Path, image: Image.Image) -> torch.Tensor:
    """Return the logits of all candidates by one ordinary forward of the whole model an answer: no batch, no padding."""
    model: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).eval()
    inputs = own.image_processor(images=[image], return_tensors="pt")
    found = []
    for prompt, answer, fields in zip(PROMPTS, ANSWERS, FIELDS, strict=True):
        before, after = own._prompt_ids(prompt)
        start = [*before, *[own.config.image_token_id] * int(inputs["image_grid_thw"].prod() // 4), *after]
        # The tiny tokenizer has a token a byte: the token of a value's first letter is that of its place.
        row = torch.tensor([[*start, *own.tokenizer(answer, add_special_tokens=False)["input_ids"]]])
        types = (row == own.config.image_token_id).int()
        with torch.no_grad():
            logits = model(input_ids=row, attention_mask=torch.ones_like(row), mm_token_type_ids=types, **inputs).logits[0]
        model.model.rope_deltas = None
        for name, candidates in fields:
            at = len(start) + answer.index(name) + len(name) - 1
            words = [*candidates] if candidates is LEVELS else [*candidates, "unknown"]
            found.append(logits[at, [own.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in words]])
    return torch.nn.utils.rnn.pad_sequence(found, batch_first=True, padding_value=math.nan)


def parts(scores: list[torch.Tensor], *, labels: int) -> list[torch.Tensor]:
    widths = [(8, 8, labels), (8, 8, labels), (8, 8, 8)]
    return [piece for part, width in zip(scores, widths, strict=True) for piece in torch.split(part, list(width))]


def test_scores_are_those_of_plain_forwards_in_each_mode(tiny_qwen: Path, images: list[Image.Image]) -> None:
    own = encoder(tiny_qwen, logits_feature_mode="logit")
    for image in images:
        expected = plain_scores(own, tiny_qwen, image)
        for mode, temperature in (("logit", 1.0), ("logit", 2.0), ("logprob", 2.0)):
            scored = encoder(tiny_qwen, logits_feature_mode=mode, logits_logit_temp=temperature).scores(image, ANSWERS)
            for piece, row in zip(parts(scored, labels=9), expected, strict=True):
                wanted = row[: len(piece)] / temperature
                torch.testing.assert_close(piece, wanted if mode == "logit" else wanted.log_softmax(0), atol=1e-5, rtol=1e-5)


def test_without_unknown_the_other_candidates_share_its_part(tiny_qwen: Path, images: list[Image.Image]) -> None:
    with_it, without = encoder(tiny_qwen), encoder(tiny_qwen, logits_include_unknown=False)
    assert (with_it.feature_dim, without.feature_dim) == (74, 72)
    for more, fewer in zip(parts(with_it.scores(images[0], ANSWERS), labels=9), parts(without.scores(images[0], ANSWERS), labels=8), strict=True):
        torch.testing.assert_close(more[: len(fewer)].log_softmax(0), fewer, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "answer", ["", "continuity=A", "continuity=I;breaks=B;cause=motion", "Continuity=A;breaks=B;cause=x", f"{ANSWERS[0]} indeed"]
)
def test_an_answer_without_its_form_is_undecided_and_the_others_stay(answer: str, tiny_qwen: Path, images: list[Image.Image]) -> None:
    own = encoder(tiny_qwen)
    found, whole = own.scores(images[0], (answer, *ANSWERS[1:])), own.scores(images[0], ANSWERS)
    torch.testing.assert_close(found[0], torch.full((25,), math.log(1 / 25)))
    torch.testing.assert_close(found[1:], whole[1:], atol=1e-5, rtol=1e-5)


def test_the_norm_of_each_prompt_is_one_and_no_other_image_matters(tiny_qwen: Path, images: list[Image.Image]) -> None:
    own = encoder(tiny_qwen, logits_l2norm=True)
    features, notes = encode_annotated(own, images)
    assert features.shape == (2, 74) and notes is not None
    for part in features.split([25, 25, 24], dim=1):
        torch.testing.assert_close(part.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(torch.cat([own.encode([image]) for image in images]), features, atol=1e-6, rtol=1e-6)
    content = json.loads(notes[0])
    assert len(content["answers"]) == 3 and len(content["fields"]) == 3


def test_what_decides_a_score_decides_the_identity_and_centring_does_not(tiny_qwen: Path) -> None:
    changes: list[dict[str, object]] = [
        {},
        {"logits_l2norm": True},
        {"logits_include_unknown": False},
        {"logits_feature_mode": "logit"},
        {"logits_logit_temp": 2.0},
        {"max_new_tokens": 3},
        {"prompt_templates": [*PROMPTS[:2], "other"]},
    ]
    assert len({encoder(tiny_qwen, **values).identity.fingerprint for values in changes}) == len(changes)
    assert encoder(tiny_qwen, logits_center=True).identity.fingerprint == encoder(tiny_qwen).identity.fingerprint


@pytest.mark.parametrize("prompts", [None, PROMPTS[:1], [*PROMPTS, "fourth"]])
def test_other_than_three_prompts_are_refused_before_anything_is_read(prompts: list[str] | None, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="use_logits_feature_cond") as caught:
        encoder(tmp_path / "nowhere", prompt_templates=prompts)
    assert "prompts" in str(caught.value.facts["found"]) and "continuity" in str(caught.value.facts["expected"])
