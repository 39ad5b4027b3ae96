"""Any image encoder of transformers, with tiny models of the real classes: the tower alone equals the full model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_encoders
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from vlmfilm_plugin.encoders._pooling import pooled
from vlmfilm_plugin.encoders.hf import HfEncoder
from vlmfilm_plugin.encoders.registry import build_encoder
from vlmfilm_plugin.errors import EncoderError, FeatureError
from vlmfilm_plugin.settings.layers import resolve

SIZES = ((64, 64), (200, 90), (56, 112), (33, 47), (64, 64))
HAS_TWO_PARTS = {"clip", "siglip", "siglip2", "gemma3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"}
FAMILIES = [name for name in tiny_encoders.MODELS if hasattr(transformers, tiny_encoders.NEEDS.get(name, "CLIPModel"))]
WIDTHS = {"clip": 20, "convnext": 24}


def _encoder(folder: Path, **values: object) -> HfEncoder:
    encoder = build_encoder(resolve([("arguments", {"encoder": "hf", "model_name": str(folder), **values})]))
    assert isinstance(encoder, HfEncoder)
    return encoder


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    return tiny_encoders.noise(SIZES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a folder a family; read them, do not change them."""
    return {name: tiny_encoders.build(name, tmp_path_factory.mktemp(name)) for name in FAMILIES}


def _by_full_model(name: str, folder: Path, image: Image.Image, processor: Any) -> torch.Tensor:
    """Return the feature of one image by the whole model and its own public method."""
    inputs = processor(images=[image], return_tensors="pt")
    inputs.pop("num_crops", None)
    kinds = {"vit": "ViTForImageClassification", "gemma3": "Gemma3ForConditionalGeneration", "qwen3_vl": "Qwen3VLForConditionalGeneration"}
    kind = kinds.get(name, "AutoModel")
    model = getattr(transformers, kind).from_pretrained(folder).eval()
    with torch.no_grad():
        if name == "vit":
            return model.vit(**inputs).last_hidden_state[0, 1:].mean(0)
        if name == "gemma3":
            return model.model.vision_tower(inputs["pixel_values"]).last_hidden_state[0].mean(0)
        output = model.get_image_features(**inputs) if name in HAS_TWO_PARTS else model(**inputs)
    held = getattr(output, "pooler_output", output)
    if name.startswith("qwen"):
        return torch.cat(list(held[0]) if isinstance(held[0], tuple | list) else [held[0]]).mean(0)
    return held[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_tower_alone_equals_the_full_model(name: str, folders: dict[str, Path], images: list[Image.Image]) -> None:
    encoder = _encoder(folders[name])
    assert encoder.feature_dim == WIDTHS.get(name, 32) and not encoder.is_loaded
    features = encoder.encode(images)
    expected = torch.stack([_by_full_model(name, folders[name], image, encoder.image_processor) for image in images])
    torch.testing.assert_close(features, expected, atol=2e-6, rtol=1e-5)
    assert features.dtype == torch.float32 and features.std(0).min() > 0
    assert "torchvision" not in sys.modules


@pytest.mark.parametrize("name", sorted(HAS_TWO_PARTS & set(FAMILIES)))
def test_weights_of_the_other_part_are_never_read(name: str, tmp_path: Path, folders: dict[str, Path], images: list[Image.Image]) -> None:
    folder = tiny_encoders.build(name, tmp_path, max_shard_size="4KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    kept = {file for key, file in index.items() if "vis" in key}
    removed = [path for path in folder.glob("*.safetensors") if path.name not in kept]
    for path in removed:
        path.unlink()
    assert len(removed) > 2
    torch.testing.assert_close(_encoder(folder).encode(images), _encoder(folders[name]).encode(images), atol=0, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_alone_or_in_packs_of_any_size_is_the_same(name: str, folders: dict[str, Path], images: list[Image.Image]) -> None:
    alone = torch.cat([_encoder(folders[name]).encode([image]) for image in images])
    for limit in (1, 40, 16384):
        together = _encoder(folders[name], max_patches_per_batch=limit).encode(images)
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["clip", "siglip2", "qwen3_vl"])
def test_packs_are_bounded_by_patches_and_halved_where_memory_runs_out(name: str, folders: dict[str, Path], images: list[Image.Image]) -> None:
    if name not in FAMILIES:
        pytest.skip("not in this version of transformers")
    expected = _encoder(folders[name]).encode(images)
    encoder, seen = _encoder(folders[name], max_patches_per_batch=100), []

    def refuse_more_than_one(_: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        pixels, grid = (args[0] if args else kwargs["pixel_values"]), kwargs.get("grid_thw")
        seen.append(len(pixels) if grid is None else len(grid))
        if seen[-1] > 1:
            raise torch.cuda.OutOfMemoryError("made up")

    with encoder.using_module() as tower:
        tower.register_forward_pre_hook(refuse_more_than_one, with_kwargs=True)
    torch.testing.assert_close(encoder.encode(images), expected, atol=1e-5, rtol=1e-5)
    assert 1 < max(seen) < len(images) + 1 and seen.count(1) == len(images)


def test_images_of_one_size_go_together(folders: dict[str, Path], images: list[Image.Image]) -> None:
    encoder, seen = _encoder(folders["clip"]), []
    with encoder.using_module() as tower:
        tower.register_forward_pre_hook(lambda _, args, kwargs: seen.append(len(kwargs["pixel_values"])), with_kwargs=True)
    encoder.encode(images)
    assert seen == [len(images)]


def test_a_processor_without_a_fixed_size_is_encoded_by_groups(tmp_path: Path, images: list[Image.Image]) -> None:
    folder = tiny_encoders.build("convnext", tmp_path)
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"do_resize": False}))
    encoder = _encoder(folder)
    torch.testing.assert_close(encoder.encode(images), torch.cat([encoder.encode([image]) for image in images]), atol=1e-5, rtol=1e-5)


