"""Qwen2.5-VL as an encoder, with a real tiny model on disk: what is loaded, what a feature depends on, and what goes wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_encoders import noise
from torch import nn
from transformers import Qwen2_5_VLForConditionalGeneration

from vlmfilm_plugin.encoders import _folder_digest as _digest
from vlmfilm_plugin.encoders import _loading as loading
from vlmfilm_plugin.encoders._folder_digest import folder_digest
from vlmfilm_plugin.encoders._identity import Weights, weights_of
from vlmfilm_plugin.encoders._pooling import image_tokens
from vlmfilm_plugin.encoders._weights import WeightFiles, find_prefix
from vlmfilm_plugin.encoders.base import Encoder, encode_annotated
from vlmfilm_plugin.encoders.qwen2_5_vl import QwenImageEncoder, QwenTextEncoder, QwenVLMTextGenerator
from vlmfilm_plugin.encoders.registry import build_encoder
from vlmfilm_plugin.errors import EncoderError, FeatureError, SettingsError
from vlmfilm_plugin.settings.layers import layers_of, resolve
from vlmfilm_plugin.settings.record import Settings

SIZES = ((64, 64), (200, 90), (56, 112), (30, 30), (64, 64))
PROMPT = "Vessels?"


def _settings(folder: Path | str, **values: object) -> Settings:
    return resolve([("arguments", {"model_name": str(folder), "max_new_tokens": 8, "prompt_template": PROMPT, **values})])


def _image_encoder(folder: Path | str, **values: object) -> QwenImageEncoder:
    encoder = build_encoder(_settings(folder, **values))
    assert isinstance(encoder, QwenImageEncoder)
    return encoder


def _text_encoder(folder: Path | str, **values: object) -> QwenTextEncoder:
    encoder = build_encoder(_settings(folder, use_text_prompt_cond=True, **values))
    assert isinstance(encoder, QwenTextEncoder)
    return encoder


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    return noise(SIZES)


@pytest.fixture
def copy_of_tiny(tiny_qwen: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_qwen, tmp_path / "copy"))


def _change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    file = folder / "model.safetensors"
    weights = change({key: value.clone() for key, value in load_file(file).items()})
    file.unlink()
    save_file(weights, file, metadata={"format": "pt"})


def _tower(encoder: QwenImageEncoder) -> nn.Module:
    with encoder.using_module() as module:
        return module


def test_features_equal_those_of_the_full_model(tiny_qwen: Path, images: list[Image.Image]) -> None:
    encoder = _image_encoder(tiny_qwen)
    model: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_qwen).eval()
    inputs = encoder.image_processor(images=images, return_tensors="pt")
    with torch.no_grad():
        output = model.get_image_features(inputs["pixel_values"], image_grid_thw=inputs["image_grid_thw"])
    expected = torch.stack([tokens.mean(0) for tokens in getattr(output, "pooler_output", output)])
    features = encoder.encode(images)
    torch.testing.assert_close(features, expected, atol=1e-6, rtol=1e-6)
    assert features.shape == (len(images), encoder.feature_dim) and features.dtype == torch.float32 and isinstance(encoder, Encoder)


@pytest.mark.parametrize("limit", [1, 40, 16384])
def test_alone_or_in_packs_of_any_size_is_the_same(tiny_qwen: Path, images: list[Image.Image], limit: int) -> None:
    alone = torch.cat([_image_encoder(tiny_qwen).encode([image]) for image in images[:2]])
    together = _image_encoder(tiny_qwen, max_patches_per_batch=limit).encode(images)
    torch.testing.assert_close(together[:2], alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(_image_encoder(tiny_qwen).encode(images[::-1]).flip(0), together, atol=1e-5, rtol=1e-5)


def test_packs_are_bounded_by_patches(tiny_qwen: Path, images: list[Image.Image]) -> None:
    encoder, seen = _image_encoder(tiny_qwen, max_patches_per_batch=60), []
    _tower(encoder).register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    encoder.encode(images)
    largest = max(len(encoder.image_processor(images=[image], return_tensors="pt")["pixel_values"]) for image in images)
    assert 1 < len(seen) < len(images) and all(count <= max(60, largest) for count in seen)


def test_no_images_give_no_features(tiny_qwen: Path) -> None:
    assert _image_encoder(tiny_qwen).encode([]).shape == (0, 32)


def test_building_loads_no_weights_and_without_them_there_is_no_identity(copy_of_tiny: Path) -> None:
    for encoder in (_image_encoder(copy_of_tiny), _text_encoder(copy_of_tiny)):
        assert encoder.identity.fingerprint.startswith("qwen2_5_vl-") and not encoder.is_loaded
    (copy_of_tiny / "model.safetensors").unlink()
    for encoder in (_image_encoder(copy_of_tiny), _text_encoder(copy_of_tiny)):
        assert encoder.feature_dim == 32 and not encoder.is_loaded
        with pytest.raises(EncoderError, match="load the weights"):
            encoder.encode([Image.new("RGB", (56, 56))])
        with pytest.raises(EncoderError, match="find the weights"):
            _ = encoder.identity
        assert not encoder.is_loaded


def test_image_mode_never_builds_the_language_model(tiny_qwen: Path, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as modeling

    for name in ("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLTextModel"):
        monkeypatch.setattr(getattr(modeling, name), "__init__", lambda *_: pytest.fail("the language model was built"))
    encoder = _image_encoder(tiny_qwen)
    encoder.encode(images[:1])
    assert {name.split(".")[0] for name, _ in _tower(encoder).named_parameters()} == {"patch_embed", "blocks", "merger"}


def test_the_tower_is_frozen_and_in_eval_mode(tiny_qwen: Path) -> None:
    tower = _tower(_image_encoder(tiny_qwen))
    assert not tower.training and not any(weight.requires_grad for weight in tower.parameters())


def test_nothing_is_reported_about_the_language_model(tiny_qwen: Path, images: list[Image.Image], capfd: pytest.CaptureFixture[str]) -> None:
    _image_encoder(tiny_qwen).encode(images[:1])
    said = "".join(capfd.readouterr())
    assert "UNEXPECTED" not in said and "MISSING" not in said and "not used" not in said


@pytest.mark.parametrize("prefix", ["visual.", "model.visual."])
def test_both_published_prefixes_load(tiny_qwen: Path, copy_of_tiny: Path, images: list[Image.Image], prefix: str) -> None:
    def renamed(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {prefix + key.split("visual.", 1)[1] if "visual." in key else key: value for key, value in weights.items()}

    _change_weights(copy_of_tiny, renamed)
    assert torch.equal(_image_encoder(copy_of_tiny).encode(images[:1]), _image_encoder(tiny_qwen).encode(images[:1]))


def test_a_missing_vision_weight_is_an_error(copy_of_tiny: Path, images: list[Image.Image]) -> None:
    _change_weights(copy_of_tiny, lambda weights: {key: value for key, value in weights.items() if "blocks.1.attn.qkv.weight" not in key})
    with pytest.raises(EncoderError, match=r"blocks\.1\.attn\.qkv\.weight") as caught:
        _image_encoder(copy_of_tiny).encode(images[:1])
    assert caught.value.fix and "again" in caught.value.fix


def test_a_vision_weight_of_another_shape_is_an_error(copy_of_tiny: Path, images: list[Image.Image]) -> None:
    _change_weights(copy_of_tiny, lambda weights: {key: value[:-1] if "merger.mlp.0.weight" in key else value for key, value in weights.items()})
    with pytest.raises(EncoderError):
        _image_encoder(copy_of_tiny).encode(images[:1])


def test_a_truncated_weight_file_is_an_error(copy_of_tiny: Path, images: list[Image.Image]) -> None:
    file = copy_of_tiny / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(EncoderError, match="cannot load the weights"):
        _image_encoder(copy_of_tiny).encode(images[:1])


def test_threads_load_the_weights_once(tiny_qwen: Path, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[int] = []
    real = loading.load_part

    def counting(*arguments: Any) -> nn.Module:
        loads.append(1)
        return real(*arguments)

    monkeypatch.setattr(loading, "load_part", counting)
    encoder, found = _image_encoder(tiny_qwen), []
    threads = [threading.Thread(target=lambda: found.append(encoder.encode(images[:2]))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loads) == 1 and len(found) == 4 and all(torch.equal(found[0], other) for other in found)


def test_release_drops_the_weights_and_the_next_encode_loads_them_again(tiny_qwen: Path, images: list[Image.Image]) -> None:
    encoder = _image_encoder(tiny_qwen)
    encoder.release()
    before = encoder.encode(images[:1])
    assert encoder.is_loaded
    encoder.release()
    assert not encoder.is_loaded
    assert torch.equal(encoder.encode(images[:1]), before)


def test_features_can_train_a_projection_also_when_made_under_inference_mode(tiny_qwen: Path, images: list[Image.Image]) -> None:
    encoder = _image_encoder(tiny_qwen)
    with torch.inference_mode():
        features = encoder.encode(images[:1])
    assert not features.is_inference() and not features.requires_grad
    nn.Linear(32, 4)(features).sum().backward()
    assert torch.equal(encoder.encode(images[:1]), features)


def test_the_hosts_autocast_and_random_numbers_are_left_alone(tiny_qwen: Path, images: list[Image.Image]) -> None:
    expected = _image_encoder(tiny_qwen).encode(images)
    torch.manual_seed(7)
    first = torch.rand(3)
    torch.manual_seed(7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(_image_encoder(tiny_qwen).encode(images), expected)
    assert torch.equal(torch.rand(3), first)


def test_a_feature_that_is_not_finite_names_its_image(tiny_qwen: Path, images: list[Image.Image]) -> None:
    encoder = _image_encoder(tiny_qwen, max_patches_per_batch=1)
    calls = iter(range(10))

    def poison(_: nn.Module, __: object, output: Any) -> Any:
        if next(calls) == 2:
            getattr(output, "pooler_output", output)[0, 0] = torch.nan
        return output

    _tower(encoder).register_forward_hook(poison)
    with pytest.raises(FeatureError, match="image 2"):
        encoder.encode(images)


def _out_of_memory_above(limit: int, seen: list[int]) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
    def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        seen.append(len(args[0]))
        if len(args[0]) > limit:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    return hook


def test_out_of_memory_halves_the_batch_and_goes_on(tiny_qwen: Path, images: list[Image.Image]) -> None:
    encoder = _image_encoder(tiny_qwen)
    seen: list[int] = []
    expected = _image_encoder(tiny_qwen).encode(images)
    _tower(encoder).register_forward_pre_hook(_out_of_memory_above(70, seen))
    torch.testing.assert_close(encoder.encode(images), expected, atol=1e-5, rtol=1e-5)
    assert seen[0] > 70 and len(seen) > 2


def test_out_of_memory_with_one_image_is_an_error_with_a_fix(tiny_qwen: Path, images: list[Image.Image]) -> None:
    encoder = _image_encoder(tiny_qwen)
    _tower(encoder).register_forward_pre_hook(_out_of_memory_above(0, []))
    with pytest.raises(EncoderError, match="out of memory") as caught:
        encoder.encode(images)
    assert caught.value.fix and "max_pixels" in caught.value.fix


def test_other_errors_of_the_model_are_not_taken_for_memory(tiny_qwen: Path, images: list[Image.Image]) -> None:
    encoder = _image_encoder(tiny_qwen)
    _tower(encoder).register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("boom")))
    with pytest.raises(RuntimeError, match="boom"):
        encoder.encode(images)


def test_pixel_limits_reach_the_processor_and_the_identity(tiny_qwen: Path) -> None:
    big = Image.new("RGB", (300, 300))
    patches = {}
    for limit in (None, 5 * 28 * 28):
        encoder = _image_encoder(tiny_qwen, max_pixels=limit)
        patches[encoder.identity.fingerprint] = len(encoder.image_processor(images=[big], return_tensors="pt")["pixel_values"])
    assert list(patches.values()) == [36, 16]
    with pytest.raises(EncoderError, match="cannot resize"):
        _ = _image_encoder(tiny_qwen, min_pixels=10_000, max_pixels=5_000).identity


def test_an_image_the_processor_refuses_is_named(tiny_qwen: Path) -> None:
    with pytest.raises(EncoderError, match="image 1"):
        _image_encoder(tiny_qwen).encode([Image.new("RGB", (56, 56)), Image.new("RGB", (9000, 28))])


def test_grey_and_alpha_images_are_taken_as_rgb(tiny_qwen: Path) -> None:
    encoder = _image_encoder(tiny_qwen)
    features = encoder.encode([Image.new(mode, (56, 56), value) for mode, value in (("L", 90), ("RGB", (90,) * 3), ("RGBA", (90, 90, 90, 255)))])
    torch.testing.assert_close(features[0], features[1])
    torch.testing.assert_close(features[2], features[1])


def test_identity_follows_content_and_not_place(tiny_qwen: Path, copy_of_tiny: Path) -> None:
    original = _image_encoder(tiny_qwen).identity
    assert _image_encoder(copy_of_tiny).identity.fingerprint == original.fingerprint
    assert str(tiny_qwen) not in json.dumps(dict(original.facts))
    _change_weights(
        copy_of_tiny, lambda weights: {key: value + 1 if key.endswith("patch_embed.proj.weight") else value for key, value in weights.items()}
    )
    assert _image_encoder(copy_of_tiny).identity.fingerprint != original.fingerprint


def test_identity_follows_configuration_mode_prompt_pool_and_length(tiny_qwen: Path, copy_of_tiny: Path) -> None:
    config = json.loads((copy_of_tiny / "config.json").read_text())
    config["vision_config"]["window_size"] = 28 * 4
    (copy_of_tiny / "config.json").write_text(json.dumps(config))
    encoders = [
        _image_encoder(tiny_qwen),
        _image_encoder(copy_of_tiny),
        _text_encoder(tiny_qwen),
        _text_encoder(tiny_qwen, prompt_template="Else?"),
        _text_encoder(tiny_qwen, pool="last"),
        _text_encoder(tiny_qwen, max_new_tokens=9),
    ]
    assert len({encoder.identity.fingerprint for encoder in encoders}) == len(encoders)


def test_identity_ignores_what_does_not_decide_a_feature(tiny_qwen: Path) -> None:
    expected = _image_encoder(tiny_qwen).identity.fingerprint
    for values in (
        {"dtype": "bfloat16"},
        {"device_map": "cpu"},
        {"max_patches_per_batch": 5},
        {"prompt_template": "x"},
        {"pool": "last"},
        {"revision": "abc"},
    ):
        assert _image_encoder(tiny_qwen, **values).identity.fingerprint == expected


def test_hub_models_are_identified_by_name_and_commit() -> None:
    settings = _settings("some/model", revision="main")
    for commit, revision in (("c0ffee", "c0ffee"), (None, "main")):
        weights = weights_of(settings, SimpleNamespace(_commit_hash=commit), lambda: None)
        assert weights == Weights({"model": "some/model", "revision": revision})


def test_any_byte_of_a_weight_file_changes_the_identity(tmp_path: Path) -> None:
    digests = set()
    for position in (None, 0, 65535, 1_234_567, -1, -65536):
        content = bytearray(3_000_000)
        if position is not None:
            content[position] = 1
        (tmp_path / "model.safetensors").write_bytes(content)
        digests.add(folder_digest(tmp_path, ["model.safetensors"], str(tmp_path / "cache")))
    assert len(digests) == 6


def test_a_weight_file_is_read_once_and_its_digest_is_kept_for_other_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    time.sleep(0.1)  # a file that was just written is read again
    first = folder_digest(tmp_path, ["model.safetensors"], str(tmp_path / "cache"))
    monkeypatch.setattr(_digest, "_known", {})  # as a new process would have it
    monkeypatch.setattr(_digest, "_file_digest", None)
    assert folder_digest(tmp_path, ["model.safetensors"], str(tmp_path / "cache")) == first
    monkeypatch.undo()
    (tmp_path / "cache" / _digest.MEMORY).write_text("not json")
    assert folder_digest(tmp_path, ["model.safetensors"], str(tmp_path / "cache")) == first


@pytest.mark.parametrize(
    ("name", "found"), [("/no/such/folder", "no folder"), ("./no-such", "no folder"), ("nobody/not-cached", ""), ("not a name!", "")]
)
def test_a_model_that_is_not_there_is_an_error_with_a_fix(name: str, found: str) -> None:
    with pytest.raises(EncoderError, match="cannot read the configuration") as caught:
        build_encoder(_settings(name))
    assert found in str(caught.value.facts["found"]) and "arguments: model_name" in str(caught.value.facts["model"])
    assert caught.value.fix and "model_name" in caught.value.fix and "download" in caught.value.fix


def test_another_type_of_model_is_an_error(tmp_path: Path) -> None:
    from transformers import CLIPConfig

    CLIPConfig().save_pretrained(tmp_path)
    with pytest.raises(EncoderError, match="'clip'") as caught:
        build_encoder(_settings(tmp_path))
    assert list(caught.value.facts)[-2:] == ["found", "expected"] and "qwen2_5_vl" in str(caught.value.facts["expected"])


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model_type": "nonsense"}'])
def test_a_broken_configuration_is_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(EncoderError):
        build_encoder(_settings(tmp_path))


def test_half_precision_is_kept_or_lifted_and_features_are_float32(tiny_qwen: Path, images: list[Image.Image]) -> None:
    expected = _image_encoder(tiny_qwen).encode(images)
    for dtype, kept in (("bfloat16", torch.bfloat16), ("float16", torch.float32)):
        encoder = _image_encoder(tiny_qwen, dtype=dtype, device_map="cpu")
        features = encoder.encode(images)
        assert next(_tower(encoder).parameters()).dtype == kept and features.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(features, expected).min() > 0.98


def test_auto_dtype_is_the_checkpoints(tmp_path: Path) -> None:
    from tiny_qwen import build

    tower = _tower(_image_encoder(build(tmp_path, dtype=torch.bfloat16)))
    assert next(tower.parameters()).dtype == torch.bfloat16


def test_accelerate_is_used_for_auto_unless_forbidden(tiny_qwen: Path, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    from transformers import PreTrainedModel

    real, asked = PreTrainedModel.from_pretrained.__func__, []

    def recording(cls: type, *args: Any, **options: Any) -> Any:
        asked.append(options.get("device_map"))
        return real(cls, *args, **options)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(recording))
    features = [_image_encoder(tiny_qwen, device_map=device_map).encode(images) for device_map in ("auto", "cpu", None)]
    monkeypatch.setenv("VLM_FORCE_NO_ACCELERATE", "1")
    features.append(_image_encoder(tiny_qwen).encode(images))
    assert asked == ["auto", None, None, None]
    assert all(torch.equal(features[0], other) for other in features)


def test_an_unknown_device_is_an_error(tiny_qwen: Path, images: list[Image.Image]) -> None:
    with pytest.raises(EncoderError):
        _image_encoder(tiny_qwen, device_map="toaster").encode(images[:1])


def test_every_known_form_of_tower_output_is_read() -> None:
    tokens = torch.rand(5, 3)
    for output in (
        tokens,
        (tokens, [tokens]),
        SimpleNamespace(pooler_output=tokens),
        torch.split(tokens, [2, 3]),
        list(torch.split(tokens, [2, 3])),
        SimpleNamespace(pooler_output=torch.split(tokens, [2, 3])),
    ):
        assert [len(part) for part in image_tokens(output, [2, 3])] == [2, 3]


@pytest.mark.parametrize(
    "output", [None, {"a": 1}, torch.rand(4, 3), torch.rand(5), (torch.rand(3, 3), torch.rand(2, 3)), SimpleNamespace(pooler_output=None), ()]
)
def test_any_other_form_is_refused_by_name(output: object) -> None:
    with pytest.raises(EncoderError, match="cannot read the output") as caught:
        image_tokens(output, [2, 3])
    assert type(output).__name__ in str(caught.value.facts["found"])


# Text mode


def _greedy_by_hand(encoder: QwenTextEncoder, image: Image.Image) -> str:
    """Write a text token by token with whole forwards: no cache, no `generate`, no batch."""
    inputs = encoder.image_processor(images=[image], return_tensors="pt")
    before, after = encoder._prompt_ids(PROMPT)
    token = encoder.config.image_token_id
    ids = [*before, *[token] * int(inputs["image_grid_thw"].prod() // 4), *after]
    written: list[int] = []
    with encoder.using_module() as model:
        for _ in range(8):
            row = torch.tensor([ids + written])
            model.model.rope_deltas = None  # type: ignore[union-attr]
            logits = model(
                input_ids=row, attention_mask=torch.ones_like(row), mm_token_type_ids=(row == token).int(), use_cache=False, **inputs
            ).logits
            written.append(int(logits[0, -1].argmax()))
            if written[-1] == encoder.tokenizer.eos_token_id:
                break
    return str(encoder.tokenizer.decode(written, skip_special_tokens=True)).strip()


def test_generation_equals_greedy_decoding_by_hand(tiny_qwen: Path, images: list[Image.Image]) -> None:
    encoder = _text_encoder(tiny_qwen)
    assert encoder.generate(images) == [_greedy_by_hand(encoder, image) for image in images]


def test_text_depends_on_the_image_and_on_the_prompt(tiny_qwen: Path, images: list[Image.Image]) -> None:
    encoder = _text_encoder(tiny_qwen)
    assert len(set(encoder.generate(images))) == len(images)
    assert encoder.generate(images[:1]) != encoder.generate(images[:1], "Something else entirely.")


@pytest.mark.parametrize("pool", ["mean", "last"])
def test_text_features_are_the_same_batched_and_one_by_one(tiny_qwen: Path, images: list[Image.Image], pool: str) -> None:
    encoder = _text_encoder(tiny_qwen, pool=pool)
    together = encoder.encode([*images, *images])
    alone = torch.cat([encoder.encode([image]) for image in images])
    assert together.shape == (10, encoder.feature_dim) and together.dtype == torch.float32
    torch.testing.assert_close(together, torch.cat([alone, alone]), atol=1e-5, rtol=1e-5)


def test_embedding_pools_real_tokens_only(tiny_qwen: Path) -> None:
    for pool in ("mean", "last"):
        encoder = _text_encoder(tiny_qwen, pool=pool)
        texts = ["a", "a much longer text about vessels", "", "血管"]
        together = encoder.embed(texts)
        torch.testing.assert_close(together, torch.cat([encoder.embed([text]) for text in texts]), atol=1e-5, rtol=1e-5)
        ids = torch.tensor([encoder.tokenizer(texts[1], add_special_tokens=False)["input_ids"]])
        with encoder.using_module() as model:
            states = model.model.language_model(input_ids=ids).last_hidden_state[0]  # type: ignore[union-attr, operator]
        torch.testing.assert_close(together[1], states.mean(0) if pool == "mean" else states[-1], atol=1e-5, rtol=1e-5)


def test_embedding_does_not_depend_on_what_was_generated_before(tiny_qwen: Path, images: list[Image.Image]) -> None:
    encoder = _text_encoder(tiny_qwen)
    before = encoder.embed(["abc"])
    encoder.generate(images[1:2])
    assert torch.equal(encoder.embed(["abc"]), before)


def test_more_texts_than_one_batch_and_none(tiny_qwen: Path) -> None:
    encoder = _text_encoder(tiny_qwen)
    assert encoder.embed([f"text {i}" for i in range(70)]).shape == (70, 32)
    assert encoder.embed([]).shape == (0, 32) and encoder.generate([]) == []


def test_texts_are_no_longer_than_allowed(tiny_qwen: Path, images: list[Image.Image]) -> None:
    encoder = _text_encoder(tiny_qwen, max_new_tokens=3)
    assert all(len(encoder.tokenizer(text)["input_ids"]) <= 9 for text in encoder.generate(images))  # a broken byte is shown as three


def test_text_features_can_train_and_not_finite_ones_name_their_text(tiny_qwen: Path, images: list[Image.Image]) -> None:
    encoder = _text_encoder(tiny_qwen)
    with torch.inference_mode():
        features = encoder.encode(images[:1])
    nn.Linear(32, 4)(features).sum().backward()
    with encoder.using_module() as model:
        model.get_input_embeddings().weight[encoder.tokenizer("~")["input_ids"][0]] = torch.nan  # type: ignore[operator]
    with pytest.raises(FeatureError, match="text 1"):
        encoder.embed(["fine", "~"])


def test_out_of_memory_in_text_mode_halves_too(tiny_qwen: Path, images: list[Image.Image]) -> None:
    encoder = _text_encoder(tiny_qwen)
    expected = encoder.generate([images[0]] * 3)
    with encoder.using_module() as model:
        model.model.visual.register_forward_pre_hook(_out_of_memory_above(20, []))  # type: ignore[union-attr]
    assert encoder.generate([images[0]] * 3) == expected


def test_a_prompt_with_an_image_token_is_refused(tiny_qwen: Path, images: list[Image.Image]) -> None:
    with pytest.raises(EncoderError, match="image token"):
        _text_encoder(tiny_qwen, prompt_template="see <|image_pad|>").encode(images[:1])


def test_a_prompt_with_braces_is_taken_as_it_is(tiny_qwen: Path, images: list[Image.Image]) -> None:
    assert len(_text_encoder(tiny_qwen, prompt_template="{x} {} {{").generate(images[:1])) == 1


def test_a_tokenizer_of_another_model_is_refused(copy_of_tiny: Path, images: list[Image.Image]) -> None:
    config = json.loads((copy_of_tiny / "config.json").read_text())
    config["vision_start_token_id"] = 5
    (copy_of_tiny / "config.json").write_text(json.dumps(config))
    with pytest.raises(EncoderError, match="do not fit"):
        _text_encoder(copy_of_tiny).encode(images[:1])


# Several prompts, and notes

PROMPTS = ["Vessels?", "Background, in a longer question?", "Noise?"]


def _several(folder: Path, prompts: list[str] = PROMPTS, **values: object) -> QwenTextEncoder:
    return _text_encoder(folder, prompt_template=None, prompt_templates=prompts, **values)


def test_several_prompts_give_their_embeddings_in_order(tiny_qwen: Path, images: list[Image.Image]) -> None:
    encoder = _several(tiny_qwen)
    features = encoder.encode(images)
    assert encoder.feature_dim == 3 * 32 and features.shape == (len(images), 96)
    for index, prompt in enumerate(PROMPTS):
        alone = _text_encoder(tiny_qwen, prompt_template=prompt).encode(images)
        torch.testing.assert_close(features[:, index * 32 : (index + 1) * 32], alone, atol=1e-5, rtol=1e-5)
    assert _several(tiny_qwen).encode([]).shape == (0, 96)


def test_prompts_and_their_order_are_part_of_the_identity_and_one_is_as_one(tiny_qwen: Path) -> None:
    found = {_several(tiny_qwen, prompts).identity.fingerprint for prompts in (PROMPTS, PROMPTS[::-1], PROMPTS[:2], PROMPTS[:1])}
    assert len(found) == 4 and _text_encoder(tiny_qwen, prompt_template=PROMPTS[0]).identity.fingerprint in found


def test_one_prompt_and_several_together_are_refused_when_built(tiny_qwen: Path) -> None:
    for is_text in (True, False):
        with pytest.raises(SettingsError, match="prompt_templates") as caught:
            build_encoder(_settings(tiny_qwen, prompt_templates=PROMPTS, use_text_prompt_cond=is_text))
        assert "arguments" in str(caught.value.facts["prompt_template"])


@pytest.mark.parametrize("value", [[], "text", [1], [""], 3, ["a", None]])
def test_prompts_that_are_no_list_of_texts_are_refused(value: object) -> None:
    with pytest.raises(SettingsError, match="prompt_templates"):
        resolve([("arguments", {"prompt_templates": value})])


def test_prompts_from_the_environment_are_a_json_list() -> None:
    def read(text: str) -> tuple[str, ...] | None:
        return resolve(layers_of({"VLM_FILM_PROMPT_TEMPLATES": text})).prompt_templates

    assert read('["one, two", "three"]') == ("one, two", "three") and read("null") is None
    for text in ("one", "[1]", "[]", '"one"', "{"):
        with pytest.raises(SettingsError, match="VLM_FILM_PROMPT_TEMPLATES"):
            read(text)


def test_notes_are_the_texts_and_features_are_those_of_encode(tiny_qwen: Path, images: list[Image.Image]) -> None:
    one, several = _text_encoder(tiny_qwen), _several(tiny_qwen)
    features, notes = encode_annotated(one, images)
    assert notes == one.generate(images) and torch.equal(features, one.encode(images))
    features, notes = encode_annotated(several, images)
    assert notes is not None and torch.equal(features, several.encode(images))
    assert [json.loads(note) for note in notes] == [list(row) for row in zip(*(several.generate(images, prompt) for prompt in PROMPTS), strict=True)]
    assert encode_annotated(_image_encoder(tiny_qwen), images)[1] is None


# Sharded checkpoints: image mode opens, and downloads, the tower's files alone


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tiny model saved in files so small that vision and language lie in different ones; copy it, do not change it."""
    from tiny_qwen import build

    folder = build(tmp_path_factory.mktemp("sharded"))
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="10KB")
    return folder


