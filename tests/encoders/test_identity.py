"""Whose weights: the identity of a local model is that of the very files it is loaded from, and what it was called before is known."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_encoders
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_unet import SmallUNet
from transformers import AutoConfig

from vlmfilm_plugin import CheckpointError, attach
from vlmfilm_plugin.encoders import _folder_digest as digests
from vlmfilm_plugin.encoders.base import EncoderIdentity
from vlmfilm_plugin.encoders.registry import build_encoder
from vlmfilm_plugin.errors import EncoderError
from vlmfilm_plugin.features.provider import FeatureProvider
from vlmfilm_plugin.features.samples import Sample
from vlmfilm_plugin.features.store.protocol import SourceStamp, StoredFeature
from vlmfilm_plugin.features.store.store import FeatureStore
from vlmfilm_plugin.settings.layers import resolve

IMAGES = tiny_encoders.noise([(40, 40)])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a folder a model; copy them, do not change them."""
    from tiny_qwen import build

    folder = tmp_path_factory.mktemp("models")
    return {name: tiny_encoders.build(name, folder / name) for name in ("clip", "dinov2")} | {"qwen": build(folder / "qwen")}


@pytest.fixture
def clip(models: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(models["clip"], tmp_path / "clip"))


def settings_of(folder: Path, **values: object) -> Any:
    # One memory of digests a folder, as one user has.
    values = {"encoder": "hf", "model_name": str(folder), "cache_dir": str(folder.parent / "cache"), **values}
    return resolve([("arguments", values)])


def encoder_of(folder: Path, **values: object) -> Any:
    return build_encoder(settings_of(folder, **values))


def name_of(folder: Path, **values: object) -> str:
    return str(encoder_of(folder, **values).identity.fingerprint)


def changed(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value + 1 for key, value in weights.items()}


# The files that are loaded


def test_a_bin_is_identified_although_unused_safetensors_lie_beside_it(clip: Path) -> None:
    weights = load_file(clip / "model.safetensors")
    (clip / "model.safetensors").rename(clip / "model.fp16.safetensors")
    torch.save(weights, clip / "pytorch_model.bin")
    first, feature = name_of(clip), encoder_of(clip).encode(IMAGES)
    torch.save(changed(weights), clip / "pytorch_model.bin")
    assert name_of(clip) != first and not torch.allclose(encoder_of(clip).encode(IMAGES), feature)
    second = name_of(clip)
    (clip / "model.fp16.safetensors").unlink()
    assert name_of(clip) == second


def test_a_shard_in_a_folder_below_is_identified(clip: Path) -> None:
    weights = load_file(clip / "model.safetensors")
    (clip / "model.safetensors").unlink()
    (clip / "parts").mkdir()
    save_file(weights, clip / "parts" / "one.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "parts/one.safetensors")}
    (clip / "model.safetensors.index.json").write_text(json.dumps(index))
    first, feature = name_of(clip), encoder_of(clip).encode(IMAGES)
    assert encoder_of(clip).identity.formerly == ()  # the first version hashed no weight at all
    save_file(changed(weights), clip / "parts" / "one.safetensors")
    assert name_of(clip) != first and not torch.allclose(encoder_of(clip).encode(IMAGES), feature)


@pytest.mark.parametrize("name", ["clip", "dinov2"])
def test_without_weights_there_is_no_identity(models: dict[str, Path], tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(models[name], tmp_path / "m"))
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    with pytest.raises(EncoderError, match="find the weights"):
        name_of(folder)
    (folder / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(EncoderError, match="find the weights"):
        name_of(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(weights, "gone.safetensors")}))
    with pytest.raises(EncoderError, match=r"gone\.safetensors"):
        name_of(folder)


def test_a_file_rewritten_in_place_with_its_size_and_time_is_another(clip: Path) -> None:
    file = clip / "model.safetensors"
    weights, status = load_file(file), file.stat()
    time.sleep(0.2)
    first = name_of(clip)
    with file.open("r+b") as held:
        other = clip.parent / "other.safetensors"
        save_file(changed(weights), other, metadata={"format": "pt"})
        held.write(other.read_bytes())
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    now = file.stat()
    assert (now.st_size, now.st_mtime_ns, now.st_ino) == (status.st_size, status.st_mtime_ns, status.st_ino)
    assert name_of(clip) != first