def test_siglip2_does_not_count_its_padding(folders: dict[str, Path], images: list[Image.Image]) -> None:
    encoder = _encoder(folders["siglip2"])
    inputs = encoder.image_processor(images=[images[1]], return_tensors="pt")
    tokens = torch.randn(1, 16, 32)
    mask = inputs["pixel_attention_mask"]
    assert 0 < mask.sum() < 16
    row = pooled(transformers.modeling_outputs.BaseModelOutput(last_hidden_state=tokens), torch.nn.Linear(1, 1), mask)[0]
    torch.testing.assert_close(row, tokens[0][mask[0].bool()].mean(0))


def test_class_and_register_tokens_are_no_patches(folders: dict[str, Path]) -> None:
    with _encoder(folders["dinov3"]).using_module() as tower:
        tokens = torch.randn(2, 5 + 16, 32)
        rows = pooled(transformers.modeling_outputs.BaseModelOutput(last_hidden_state=tokens), tower)
    torch.testing.assert_close(torch.stack(rows), tokens[:, 5:].mean(1))


def test_published_names_of_a_gemma_tower_load_too(tmp_path: Path, folders: dict[str, Path], images: list[Image.Image]) -> None:
    folder = tiny_encoders.build("gemma3", tmp_path)
    file = folder / "model.safetensors"
    weights = {key: value.clone() for key, value in load_file(file).items()}
    prefix = next(key for key in weights if key.endswith("embeddings.patch_embedding.weight")).removesuffix("embeddings.patch_embedding.weight")
    # transformers 4 has the inner name in the tower's own names; what later versions leave out cannot be found by it.
    with _encoder(folders["gemma3"]).using_module() as tower:
        has_inner = any(name.startswith("vision_model.") for name in tower.state_dict())
    for other in ("vision_tower.vision_model.", "model.vision_tower.vision_model.", *(() if has_inner else ("model.vision_tower.",))):
        file.unlink()
        save_file({other + key.removeprefix(prefix) if key.startswith(prefix) else key: value for key, value in weights.items()}, file)
        assert torch.equal(_encoder(folder).encode(images[:1]), _encoder(folders["gemma3"]).encode(images[:1]))


def test_old_bin_checkpoints_load(tmp_path: Path, folders: dict[str, Path], images: list[Image.Image]) -> None:
    folder = tiny_encoders.build("clip", tmp_path)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert torch.equal(_encoder(folder).encode(images), _encoder(folders["clip"]).encode(images))


