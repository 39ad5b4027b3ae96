"""Whose feature each row gets on hosts that name nothing: an independent probe (`row_probe`) solves for gamma and beta, row by row.

The real repos run where VLMFILM_SOFT_SEG_REPO and VLMFILM_MEDSEGDIFF_REPO name their folders.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from processes import DEMO_HOST, python, succeed
from row_probe import make_isic, make_splits
from stand_in import SETTINGS as STAND_IN

# Whose feature a row got is solved for: features as they are.
SETTINGS = {**STAND_IN, "VLM_FILM_FEATURE_TRANSFORM": "none"}
HERE = Path(__file__).parent
WORKERS = ["2:fork", "2:spawn"]
# A data set class that is nobody's base: names without files, random crops and flips, several crops of an image.
UNWATCHED = """
import os
import lightning.pytorch as L
import numpy as np
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from src.registry.base import DATASET_REGISTRY


class OCTADataset(Dataset):
    def __init__(self, path, augmentation=False, crop_size=24, num_samples_per_image=1):
        self.augmentation, self.crop, self.crops = augmentation, crop_size, num_samples_per_image
        self.data = [
            {**{kind: os.path.join(path, kind, file) for kind in ("image", "label", "label_prob")}, "name": f"{os.path.basename(path)}/image/{file}"}
            for file in sorted(os.listdir(os.path.join(path, "image")))
        ]

    def __len__(self):
        return len(self.data) * self.crops

    def __getitem__(self, index):
        item = self.data[index // self.crops]
        image, label, _ = (np.asarray(Image.open(item[kind])).astype(np.float32) / 255 for kind in ("image", "label", "label_prob"))
        image, label = torch.from_numpy(image)[None] * 2 - 1, torch.from_numpy(label)[None]
        if self.augmentation:
            top, left = torch.randint(0, image.shape[-1] - self.crop + 1, (2,)).tolist()
            image, label = (each[:, top : top + self.crop, left : left + self.crop] for each in (image, label))
            if torch.rand(()) < 0.5:
                image, label = image.flip(-1), label.flip(-1)
        return {"image": image, "label": label, "geometry": label * 2 - 1, "name": item["name"]}


@DATASET_REGISTRY.register("octa")
class OCTADataModule(L.LightningDataModule):
    def __init__(self, train_dir, val_dir, test_dir, other_train_dir=None, train_bs=4, workers="0:", crops=2):
        super().__init__()
        self.train = ConcatDataset([OCTADataset(each, True, 24, crops) for each in (train_dir, other_train_dir) if each])
        self.val, self.test, self.train_bs = OCTADataset(val_dir), OCTADataset(test_dir), train_bs
        count, _, start = workers.partition(":")
        self.more = {"num_workers": int(count), "multiprocessing_context": start, "persistent_workers": True} if int(count) else {}

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=self.train_bs, shuffle=True, **self.more)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=1, **self.more)

    def test_dataloader(self):
        return DataLoader(self.test, batch_size=1)
"""
WATCHED = UNWATCHED.replace("class OCTADataset(Dataset):\n", "from src.data.base_dataset import BaseOCTDataset\nclass OCTADataset(BaseOCTDataset):\n")


class Host:
    """The stand-in for soft-seg: the demo's host with another data module, and two training folders of one name."""

    def __init__(self, root: Path, data_module: str) -> None:
        self.root, self.repo = root, root / "host"
        shutil.copytree(DEMO_HOST, self.repo, ignore=shutil.ignore_patterns("__pycache__"))
        (self.repo / "src" / "data" / "angio.py").write_text(data_module)
        if data_module is UNWATCHED:
            (self.repo / "src" / "data" / "base_dataset.py").unlink()
        counts = {"a/train": 5, "b/train": 4, "val": 2, "test": 3}
        self.files = make_splits(root / "data", counts, ("label", "label_prob"))

    def config(self, workers: str, folders: dict[str, str], **data: Any) -> Path:
        content = yaml.safe_load((self.repo / "configs" / "flow.yaml").read_text())
        content |= {"output": str(self.root / "runs"), "debug": True}
        content["model"] |= {"timesteps": 2, "model_channels": 8, "channel_mult": [1, 2], "attn_resolutions": [], "patch_plan": [[16, 2]]}
        content["data"] = {"name": "octa", "workers": workers, **{name: str(self.root / "data" / folder) for name, folder in folders.items()}, **data}
        content["trainer"] |= {"max_epochs": 2, "check_val_every_n_epoch": 1, "num_sanity_val_steps": 1}
        path = self.root / "config.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    def train(self, mode: str, config: Path, **variables: str) -> tuple[list[list[Any]], subprocess.CompletedProcess[str]]:
        code = f"import row_probe, runpy, sys; row_probe.watch('condition'); sys.argv = ['scripts/train.py', '--config', {str(config)!r}]"
        code += "\nif __name__ == '__main__':\n    runpy.run_path('scripts/train.py', run_name='__main__')"
        return probed(self.root, self.files, ["-c", code], self.repo, mode, **variables)