def test_a_file_that_was_just_written_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"one")
    stamp = digests.FileStamp.of(file)
    # Two writes within one tick of the clock leave the same stamp.
    monkeypatch.setattr(digests.FileStamp, "of", classmethod(lambda cls, path: stamp))
    first = digests.folder_digest(tmp_path, [file.name], str(tmp_path / "cache"))
    file.write_bytes(b"two")
    assert digests.folder_digest(tmp_path, [file.name], str(tmp_path / "cache")) != first


@pytest.mark.parametrize("is_loaded_first", [False, True])
def test_weights_that_change_between_identity_and_loading_are_refused(clip: Path, is_loaded_first: bool) -> None:
    encoder = encoder_of(clip)
    _ = encoder.encode(IMAGES) if is_loaded_first else encoder.identity
    file = clip / "model.safetensors"
    save_file(changed(load_file(file)), clip / "new", metadata={"format": "pt"})
    os.replace(clip / "new", file)
    with pytest.raises(EncoderError, match="changed while it was in use"):
        _ = encoder.identity if is_loaded_first else encoder.encode(IMAGES)
    assert encoder.is_loaded == is_loaded_first


def test_two_sets_of_weights_are_refused_and_an_index_of_the_one_file_is_none(clip: Path) -> None:
    weights = load_file(clip / "model.safetensors")
    index = clip / "model.safetensors.index.json"
    first = name_of(clip)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(weights, "model.safetensors")}))
    assert name_of(clip) == first
    save_file(changed(weights), clip / "other.safetensors")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(weights, "other.safetensors")}))
    with pytest.raises(EncoderError, match="two sets"):
        name_of(clip)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/outside.safetensors", "parts/../../outside.safetensors"])
def test_an_index_cannot_name_a_file_outside_the_folder(clip: Path, name: str) -> None:
    weights = load_file(clip / "model.safetensors")
    (clip / "model.safetensors").rename(clip.parent / "outside.safetensors")
    (clip / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(weights, name)}))
    with pytest.raises(EncoderError, match="index"):
        name_of(clip)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}', "[" * 100_000])
def test_an_index_that_is_none_is_refused(clip: Path, content: str) -> None:
    (clip / "model.safetensors").unlink()
    (clip / "model.safetensors.index.json").write_text(content)
    with pytest.raises(EncoderError, match="index"):
        name_of(clip)


def test_a_model_behind_links_is_the_same_model(clip: Path, tmp_path: Path) -> None:
    linked = tmp_path / "snapshots" / "abc"
    linked.mkdir(parents=True)
    for file in clip.iterdir():
        (linked / file.name).symlink_to(file)
    assert name_of(linked) == name_of(clip)
    assert torch.equal(encoder_of(linked).encode(IMAGES), encoder_of(clip).encode(IMAGES))


# Other files that decide a feature


def test_the_tokenizer_is_part_of_text_mode_and_answers_and_of_nothing_else(models: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models["qwen"], tmp_path / "qwen"))
    modes = [{"encoder": "qwen2_5_vl"}, {"encoder": "qwen2_5_vl", "use_text_prompt_cond": True}, {"encoder": "questionnaire"}]
    before = [name_of(folder, **mode) for mode in modes]
    file = folder / "tokenizer.json"
    file.write_text(file.read_text() + "\n")
    assert [name_of(folder, **mode) == old for mode, old in zip(modes, before, strict=True)] == [True, False, False]
    before = [name_of(folder, **mode) for mode in modes]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 5}))
    assert [name_of(folder, **mode) == old for mode, old in zip(modes, before, strict=True)] == [True, False, True]


def test_another_class_of_image_processor_and_a_rare_value_are_part_of_the_identity(clip: Path) -> None:
    file, found = clip / "preprocessor_config.json", set()
    original = json.loads(file.read_text())
    for change in ({}, {"image_processor_type": "BitImageProcessor"}, {"do_flip_channel_order": True}):
        file.write_text(json.dumps(original | change))
        found.add(name_of(clip))
    assert len(found) == 3
    file.write_text(json.dumps(original | {"image_processor_type": "CLIPImageProcessorFast"}))
    assert name_of(clip) in found


