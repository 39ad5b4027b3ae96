"""Ways in which an image could get a feature that is not its own, or a run another mode than it was asked for: each is shut."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from processes import environment
from small_unet import SmallUNet, inputs, randomise

from vlmfilm_plugin import ConditionError, SettingsError, StoreError, attach
from vlmfilm_plugin.features.provider import FeatureProvider
from vlmfilm_plugin.features.shuffle import Shuffle
from vlmfilm_plugin.features.shuffle_donor import DataSets, ShuffleDonors
from vlmfilm_plugin.features.store.store import FeatureStore
from vlmfilm_plugin.host_spec import UNet
from vlmfilm_plugin.run.runtime import Runtime
from vlmfilm_plugin.settings.layers import resolve

UNET = UNet(cls=SmallUNet, targets={"post_block2": "ups.*.1"})
IMAGE = torch.zeros(1, 1, 8, 8)


def picture(path: Path, value: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((20, 20), value, dtype=np.uint8)).save(path)
    return path


def source(cache: Path, **values: object) -> FeatureProvider:
    return FeatureProvider.from_settings(resolve([("arguments", {"encoder": "descriptor", "cache_dir": str(cache), **values})]))


def batch(*paths: Path) -> dict[str, Any]:
    return {"image": torch.zeros(len(paths), 1, 8, 8), "name": [path.name for path in paths], "filepath": [str(path) for path in paths]}


def feature_of(features: FeatureProvider, path: Path) -> np.ndarray[Any, Any]:
    return features.get(features.samples_of(batch(path), IMAGE, (0.0, 1.0)))[0]


def runtime(cache: Path, mode: str = "on", **variables: str) -> Runtime:
    raw = {"VLM_FILM_FEATURE_TRANSFORM": "none"}
    return Runtime(mode, {"VLM_FILM_ENCODER": "descriptor", "VLM_FILM_CACHE_DIR": str(cache), **raw, **variables}, str(cache))


def test_two_files_of_one_name_size_and_time_keep_their_own_features(tmp_path: Path) -> None:
    files = [picture(tmp_path / folder / "0001.bmp", value) for folder, value in (("p1", 40), ("p2", 200))]
    for path in files:
        os.utime(path, (1_700_000_000, 1_700_000_000))
    features = source(tmp_path / "cache")
    first, second = feature_of(features, files[0]), feature_of(features, files[1])
    assert np.abs(first - second).max() > 0.1
    again = source(tmp_path / "cache")
    np.testing.assert_array_equal(feature_of(again, files[1]), second)
    np.testing.assert_array_equal(feature_of(again, files[0]), first)


def test_a_moved_data_set_is_not_encoded_again(tmp_path: Path) -> None:
    path = picture(tmp_path / "a" / "1.png", 40)
    features = source(tmp_path / "cache")
    feature_of(features, path)
    shutil.move(tmp_path / "a", tmp_path / "b")
    moved = source(tmp_path / "cache", on_missing_feature="error")
    feature_of(moved, tmp_path / "b" / "1.png")


def test_two_models_of_one_process_keep_their_own_encoders_and_stores(tmp_path: Path) -> None:
    run = Runtime("on", {"VLM_FILM_ENCODER": "descriptor"}, str(tmp_path))
    handles = []
    for name in ("first", "second"):
        run.host_config({"cache_dir": str(tmp_path / name)}, None)
        handle = run.attach(SmallUNet(), UNET)
        assert handle is not None
        handles.append(handle)
    assert [run.states.of(handle.film).provider.store.path.parent.name for handle in handles] == ["first", "second"]


def test_an_encoder_that_changed_under_a_running_process_is_refused(tmp_path: Path, tiny_qwen: Path) -> None:
    from vlmfilm_plugin import EncoderError

    model = shutil.copytree(tiny_qwen, tmp_path / "model")
    run = runtime(tmp_path, VLM_FILM_ENCODER="qwen2_5_vl", VLM_FILM_MODEL_NAME=str(model))
    handle = run.attach(SmallUNet(), UNET)
    assert handle is not None
    weights = next(model.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(EncoderError, match="not the one FiLM was built for"):
        run.states.of(handle.film)


def test_the_partner_of_a_shuffled_image_alone_is_another_image_whatever_its_key(tmp_path: Path) -> None:
    path, twin = picture(tmp_path / "test" / "1.png", 40), tmp_path / "copy" / "1.png"
    picture(twin, 40)
    other = picture(tmp_path / "test" / "2.png", 200)
    features = source(tmp_path / "cache")
    for known in (path, twin, other):
        features.get(features.samples_of({"image": IMAGE, "filepath": [str(known)]}, IMAGE, (0.0, 1.0)))
    sample = features.samples_of({"image": IMAGE, "filepath": [str(path)]}, IMAGE, (0.0, 1.0))[0]
    wanted = feature_of(features, other)
    for seed in range(20):
        drawn = ShuffleDonors(features, Shuffle(), DataSets()).draw(sample, seed)
        assert drawn is not None
        np.testing.assert_array_equal(drawn[1], wanted)


def test_with_known_data_sets_the_partner_depends_on_seed_and_data_set_alone(tmp_path: Path) -> None:
    files = {f"test/image/{i}.png": picture(tmp_path / "test" / f"{i}.png", 20 * i) for i in range(1, 9)}
    train = {"train/image/1.png": picture(tmp_path / "train" / "1.png", 250)}
    known = DataSets()
    for data_set in (train, files):
        known.learn((name, str(path)) for name, path in data_set.items())
    draws = []
    for is_warm in (False, True):
        features = source(tmp_path / f"cache-{is_warm}")
        if is_warm:
            for path in (files | train).values():
                feature_of(features, path)
        sample = features.samples_of(batch(tmp_path / "test" / "3.png"), IMAGE, (0.0, 1.0))[0]
        draws.append([ShuffleDonors(features, Shuffle(), known).draw(sample, step)[0] for step in range(12)])  # type: ignore[index]
    assert draws[0] == draws[1] and len(set(draws[0])) > 3
    assert not any("train" in key or key.endswith("test/image/3.png") for key in draws[0])


def test_one_given_feature_cannot_be_shuffled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM_FILM_MODE", "shuffle")
    handle = attach(SmallUNet(), feature_dim=3)
    for features in (torch.ones(1, 3), torch.ones(2, 3)):
        with pytest.raises(ConditionError, match="cannot shuffle"), handle.condition(features):
            handle.unet(*inputs(2))


def test_given_rows_of_one_image_exchange_with_other_images_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM_FILM_MODE", "shuffle")
    handle = attach(SmallUNet(), feature_dim=3, cond_dim=4)
    randomise(handle.film)
    a, b = torch.randn(2, 3)
    x, t, cond = (part[:1].expand(4, *part.shape[1:]) for part in inputs(1))
    with torch.no_grad():
        with handle.condition(torch.stack([a, a, b, b])):
            found = handle.unet(x, t, cond)
        handle.film.mode = "on"
        with handle.condition(torch.stack([b, b, a, a])):
            assert torch.allclose(found, handle.unet(x, t, cond), atol=1e-6)


def test_an_inner_step_with_other_images_is_conditioned_on_them(tmp_path: Path) -> None:
    run, owner = runtime(tmp_path), SimpleNamespace(global_step=1)
    handle = run.attach(SmallUNet(), UNET)
    assert handle is not None
    randomise(handle.film)
    images = [torch.rand(2, 1, 8, 8) for _ in range(2)]
    args = inputs(2)

    def output(outer: torch.Tensor | None, inner: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), run.batch({"image": inner}, phase="val", value_range=(0.0, 1.0), owner=owner):
            return handle.unet(*args)

    alone = [output(None, image) for image in images]
    with run.batch({"image": images[0], "name": ["a", "b"]}, phase="val", value_range=(0.0, 1.0)):
        assert torch.equal(output(images[0], images[0].clone()), alone[0])
        assert torch.equal(output(images[0], images[1]), alone[1])
    assert not torch.allclose(alone[0], alone[1])


def test_a_pickled_model_does_not_bring_its_mode_into_a_run_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = attach(SmallUNet(), feature_dim=3)
    content = pickle.dumps(handle.unet)
    monkeypatch.setenv("VLM_FILM_MODE", "shuffle")
    unet = pickle.loads(content)
    with pytest.raises(SettingsError, match="carries FiLM in mode on"):
        unet(*inputs(2))


def test_settings_that_say_no_film_are_refused() -> None:
    with pytest.raises(SettingsError, match="say not to"):
        attach(SmallUNet(), feature_dim=3, use_vlm_film=False)


def test_images_without_files_are_named_once_a_phase(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = runtime(tmp_path)
    handle = run.attach(SmallUNet(), UNET)
    assert handle is not None
    for phase in ("train", "val", "val"):
        with torch.no_grad(), run.batch({"image": torch.rand(2, 1, 8, 8)}, phase=phase, value_range=(0.0, 1.0), step=1, batch_idx=1):
            handle.unet(*inputs(2))
    output = capsys.readouterr().out
    assert output.count("no source file was found for train images") == output.count("no source file was found for val images") == 1


READ_ONLY = """
import sys
from vlmfilm_plugin import StoreError
from vlmfilm_plugin.encoders.base import EncoderIdentity
from vlmfilm_plugin.features.store.protocol import StoredFeature
from vlmfilm_plugin.features.store.store import FeatureStore
import numpy as np
store = FeatureStore(sys.argv[1])
identity = EncoderIdentity({"encoder": "x"})
assert list(store.read(identity, ["a"])) == ["a"]
try:
    store.write(identity, [StoredFeature("b", np.ones(3))])