def probed(
    root: Path, files: list[Path], command: list[Any], cwd: Path, mode: str, **variables: str
) -> tuple[list[list[Any]], subprocess.CompletedProcess[str]]:
    """Run a command under the probe; return [own, used, clear] of every row."""
    (root / "files.txt").write_text("\n".join(map(str, files)))
    out = root / "rows.json"
    out.unlink(missing_ok=True)
    more = {"PROBE_OUT": str(out), "PROBE_FILES": str(root / "files.txt"), "PYTHONPATH": str(HERE.parent), "VLM_FILM_CACHE_DIR": str(root / "cache")}
    done = python(*command, cwd=cwd, timeout=580, VLM_FILM_MODE=mode, **{**SETTINGS, **more, **variables})
    return (json.loads(out.read_text()) if out.is_file() else []), done


def check_rows(rows: list[list[Any]], mode: str, at_least: int) -> None:
    assert len(rows) >= at_least and all(is_clear for _, _, is_clear in rows)
    own = [used for mine, used, _ in rows if mine == used]
    assert len(own) == (len(rows) if mode == "on" else 0), rows


ONE_NAME = {"train_dir": "a/train", "other_train_dir": "b/train", "val_dir": "val", "test_dir": "test"}


@pytest.mark.parametrize("workers", WORKERS)
def test_crops_of_a_data_set_that_nobody_watches_get_their_files(tmp_path: Path, workers: str) -> None:
    host = Host(tmp_path, UNWATCHED)
    config = host.config(workers, ONE_NAME)
    for mode in ("on", "shuffle"):
        rows, done = host.train(mode, config)
        succeed(done)
        check_rows(rows, mode, 2 * 2 * 2 * 9)
        assert {own for own, _, _ in rows} >= set(range(11)) and "cache_key_source: content" not in done.stdout


def test_two_training_folders_of_one_name_get_their_own_files_and_a_warm_up_lists_them(tmp_path: Path) -> None:
    host = Host(tmp_path, WATCHED)
    config = host.config("0:", ONE_NAME)
    # The host's own names of folders: `train_..._dir`.
    listed = tmp_path / "warm.yaml"
    content = yaml.safe_load(config.read_text())
    content["data"]["train_b_dir"] = content["data"].pop("other_train_dir")
    listed.write_text(yaml.safe_dump(content))
    cache = {"VLM_FILM_CACHE_DIR": str(tmp_path / "cache"), **SETTINGS}
    succeed(python("-m", "vlmfilm_plugin", "warmup", "--config", listed, "--splits", "train,val", cwd=host.repo, **cache))
    rows, done = host.train("on", config, VLM_FILM_ON_MISSING_FEATURE="error")
    succeed(done)
    check_rows(rows, "on", 2 * 2 * 2 * 9)


@pytest.mark.parametrize("workers", WORKERS)
def test_medsegdiff_trains_and_samples_on_its_rows_own_files(tmp_path: Path, workers: str) -> None:
    repo = tmp_path / "repo"
    shutil.copytree(HERE / "medsegdiff_stand_in", repo, ignore=shutil.ignore_patterns("__pycache__"))
    files = make_isic(tmp_path / "isic", 9, 3)
    command = ["-c", "import row_probe, runpy, sys; row_probe.watch('concatenated'); sys.argv = sys.argv[1:]\n"
               "if __name__ == '__main__':\n    runpy.run_path(sys.argv[0], run_name='__main__')",
               repo / "scripts" / "segmentation.py", "isic", ".", workers]  # fmt: skip
    # A warm-up by the arguments of its scripts lists what training and sampling look up.
    config = tmp_path / "isic.yaml"
    config.write_text("data_name: ISIC\ndata_dir: isic\n")
    cache = {"VLM_FILM_CACHE_DIR": str(tmp_path / "cache"), **SETTINGS}
    succeed(python("-m", "vlmfilm_plugin", "warmup", "--config", config, cwd=tmp_path, **cache))
    for mode in ("on", "shuffle"):
        rows, done = probed(tmp_path, files, command, tmp_path, mode, VLM_FILM_ON_MISSING_FEATURE="error")
        succeed(done)
        check_rows(rows, mode, 2 * 9 + 3 * 3)
        assert {own for own, _, _ in rows} == set(range(12))
    config.write_text("data_name: BRATS\ndata_dir: isic\n")
    refused = python("-m", "vlmfilm_plugin", "warmup", "--config", config, cwd=tmp_path, **cache)
    assert refused.returncode != 0 and "cannot list the images of BRATS" in refused.stderr