@pytest.mark.parametrize("name", FAMILIES)
def test_building_reads_no_weights_and_identity_ignores_dtype(name: str, tmp_path: Path) -> None:
    folder = tiny_encoders.build(name, tmp_path)
    fingerprint = _encoder(folder).identity.fingerprint
    assert fingerprint == _encoder(folder, dtype="bfloat16", device_map="cpu").identity.fingerprint and fingerprint.startswith("hf-")
    tiny_encoders.build(name, folder, seed=1)
    assert _encoder(folder).identity.fingerprint != fingerprint
    (folder / "model.safetensors").unlink()
    encoder = _encoder(folder)
    assert encoder.feature_dim and not encoder.is_loaded
    with pytest.raises(EncoderError, match="load the weights"):
        encoder.encode([Image.new("RGB", (64, 64))])
    with pytest.raises(EncoderError, match="find the weights"):
        _ = encoder.identity


def test_identity_follows_the_preprocessing(tmp_path: Path) -> None:
    folder, found = tiny_encoders.build("clip", tmp_path), set()
    file = folder / "preprocessor_config.json"
    original = json.loads(file.read_text())
    for change in (
        {},
        {"crop_size": {"height": 24, "width": 24}},
        {"size": {"shortest_edge": 40}},
        {"do_center_crop": False},
        {"image_mean": [0, 0, 0]},
    ):
        file.write_text(json.dumps(original | change))
        found.add(_encoder(folder).identity.fingerprint)
    assert len(found) == 5


def test_a_missing_weight_of_the_tower_is_named(tmp_path: Path, images: list[Image.Image]) -> None:
    folder = tiny_encoders.build("siglip", tmp_path)
    file = folder / "model.safetensors"
    weights = {key: value.clone() for key, value in load_file(file).items() if key != "vision_model.head.probe"}
    file.unlink()
    save_file(weights, file)
    with pytest.raises(EncoderError, match=r"head\.probe"):
        _encoder(folder).encode(images)


def test_a_vit_with_a_pooling_layer_uses_it(tmp_path: Path, images: list[Image.Image]) -> None:
    folder = tiny_encoders.build("vit", tmp_path)
    model = transformers.ViTModel(transformers.ViTConfig(**tiny_encoders.VISION)).eval()
    model.save_pretrained(folder)
    encoder = _encoder(folder)
    inputs = encoder.image_processor(images=images[:1], return_tensors="pt")
    torch.testing.assert_close(encoder.encode(images[:1]), model(**inputs).pooler_output.detach())


def test_half_precision_gives_float32_features_and_nan_is_named(folders: dict[str, Path], images: list[Image.Image]) -> None:
    expected = _encoder(folders["siglip"]).encode(images)
    features = _encoder(folders["siglip"], dtype="bfloat16").encode(images)
    assert features.dtype == torch.float32 and torch.nn.functional.cosine_similarity(features, expected).min() > 0.98
    encoder = _encoder(folders["siglip"])
    with encoder.using_module() as tower:
        next(tower.parameters()).fill_(torch.nan)
    with pytest.raises(FeatureError, match="image 0"):
        encoder.encode(images)


def test_features_can_train_also_when_made_under_inference_mode(folders: dict[str, Path], images: list[Image.Image]) -> None:
    for name in ("clip", "dinov2", "qwen2_vl"):
        with torch.inference_mode():
            features = _encoder(folders[name]).encode(images[:1])
        torch.nn.Linear(features.shape[1], 2)(features).sum().backward()


def test_a_text_model_is_refused_by_name(tmp_path: Path) -> None:
    transformers.BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(tmp_path)
    with pytest.raises(EncoderError, match="bert"):
        _encoder(tmp_path)


def test_pixel_limits_are_refused_where_they_mean_nothing(folders: dict[str, Path]) -> None:
    with pytest.raises(EncoderError, match="max_pixels"):
        _ = _encoder(folders["clip"], max_pixels=10_000).image_processor
    assert _encoder(folders["qwen2_vl"], max_pixels=10_000).image_processor.size["longest_edge"] == 10_000


def test_torchvision_is_never_imported(folders: dict[str, Path]) -> None:
    code = (
        "import sys; from PIL import Image; from vlmfilm_plugin.settings.layers import resolve\n"
        "from vlmfilm_plugin.encoders.registry import build_encoder\n"
        "for name in sys.argv[1:]:\n"
        "    e = build_encoder(resolve([('a', {'encoder': 'hf', 'model_name': name})])); e.encode([Image.new('RGB', (64, 64))])\n"
        "sys.exit('torchvision' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, *map(str, folders.values())], check=False).returncode == 0