# Folders from which something else would be loaded, or run


def test_what_peft_has_saved_is_refused_by_name(clip: Path) -> None:
    (clip / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "elsewhere/base", "peft_type": "LORA"}))
    with pytest.raises(EncoderError, match=r"(?s)PEFT.*merge"):
        encoder_of(clip)


def test_a_distributed_checkpoint_is_refused_by_name(clip: Path) -> None:
    shutil.copy(clip / "model.safetensors", clip / "shard-00000-model-00001-of-00001.safetensors")
    with pytest.raises(EncoderError, match="distributed checkpoint"):
        encoder_of(clip)


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json", "tokenizer_config.json"])
def test_code_of_a_model_folder_never_runs(models: dict[str, Path], tmp_path: Path, file: str) -> None:
    folder = Path(shutil.copytree(models["qwen"], tmp_path / "qwen"))
    (folder / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Theirs: pass\n")
    content = json.loads((folder / file).read_text())
    names = ("AutoConfig", "AutoModel", "AutoImageProcessor", "AutoTokenizer")
    content["auto_map"] = {name: ["theirs.Theirs", None] if name == "AutoTokenizer" else "theirs.Theirs" for name in names}
    content |= {"model_type": "theirs"} if file == "config.json" else {"image_processor_type": "Theirs", "tokenizer_class": "Theirs"}
    (folder / file).write_text(json.dumps(content))
    try:
        encoder_of(folder, encoder="qwen2_5_vl", use_text_prompt_cond=True).encode(IMAGES)
    except EncoderError as error:
        assert "trust_remote_code=True" not in str(error)
    assert not (tmp_path / "ran").exists()


def test_attention_code_of_the_hub_is_refused_by_name(clip: Path) -> None:
    content = json.loads((clip / "config.json").read_text())
    (clip / "config.json").write_text(json.dumps(content | {"attn_implementation": "someone/attention"}))
    if "/" not in str(AutoConfig.from_pretrained(clip)._attn_implementation):
        pytest.skip("this version of transformers takes no attention from config.json")
    with pytest.raises(EncoderError, match="someone/attention"):
        encoder_of(clip)


class _Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["clip", "dinov2"])
def test_a_pickle_in_a_bin_never_runs(models: dict[str, Path], tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(models[name], tmp_path / "m"))
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({**weights, "payload": _Payload(tmp_path / "ran")}, folder / "pytorch_model.bin")
    encoder = encoder_of(folder)
    with pytest.raises(EncoderError):
        _ = encoder.identity
    with pytest.raises(EncoderError):
        encoder.encode(IMAGES)
    assert not (tmp_path / "ran").exists()


# What people have: names that the first version gave