def _files(folder: Path) -> tuple[set[str], set[str]]:
    """Return the files that hold weights of the tower, and all."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return {file for key, file in index.items() if "visual." in key}, set(index.values())


@pytest.fixture
def tower_only(sharded: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(sharded, tmp_path / "tower_only"))
    of_tower, every = _files(folder)
    for name in every - of_tower:
        (folder / name).unlink()
    return folder


def test_image_mode_needs_the_files_of_the_tower_alone(tower_only: Path, sharded: Path, tiny_qwen: Path, images: list[Image.Image]) -> None:
    of_tower, every = _files(tower_only)
    assert len(every - of_tower) > 5 and len(of_tower) > 2
    features = _image_encoder(tower_only).encode(images)
    assert torch.equal(features, _image_encoder(sharded).encode(images)) and torch.equal(features, _image_encoder(tiny_qwen).encode(images))
    assert torch.equal(_text_encoder(sharded).encode(images[:1]), _text_encoder(tiny_qwen).encode(images[:1]))


def test_text_mode_names_the_files_that_are_missing(tower_only: Path, images: list[Image.Image]) -> None:
    of_tower, every = _files(tower_only)
    with pytest.raises(EncoderError, match="files are missing") as caught:
        _text_encoder(tower_only).encode(images[:1])
    assert str(caught.value.facts["missing files"]).split(", ") == sorted(every - of_tower) and "again" in str(caught.value.fix)


def test_a_missing_file_of_the_tower_is_named(tower_only: Path, images: list[Image.Image]) -> None:
    name = sorted(_files(tower_only)[0])[0]
    (tower_only / name).unlink()
    with pytest.raises(EncoderError, match="cannot load the weights") as caught:
        _image_encoder(tower_only).encode(images[:1])
    assert name in str(caught.value)


_FROM_HUB = """
import sys, json, torch
import numpy as np
from PIL import Image
import huggingface_hub
from vlmfilm_plugin.encoders.registry import build_encoder
from vlmfilm_plugin.settings.layers import resolve
asked, real = [], huggingface_hub.hf_hub_download
def recording(repo, name, **options):
    if "config" not in name:
        asked.append(name)
    return real(repo, name, **options)