except StoreError as error:
    print("REFUSED", error)
"""


def test_a_complete_store_on_a_read_only_mount_is_read_and_a_write_is_refused(tmp_path: Path) -> None:
    from vlmfilm_plugin.encoders.base import EncoderIdentity
    from vlmfilm_plugin.features.store.protocol import StoredFeature

    with FeatureStore(tmp_path / "cache") as store:
        store.write(EncoderIdentity({"encoder": "x"}), [StoredFeature("a", np.ones(3))])
    mount = f"mount --bind {tmp_path}/cache {tmp_path}/cache && mount -o remount,ro,bind {tmp_path}/cache"
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody mount a folder read-only")
    script = tmp_path / "read.py"
    script.write_text(READ_ONLY)
    command = f"{mount} && exec {sys.executable} {script} {tmp_path}/cache"
    done = subprocess.run(["unshare", "-m", "sh", "-c", command], capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
    assert "REFUSED cannot write the feature store" in done.stdout and "fix:" in done.stdout


def test_a_store_is_refused_where_there_is_none_to_read(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError):
        source(tmp_path / "file" / "cache")


def test_film_settings_that_are_no_mapping_are_named() -> None:
    from vlmfilm_plugin.hooks.sofl_seg import read_config

    with pytest.raises(SettingsError, match=r"found: +7"):
        read_config({"config": {"model": {"vlm_film_config": 7}}})
    assert resolve([("host", read_config({"config": {"model": {"vlm_film_config": {"cond_dim": 8}}}}))]).cond_dim == 8