def first_versions_name(folder: Path, facts: Mapping[str, object], processor: Any) -> str:
    """Return the fingerprint as the first version made it, written anew from its definition."""
    state = hashlib.blake2b((folder / "config.json").read_bytes(), digest_size=8)
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    for file in files:
        state.update(f"{file.name}:{hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()};".encode())
    held, keys = processor.to_dict(), ("do_resize", "resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
    values = {key: held.get(key) for key in (*keys, "do_convert_rgb", "patch_size", "temporal_patch_size", "merge_size")}
    more = ("do_center_crop", "crop_size", "crop_pct", "do_pad", "pad_size", "max_num_patches", "do_pan_and_scan")
    values |= {key: held[key] for key in more if held.get(key) is not None}
    size = processor.size
    values["size"] = [size["height"], size["width"]] if size.get("height") is not None else [size.get("shortest_edge"), size.get("longest_edge")]
    preprocessing = hashlib.blake2b(json.dumps(values, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()
    every = {**facts, "model": f"folder:{state.hexdigest()}", "revision": None, "preprocessing": {"values": preprocessing}}
    return f"{facts['encoder']}-{hashlib.blake2b(json.dumps(every, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()}"


CLIP_FACTS = {"encoder": "hf", "mode": "image", "model_type": "clip"}


def test_a_plain_folder_keeps_its_name(clip: Path) -> None:
    encoder = encoder_of(clip)
    assert encoder.identity.fingerprint == first_versions_name(clip, CLIP_FACTS, encoder.image_processor) and encoder.identity.formerly == ()


def test_a_former_name_is_known_where_its_files_held_the_weights(clip: Path, models: dict[str, Path]) -> None:
    shutil.copy(clip / "model.safetensors", clip / "unused.safetensors")
    encoder = encoder_of(clip)
    assert encoder.identity.formerly == (first_versions_name(clip, CLIP_FACTS, encoder.image_processor),)
    text = encoder_of(models["qwen"], encoder="qwen2_5_vl", use_text_prompt_cond=True, cache_dir=str(clip.parent / "cache"))
    facts = {"encoder": "qwen2_5_vl", "mode": "text", "pooling": "mean", "prompt": text.settings.prompt, "max_new_tokens": 48}
    assert text.identity.formerly == (first_versions_name(models["qwen"], facts, text.image_processor),)


def test_a_former_name_is_not_known_where_its_files_did_not_hold_the_weights(clip: Path) -> None:
    torch.save(load_file(clip / "model.safetensors"), clip / "pytorch_model.bin")
    (clip / "model.safetensors").rename(clip / "model.fp16.safetensors")
    assert encoder_of(clip).identity.formerly == ()


def test_features_under_a_former_name_are_found_and_the_weights_are_not_read(clip: Path, tmp_path: Path) -> None:
    shutil.copy(clip / "model.safetensors", clip / "unused.safetensors")
    provider = FeatureProvider.from_settings(settings_of(clip))
    former = EncoderIdentity(provider.encoder.identity.former[0])
    assert former.fingerprint == provider.encoder.identity.formerly[0] != provider.encoder.identity.fingerprint
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for number, path in enumerate(paths):
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    rows = [StoredFeature(f"train:{path.name}", np.full(20, number, np.float32), SourceStamp.of(path)) for number, path in enumerate(paths[:2])]
    with FeatureStore(tmp_path / "cache") as store:
        store.write(former, rows)
    samples = [Sample(f"train:{path.name}", path, lambda path=path: Image.open(path)) for path in paths]  # type: ignore[misc]
    assert torch.equal(provider.get(samples[:2])[:, 0], torch.tensor([0.0, 1.0])) and not provider.encoder.is_loaded
    assert provider.store.keys(provider.encoder.identity) == ["train:0.png", "train:1.png"]
    third = provider.get(samples)[2]
    assert provider.encoder.is_loaded and provider.stats.miss == 1
    # What is stored now stands before what was stored then.
    provider.store.write(provider.encoder.identity, [rows[0]._replace(feature=third.numpy())])
    again = FeatureProvider.from_settings(settings_of(clip)).get(samples[:1])[0]
    torch.testing.assert_close(again, third.half().float())


def test_a_checkpoint_of_a_former_name_loads_and_of_any_other_does_not(clip: Path) -> None:
    shutil.copy(clip / "model.safetensors", clip / "unused.safetensors")
    values = {"encoder": "hf", "model_name": str(clip), "cache_dir": str(clip.parent / "cache")}
    unet = SmallUNet()
    attach(unet, **values)
    state = unet.state_dict()
    key = next(key for key in state if key.endswith("vlm_film._extra_state"))
    content = json.loads(bytes(state[key].tolist()))
    former = encoder_of(clip).identity.formerly[0]
    for name, is_known in ((former, True), ("hf-0123456789abcdef", False)):
        state[key] = torch.tensor(list(json.dumps(content | {"fingerprint": name}).encode()), dtype=torch.uint8)
        if is_known:
            unet.load_state_dict(state)
            continue
        with pytest.raises(CheckpointError, match="another encoder"):
            unet.load_state_dict(state)
    assert content["fingerprint"] == json.loads(bytes(unet.state_dict()[key].tolist()))["fingerprint"]  # saved under today's name
