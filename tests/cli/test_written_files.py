"""What the commands write: never over an input or an existing file, whole or not there, readable as the umask says."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import run_code, succeed
from small_unet import SmallUNet, randomise

from vlmfilm_plugin import CheckpointError, StoreError, apply_adapter, attach, export_adapter
from vlmfilm_plugin.checkpoints.metadata import write_metadata
from vlmfilm_plugin.cli import main
from vlmfilm_plugin.encoders import _folder_digest as digests
from vlmfilm_plugin.encoders.base import EncoderIdentity
from vlmfilm_plugin.features.shuffle_pairs import PairsFile
from vlmfilm_plugin.features.store.protocol import StoredFeature
from vlmfilm_plugin.features.store.store import FeatureStore


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A FiLM checkpoint, a plain one, and a store with one feature."""
    torch.manual_seed(0)
    torch.save({"state_dict": SmallUNet().state_dict()}, tmp_path / "plain.ckpt")
    handle = attach(SmallUNet(), feature_dim=3, cond_dim=4)
    randomise(handle.film)
    checkpoint: dict[str, object] = {"state_dict": handle.unet.state_dict()}
    write_metadata(handle.unet, handle.settings, checkpoint)
    torch.save(checkpoint, tmp_path / "film.ckpt")
    with FeatureStore(tmp_path / "cache") as store:
        store.write(EncoderIdentity({"encoder": "test"}), [StoredFeature("unknown:a.png", np.ones(4))])
    return tmp_path


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o002)
    yield
    os.umask(before)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_no_command_writes_over_what_it_reads(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    film, plain, weights = (str(folder / name) for name in ("film.ckpt", "plain.ckpt", "w.safetensors"))
    assert main(["export", film, weights]) == 0
    store = folder / "cache" / "features.sqlite"
    os.link(film, folder / "hard.ckpt")
    (folder / "soft.ckpt").symlink_to(film)
    before = contents(folder), store.read_bytes()
    for command in (
        ["export", film, film],
        ["export", film, str(folder / "hard.ckpt")],
        ["export", str(folder / "soft.ckpt"), film],
        ["apply", weights, plain, "--output", plain],
        ["apply", weights, plain, "--output", weights],
        ["cache", "export", str(store), "--cache-dir", str(store.parent)],
    ):
        for force in ([], ["--force"]):
            assert main([*command, *force]) == 2, command
            assert "its input would be lost" in capsys.readouterr().err
    assert (contents(folder), store.read_bytes()) == before


def test_an_existing_file_is_replaced_by_force_alone_on_the_command_line_and_from_python(folder: Path) -> None:
    film, plain = folder / "film.ckpt", folder / "plain.ckpt"
    export_adapter(film, folder / "w.safetensors")
    (folder / "out").write_text("mine")
    cache = ["--cache-dir", str(folder / "cache")]
    for command in (["export", str(film)], ["apply", str(folder / "w.safetensors"), str(plain), "--output"], ["cache", "export", *cache]):
        assert main([*command, str(folder / "out")]) == 2
        assert (folder / "out").read_text() == "mine"
        assert main([*command, str(folder / "out"), "--force"]) == 0
        (folder / "out").write_text("mine")
    with pytest.raises(CheckpointError, match="the file exists"):
        export_adapter(film, folder / "out")
    with pytest.raises(CheckpointError, match="the file exists"):
        apply_adapter(folder / "w.safetensors", plain, folder / "out")
    assert (folder / "out").read_text() == "mine"
    export_adapter(film, folder / "out", force=True)
    apply_adapter(folder / "w.safetensors", plain, folder / "out", force=True)
    assert torch.load(folder / "out", weights_only=True)["state_dict"]


FULL = """
import resource, signal, sys
from vlmfilm_plugin.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
print([main([*command, "out"]) for command in (
    ["export", "film.ckpt"], ["apply", "w.safetensors", "plain.ckpt", "--output"], ["cache", "export", "--cache-dir", "cache"])])
"""


def test_a_full_disk_is_our_error_and_leaves_no_file(folder: Path) -> None:
    export_adapter(folder / "film.ckpt", folder / "w.safetensors")
    before = contents(folder)
    done = run_code(FULL, cwd=folder)
    assert succeed(done).splitlines() == ["[2, 2, 2]"]
    assert "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("Error: cannot ") == 3 and done.stderr.count("free space") == 3
    assert contents(folder) == before


def test_colleagues_can_read_and_write_what_the_umask_lets_them(folder: Path, umask: None) -> None:
    export_adapter(folder / "film.ckpt", folder / "w.safetensors")
    apply_adapter(folder / "w.safetensors", folder / "plain.ckpt", folder / "both.ckpt")
    assert main(["cache", "export", str(folder / "features.safetensors"), "--cache-dir", str(folder / "cache")]) == 0
    PairsFile(str(folder / "pairs.csv")).write([("a", "b")], 1)
    digests._write(folder / digests.MEMORY, {"a": "b"})
    with FeatureStore(folder / "shared") as store:
        store.write(EncoderIdentity({"encoder": "test"}), [StoredFeature("unknown:a.png", np.ones(4))])
        modes = {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in [*(folder / "shared").iterdir(), *folder.glob("*.*")]}
    written = {"features.sqlite", "features.sqlite-wal", "w.safetensors", "both.ckpt", "features.safetensors", "pairs.csv", digests.MEMORY}
    assert {name: modes[name] for name in written} == dict.fromkeys(written, "0o664")


def test_pairs_go_to_no_file_that_holds_something_else(folder: Path) -> None:
    (folder / "list.csv").write_text("image,donor,step\na,b,1\n")
    (folder / "cut.csv").write_text("a,b,1\nc,d,2")
    (folder / "config.yaml").write_text("a: 1\n")
    before = contents(folder)
    for name in before:
        with pytest.raises(StoreError, match="something else"):
            PairsFile(str(folder / name)).write([("a", "b")], 1)
    assert contents(folder) == before
    for step in (1, 2):  # a run that goes on writes to the same file
        PairsFile(str(folder / "pairs.csv")).write([('odd "name",\n', "ü" * 5000)], step)
    assert (folder / "pairs.csv").read_text().count(",") == 2 * 3


def test_a_full_disk_takes_no_line_of_pairs_apart(tmp_path: Path) -> None:
    code = """
import resource, signal
from vlmfilm_plugin.errors import StoreError
from vlmfilm_plugin.features.shuffle_pairs import PairsFile
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
pairs = PairsFile("pairs.csv")
try:
    for step in range(100):
        pairs.write([("image", "donor")], step)
except StoreError as error:
    print(step, error.headline)
"""
    assert succeed(run_code(code, cwd=tmp_path)).split(" ", 1)[1] == "cannot write the pairs of mode shuffle\n"
    lines = (tmp_path / "pairs.csv").read_text().split("\n")
    assert lines.pop() == "" and lines == [f"image,donor,{step}" for step in range(len(lines))] and lines
