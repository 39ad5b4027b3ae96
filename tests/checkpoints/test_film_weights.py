"""FiLM weights alone: exported, applied to another checkpoint, in the port's names; nothing else moves."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from small_unet import SmallUNet, randomise
from torch import nn

from vlmfilm_plugin import CheckpointError, apply_adapter, attach, export_adapter
from vlmfilm_plugin.checkpoints.metadata import write_metadata
from vlmfilm_plugin.checkpoints.peek import peek
from vlmfilm_plugin.cli import main


class Root(nn.Module):
    def __init__(self, seed: int, film: bool) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.unet = SmallUNet()
        self.tail = nn.Linear(2, 2)
        self.handle = attach(self.unet, feature_dim=3, cond_dim=4, decoder_stages=[1], gamma_scale=0.3) if film else None
        if self.handle is not None:
            randomise(self.handle.film)
            self.handle.fit(torch.randn(8, 3))


def save(root: Root, path: Path) -> Path:
    checkpoint: dict[str, object] = {"state_dict": root.state_dict(), "epoch": 3, "optimizer_states": [{"state": {}}]}
    if root.handle is not None:
        write_metadata(root, root.handle.settings, checkpoint)
    torch.save(checkpoint, path)
    return path


def test_a_weights_file_holds_film_alone_and_says_what_it_is(tmp_path: Path) -> None:
    root = Root(0, True)
    names = export_adapter(save(root, tmp_path / "film.ckpt"), tmp_path / "a.safetensors")
    assert set(names) == {name for name in root.state_dict() if "vlm_film" in name}
    with safe_open(str(tmp_path / "a.safetensors"), "pt") as file:
        described = json.loads(file.metadata()["vlmfilm"])
    assert described["architecture"]["gamma_scale"] == 0.3 and [stage["index"] for stage in described["architecture"]["stages"]] == [1]


def test_applied_to_a_baseline_it_gives_the_baselines_host_and_the_files_film(tmp_path: Path) -> None:
    film, plain = Root(0, True), Root(1, False)
    export_adapter(save(film, tmp_path / "film.ckpt"), tmp_path / "a.safetensors")
    before = save(plain, tmp_path / "plain.ckpt").read_bytes()
    assert main(["apply", str(tmp_path / "a.safetensors"), str(tmp_path / "plain.ckpt")]) == 0
    assert (tmp_path / "plain.ckpt").read_bytes() == before
    out = tmp_path / "plain-film.ckpt"
    content = torch.load(out, weights_only=False)
    assert content["epoch"] == 3 and "optimizer_states" not in content and content["vlm_film_trained_stages"] == [1]
    loaded = Root(2, True)
    # Order and names are those of a model that was built with FiLM.
    assert list(content["state_dict"]) == list(loaded.state_dict())
    loaded.load_state_dict(content["state_dict"])
    assert film.handle is not None and loaded.handle is not None
    given = torch.randn(4, 3)
    assert torch.equal(loaded.handle.film.transform(given), film.handle.film.transform(given))
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, (film if "vlm_film" in name else plain).state_dict()[name])
    facts = peek(out)
    assert facts is not None and facts.architecture["decoder_stages"] == [1]
    assert main(["apply", str(tmp_path / "a.safetensors"), str(tmp_path / "plain.ckpt")]) == 2  # the copy exists


def test_the_ports_layout_has_its_names_and_is_not_applied(tmp_path: Path) -> None:
    film = save(Root(0, True), tmp_path / "film.ckpt")
    assert main(["export", str(film), str(tmp_path / "p.safetensors"), "--layout", "port"]) == 0
    with safe_open(str(tmp_path / "p.safetensors"), "pt") as file:
        assert {"vlm_film_heads.0.mlp.2.weight", "vlm_film_conditioner.image_to_cond.proj.weight"} <= set(file.keys())
    with pytest.raises(CheckpointError, match="layout"):
        apply_adapter(tmp_path / "p.safetensors", film, tmp_path / "out.ckpt")


def test_what_cannot_be_moved_is_refused(tmp_path: Path) -> None:
    plain = save(Root(0, False), tmp_path / "plain.ckpt")
    with pytest.raises(CheckpointError, match="holds none"):
        export_adapter(plain, tmp_path / "a.safetensors")
    export_adapter(save(Root(0, True), tmp_path / "film.ckpt"), tmp_path / "a.safetensors")
    torch.save({"state_dict": {"other.weight": torch.ones(1)}}, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match="no such UNet"):
        apply_adapter(tmp_path / "a.safetensors", tmp_path / "other.ckpt", tmp_path / "out.ckpt")
    (tmp_path / "junk").write_text("junk")
    with pytest.raises(CheckpointError, match="cannot read the FiLM weights"):
        apply_adapter(tmp_path / "junk", plain, tmp_path / "out.ckpt")
    with pytest.raises(CheckpointError, match="cannot read the checkpoint"):
        export_adapter(tmp_path / "junk", tmp_path / "b.safetensors")
    assert not (tmp_path / "out.ckpt").exists()


def test_a_damaged_file_is_refused_and_one_of_the_first_version_has_no_digest(tmp_path: Path) -> None:
    weights, plain = tmp_path / "a.safetensors", save(Root(1, False), tmp_path / "plain.ckpt")
    export_adapter(save(Root(0, True), tmp_path / "film.ckpt"), weights)
    whole = weights.read_bytes()
    (header,) = struct.unpack("<Q", whole[:8])
    # In a weight, and in a word of the description: safetensors sees neither.
    for place in (header + 8, len(whole) - 1, whole.index(b"descriptor") if b"descriptor" in whole else whole.index(b"film") + 1):
        weights.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(CheckpointError, match="damaged"):
            apply_adapter(weights, plain, tmp_path / "out.ckpt")
    assert not (tmp_path / "out.ckpt").exists()
    content = json.loads(whole[8 : 8 + header])
    del content["__metadata__"]["digest"]
    text = json.dumps(content).encode()
    weights.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + header :])
    assert apply_adapter(weights, plain, tmp_path / "out.ckpt")


@pytest.mark.parametrize(
    "value",
    [
        1.5,
        None,
        "text",
        {"a": 1},
        torch.zeros(3, device="meta"),
        torch.eye(3).to_sparse(),
        torch.zeros(1).expand(2**40),
        torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    ],
    ids=["number", "none", "text", "mapping", "meta", "sparse", "spread out", "quantised"],
)
def test_what_is_no_plain_tensor_is_named_and_never_exported(value: object, tmp_path: Path) -> None:
    content = torch.load(save(Root(0, True), tmp_path / "film.ckpt"), weights_only=True)
    name = next(name for name in content["state_dict"] if "vlm_film" in name)
    content["state_dict"][name] = value
    torch.save(content, tmp_path / "film.ckpt")
    with pytest.raises(CheckpointError, match="no plain tensor") as caught:
        export_adapter(tmp_path / "film.ckpt", tmp_path / "out")
    assert caught.value.facts["name"] == name


@pytest.mark.parametrize("state", [None, [], {1: torch.zeros(1)}, "text"])
def test_a_state_dict_that_is_none_is_refused_by_both(state: object, tmp_path: Path) -> None:
    export_adapter(save(Root(0, True), tmp_path / "film.ckpt"), tmp_path / "weights")
    torch.save({"state_dict": state}, tmp_path / "strange.ckpt")
    for work in (
        lambda: export_adapter(tmp_path / "strange.ckpt", tmp_path / "out"),
        lambda: apply_adapter(tmp_path / "weights", tmp_path / "strange.ckpt", tmp_path / "out"),
    ):
        with pytest.raises(CheckpointError, match="its `state_dict` is none"):
            work()