def test_rows_of_a_loader_without_files_stop_a_run_with_the_reason(tmp_path: Path) -> None:
    host = Host(tmp_path, UNWATCHED)
    module = host.repo / "src" / "data" / "angio.py"
    # Training images from memory, those of evaluation from files.
    held = "        if self.augmentation and index in self.memory:\n            return self.memory[index]\n        item = self.data"
    filled = "        for each in self.train.datasets:\n            each.memory = {i: each[i] for i in range(len(each))}\n        self.more = {"
    text = UNWATCHED.replace("        self.data = [", "        self.memory = {}\n        self.data = [", 1)
    text = text.replace("        item = self.data", held).replace("        self.more = {", filled, 1)
    module.write_text(text)
    config = host.config("0:", ONE_NAME)
    _, done = host.train("on", config)
    assert done.returncode != 0
    assert "cannot tell which file each row of this train batch is" in done.stderr and "opened no file for item" in done.stderr
    _, done = host.train("on", config, VLM_FILM_UNNAMED_ROWS="content")
    assert done.returncode != 0 and "features of two kinds" in done.stderr


SOFT_SEG = os.environ.get("VLMFILM_SOFT_SEG_REPO")
MEDSEGDIFF = os.environ.get("VLMFILM_MEDSEGDIFF_REPO")


def is_clean(repo: str) -> bool:
    return not subprocess.run(["git", "status", "--porcelain"], cwd=repo, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(SOFT_SEG is None, reason="VLMFILM_SOFT_SEG_REPO is unset: the folder of soft-seg")
@pytest.mark.parametrize("workers", WORKERS)
def test_the_real_soft_seg(tmp_path: Path, workers: str) -> None:
    assert SOFT_SEG is not None
    files = make_splits(tmp_path / "data", {"train": 6, "val": 2, "test": 2}, ("label", "label_prob", "label_sauna"))
    content = yaml.safe_load((Path(SOFT_SEG) / "configs" / "octa500_3m_diffusion_models.yaml").read_text())
    content["model"] |= {"arch_name": "medsegdiff", "image_size": 32, "dim": 8, "timesteps": 2}
    content["data"] |= {f"{split}_dir": str(tmp_path / "data" / split) for split in ("train", "val", "test")}
    content["data"] |= {"crop_size": 32, "train_bs": 4, "num_samples_per_image": 4}
    content["trainer"] |= {"max_epochs": 1, "accelerator": "cpu", "check_val_every_n_epoch": 1, "callbacks": [], "logger": False}
    content["trainer"] |= {"default_root_dir": str(tmp_path / "run"), "enable_progress_bar": False, "accumulate_grad_batches": 1}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(content))
    command = [HERE / "soft_seg_launcher.py", Path(SOFT_SEG) / "script" / "train_diffusion_models.py", "fit", "--config", config]
    for mode in ("on", "shuffle"):
        rows, done = probed(tmp_path, files, command, tmp_path, mode, WORKERS=workers, PROBE="condition")
        succeed(done)
        check_rows(rows, mode, 24)
    assert is_clean(SOFT_SEG)


@pytest.mark.skipif(MEDSEGDIFF is None, reason="VLMFILM_MEDSEGDIFF_REPO is unset: the folder of the official MedSegDiff")
def test_the_real_medsegdiff(tmp_path: Path) -> None:
    assert MEDSEGDIFF is not None
    files = make_isic(tmp_path / "isic", 7, 2)
    # The smallest geometry that its highway network takes.
    sizes = "--image_size 256 --channel_mult 1,1,1,1,1,16 --num_channels 32 --num_res_blocks 2 --num_heads 1 --attention_resolutions 16"
    shared = [*sizes.split(), "--learn_sigma", "True", "--diffusion_steps", "24", "--data_name", "ISIC", "--data_dir", "isic", "--out_dir", "./"]
    scripts = Path(MEDSEGDIFF) / "scripts"
    train = [HERE / "medsegdiff_launcher.py", scripts / "segmentation_train.py", *shared, "--batch_size", "4", "--lr_anneal_steps", "2"]
    for mode in ("on", "shuffle"):
        rows, done = probed(tmp_path, files, train, tmp_path, mode, WORKERS="2:fork", PROBE="concatenated")
        succeed(done)
        check_rows(rows, mode, 7)
    model = ["--model_path", "savedmodel000002.pt", "--num_ensemble", "1", "--num_samples", "2"]
    sample = [HERE / "medsegdiff_launcher.py", scripts / "segmentation_sample.py", *shared, *model]
    rows, done = probed(tmp_path, files, sample, tmp_path, "on", PROBE="concatenated")
    # The script counts no images: it always ends when its loader does.
    assert "StopIteration" in done.stderr.splitlines()[-1] or done.returncode == 0, done.stderr[-3000:]
    check_rows(rows, "on", 2 * 24)
    assert is_clean(MEDSEGDIFF)