huggingface_hub.hf_hub_download = recording
e = build_encoder(resolve([("a", {"model_name": "nobody/tiny", "encoder": sys.argv[1]})]))
assert e.feature_dim and e.identity.facts["revision"] == "c" * 40, e.identity
assert asked == []
image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
print(json.dumps({"feature": e.encode([image])[0].tolist(), "asked": asked}))
"""


@pytest.mark.parametrize("encoder", ["qwen2_5_vl", "hf"])
def test_of_a_hub_model_the_files_of_the_tower_alone_are_asked_for(encoder: str, tower_only: Path, tiny_qwen: Path, tmp_path: Path) -> None:
    model = tmp_path / "home" / "hub" / "models--nobody--tiny"
    shutil.copytree(tower_only, model / "snapshots" / ("c" * 40))
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("c" * 40)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    for variable in ("HF_HUB_CACHE", "TRANSFORMERS_CACHE", "HUGGINGFACE_HUB_CACHE"):
        environment.pop(variable, None)
    done = subprocess.run([sys.executable, "-c", _FROM_HUB, encoder], env=environment, check=True, capture_output=True, text=True)
    told = json.loads(done.stdout.splitlines()[-1])
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    assert set(told["asked"]) == {"model.safetensors.index.json"} | _files(tower_only)[0] and len(told["asked"]) == len(set(told["asked"]))
    torch.testing.assert_close(torch.tensor(told["feature"]), _image_encoder(tiny_qwen).encode([image])[0], atol=1e-6, rtol=1e-6)


def test_an_uncached_tower_is_downloaded_file_by_file(tower_only: Path, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    asked: list[tuple[str, str, str]] = []

    def from_folder(repo: str, name: str, *, revision: str) -> str:
        asked.append((repo, name, revision))
        if not (tower_only / name).is_file():
            raise EntryNotFoundError(name)
        return str(tower_only / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", from_folder)
    files = WeightFiles.of("nobody/tiny", "c0ffee")
    names = [key.split("visual.", 1)[1] for key in files.file_of if "visual." in key]
    assert set(files.read(names, "nobody/tiny")) == set(names)
    assert {name for _, name, _ in asked} == {"model.safetensors.index.json"} | _files(tower_only)[0]
    assert {(repo, revision) for repo, _, revision in asked} == {("nobody/tiny", "c0ffee")}
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: (_ for _ in ()).throw(LocalEntryNotFoundError("no network")))
    with pytest.raises(FileNotFoundError, match=r"none of model\.safetensors"):
        WeightFiles.of("nobody/tiny")


def test_the_prefix_of_a_part_is_the_one_that_holds_most_of_it() -> None:
    keys = ["text.block.weight", "text.norm.weight", "a.vision.block.weight", "a.vision.norm.weight", "a.vision.patch.weight"]
    assert find_prefix(keys, ["block.weight", "norm.weight", "patch.weight"]) == "a.vision."
    assert find_prefix(["block.weight"], ["block.weight"]) == "" and find_prefix(["xblock.weight"], ["block.weight"]) == ""


def test_the_generator_of_the_port_is_lazy_and_equals_text_mode(tiny_qwen: Path, images: list[Image.Image]) -> None:
    generator = QwenVLMTextGenerator(str(tiny_qwen), max_new_tokens=8, prompt_template=PROMPT)
    texts = generator.generate(images[:2])
    assert texts == _text_encoder(tiny_qwen).generate(images[:2])
    torch.testing.assert_close(generator.embed(texts), _text_encoder(tiny_qwen).encode(images[:2]), atol=1e-5, rtol=1e-5)
    assert generator.generate(images[:1], prompt="Else?") != texts[:1]


def test_the_generator_fails_at_first_use_and_bad_values_at_once() -> None:
    generator = QwenVLMTextGenerator("/no/such/folder")
    with pytest.raises(EncoderError):
        generator.embed(["x"])
    with pytest.raises(SettingsError, match="pool"):
        QwenVLMTextGenerator(pool="median")
    with pytest.raises(SettingsError, match="unknown name"):
        QwenVLMTextGenerator(colour="red")


def test_torchvision_is_never_imported(tiny_qwen: Path) -> None:
    code = (
        "import sys; from PIL import Image; from vlmfilm_plugin.settings.layers import resolve\n"
        "from vlmfilm_plugin.encoders.registry import build_encoder;"
        "e = build_encoder(resolve([('a', {'model_name': sys.argv[1], 'use_text_prompt_cond': True, 'max_new_tokens': 2})]));"
        "e.encode([Image.new('RGB', (56, 56))]); sys.exit('torchvision' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tiny_qwen)], check=False).returncode == 0
