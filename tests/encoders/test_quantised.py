"""Quantised weights: refused by name before anything is stored, unless the library that owns the format dequantises them."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_encoders
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlmfilm_plugin.encoders.registry import build_encoder
from vlmfilm_plugin.errors import EncoderError
from vlmfilm_plugin.features.provider import FeatureProvider
from vlmfilm_plugin.settings.layers import resolve

IMAGES = tiny_encoders.noise([(64, 64)])
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a folder a model; copy them, do not change them."""
    from tiny_qwen import build

    folder = tmp_path_factory.mktemp("models")
    return {name: tiny_encoders.build(name, folder / name) for name in ("clip", "dinov2")} | {"qwen": build(folder / "qwen")}


def settings_of(folder: Path, **values: object) -> Any:
    return resolve([("arguments", {"encoder": "hf", "model_name": str(folder), "cache_dir": str(folder.parent / "cache"), **values})])


def _is_linear(key: str, value: Tensor) -> bool:
    return key.endswith(".weight") and value.ndim == 2 and "embed" not in key


def int8(key: str, value: Tensor) -> Weights:
    scale = value.abs().amax(1, keepdim=True) / 127
    return {key: (value / scale).round().to(torch.int8), f"{key}_scale": scale}


def fp8(key: str, value: Tensor) -> Weights:
    scale = value.abs().amax() / 448
    return {key: (value / scale).to(torch.float8_e4m3fn), f"{key}_scale_inv": scale[None]}


def fp8_alone(key: str, value: Tensor) -> Weights:
    return {key: value.to(torch.float8_e4m3fn)}


def bitsandbytes8(key: str, value: Tensor) -> Weights:
    scale = value.abs().amax(1)
    return {key: (value / scale[:, None] * 127).round().to(torch.int8), key.removesuffix("weight") + "SCB": scale}


def bitsandbytes4(key: str, value: Tensor) -> Weights:
    packed = torch.zeros(value.numel() // 2, 1, dtype=torch.uint8)
    return {key: packed, f"{key}.absmax": torch.ones(3), f"{key}.quant_map": torch.ones(16), f"{key}.quant_state.bitsandbytes__nf4": torch.zeros(9)}


def awq(key: str, value: Tensor) -> Weights:
    module = key.removesuffix(".weight")
    return {
        f"{module}.qweight": torch.zeros(4, 4, dtype=torch.int32),
        f"{module}.qzeros": torch.zeros(1, 4, dtype=torch.int32),
        f"{module}.scales": value[:1].half(),
    }


def packed(key: str, value: Tensor) -> Weights:
    return {f"{key}_packed": torch.zeros(4, 4, dtype=torch.int32), f"{key}_scale": value[:1], f"{key}_shape": torch.tensor(value.shape)}


def whole_numbers_as_floats(key: str, value: Tensor) -> Weights:
    scale = value.abs().amax(1, keepdim=True) / 127
    return {key: (value / scale).round(), f"{key}_scale": scale}


FORMATS = [int8, fp8, fp8_alone, bitsandbytes8, bitsandbytes4, awq, packed, whole_numbers_as_floats]


def quantise(folder: Path, form: Callable[[str, Tensor], Weights], where: str, method: str | None = None) -> Path:
    weights: Weights = {}
    for key, value in load_file(folder / "model.safetensors").items():
        weights |= form(key, value) if where in key and _is_linear(key, value) else {key: value}
    assert any(where in key and _is_linear(key, value) for key, value in load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    save_file({key: value.contiguous() for key, value in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    if method is not None:
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(content | {"quantization_config": {"quant_method": method}}))
    return folder


def refused(folder: Path, **values: object) -> EncoderError:
    """Return the error of building the provider, and check that encoding alone, as another caller may, is refused too."""
    with pytest.raises(EncoderError):
        build_encoder(settings_of(folder, **values)).encode(IMAGES)
    with pytest.raises(EncoderError) as caught:
        FeatureProvider.from_settings(settings_of(folder, **values)).of_images(IMAGES)
    for path in folder.parent.rglob("*.sqlite"):
        with contextlib.closing(sqlite3.connect(path)) as connection:
            assert connection.execute("SELECT count(*) FROM features").fetchone() == (0,)
    return caught.value


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.__name__)
@pytest.mark.parametrize(("name", "where", "encoder"), [("clip", "vision_model", "hf"), ("qwen", "visual", "qwen2_5_vl"), ("qwen", "visual", "hf")])
def test_a_quantised_tower_is_refused_by_name(
    models: dict[str, Path], tmp_path: Path, form: Callable[[str, Tensor], Weights], name: str, where: str, encoder: str
) -> None:
    folder = quantise(Path(shutil.copytree(models[name], tmp_path / "m")), form, where, "some_method")
    error = refused(folder, encoder=encoder)
    assert "quantised" in str(error) and where in str(error.facts["found"]) and "before quantisation" in str(error.fix)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.__name__)
def test_a_tower_beside_a_quantised_language_model_is_used(models: dict[str, Path], tmp_path: Path, form: Callable[[str, Tensor], Weights]) -> None:
    expected = build_encoder(settings_of(models["qwen"], encoder="qwen2_5_vl")).encode(IMAGES)
    folder = quantise(Path(shutil.copytree(models["qwen"], tmp_path / "m")), form, "model.layers", "some_method")
    encoder = build_encoder(settings_of(folder, encoder="qwen2_5_vl"))
    assert encoder.identity.fingerprint
    torch.testing.assert_close(encoder.encode(IMAGES), expected, atol=0, rtol=0)


@pytest.mark.parametrize("form", [int8, fp8, whole_numbers_as_floats], ids=lambda form: form.__name__)
def test_a_whole_model_whose_configuration_names_no_format_is_refused(
    models: dict[str, Path], tmp_path: Path, form: Callable[[str, Tensor], Weights]
) -> None:
    assert "not stated" in str(refused(quantise(Path(shutil.copytree(models["dinov2"], tmp_path / "m")), form, "")))
    text = quantise(Path(shutil.copytree(models["qwen"], tmp_path / "q")), form, "model.layers")
    assert "quantised" in str(refused(text, encoder="qwen2_5_vl", use_text_prompt_cond=True))
    assert "quantised" in str(refused(text, encoder="questionnaire"))


def test_a_bin_of_integers_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    folder = quantise(Path(shutil.copytree(models["clip"], tmp_path / "m")), int8, "vision_model")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "quantised" in str(refused(folder))


def test_a_whole_model_of_a_named_format_is_left_to_its_library(models: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    folder = quantise(Path(shutil.copytree(models["dinov2"], tmp_path / "m")), int8, "", "bitsandbytes")
    content = json.loads((folder / "config.json").read_text())
    content["quantization_config"] |= {"load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps(content))
    encoder = build_encoder(settings_of(folder))
    # Where the library is not installed, it is asked for by name; where it is, it needs its own device or dequantises.
    with pytest.raises(EncoderError, match=r"(?i)bitsandbytes"):
        encoder.encode(IMAGES)


def test_a_layer_that_is_called_after_a_scale_is_no_quantised_weight(tmp_path: Path) -> None:
    for name in ("dinov2", "siglip", "clip"):  # layer_scale, logit_scale
        assert build_encoder(settings_of(tiny_encoders.build(name, tmp_path / name))).identity.fingerprint
