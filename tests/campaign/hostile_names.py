"""Names of files and images that were chosen to hurt: each keeps its own feature, nothing is written elsewhere, and every command ends."""

from __future__ import annotations

import os
import random
from pathlib import Path

import made
import numpy as np
import torch
from PIL import Image
from referee import Kind, Wrong

from vlmfilm_plugin.features.provider import FeatureProvider
from vlmfilm_plugin.features.shuffle_pairs import PairsFile
from vlmfilm_plugin.settings.layers import resolve
from vlmfilm_plugin.warmup.encode import warm_up

PARTS = (
    "..", "...", " ", "-rf", "--help", "~", "$HOME", "`id`", "$(id)", ";", "&", "|", "'", '"', "\\", "\n", "\r", "\t", "\x1b[2J", "%s", "%n",
    "{0}", "{name}", "*", "?", "[a]", ":", "::", "train:", "unknown:", "content:", "@", "#", ",", "é", "e\u0301", "血管", "\u202e", "\u200b",
    "\udcff", "\udc80x", "con", "nul", "x" * 120, "features.sqlite", "'); DROP TABLE features; --", "a.png", ".", "\x7f", "\x01", "=cmd()",
    "<script>", "null", "0", "1e999", "\ufeff",
)  # fmt: skip


def name_of(chance: random.Random) -> str:
    name = "".join(chance.choice(PARTS) for _ in range(chance.randrange(1, 4)))
    while len(os.fsencode(name)) > 240:
        name = name[:-10]
    return name


class HostileNames(Kind):
    name, full, short, limit_s = "hostile name", 400, 6, 60.0

    def attempt(self, number: int, folder: Path, chance: random.Random) -> str:
        root = folder / "data"
        truth = self.files(root, chance)
        settings = {"encoder": "descriptor", "cache_dir": str(folder / "cache")}
        is_rooted = chance.random() < 0.5
        if is_rooted:
            settings["dataset_root"] = str(root)
        before = {path for path in folder.rglob("*") if folder / "cache" not in path.parents}
        report = warm_up(root, (), settings, show_progress=False)
        if report.failures or report.encoded != len(truth):
            raise Wrong(f"{len(truth)} images, {report.encoded} encoded, {report.failures}")
        self.training(settings, truth, chance)
        pairs = PairsFile(str(folder / "pairs.csv"))
        pairs.write([(str(path), str(path)) for path in truth], 1)
        pairs.write([(str(path), str(path)) for path in truth], 2)
        name = next(iter(truth)).name
        if not name.startswith("-"):
            made.command("cache", "show", name, "--cache-dir", folder / "cache")
        if made.command("cache", "verify", "--cache-dir", folder / "cache") or made.command("cache", "stats", "--cache-dir", folder / "cache"):
            raise Wrong("the store is not sound")
        after = {path for path in folder.rglob("*") if folder / "cache" not in path.parents}
        if strange := sorted(map(repr, after - before - {folder / "cache", folder / "pairs.csv"})):
            raise Wrong(f"written elsewhere: {strange}")
        return "rooted" if is_rooted else "by path"

    def files(self, root: Path, chance: random.Random) -> dict[Path, np.ndarray]:  # type: ignore[type-arg]
        truth: dict[Path, np.ndarray] = {}  # type: ignore[type-arg]
        for index in range(chance.randrange(3, 9)):
            folders = [part for part in (name_of(chance) for _ in range(chance.randrange(3))) if part not in (".", "..")]
            path = root.joinpath(*folders, name_of(chance) + chance.choice([".png", ".PNG"]))
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                noise = np.random.default_rng(index).integers(0, 256, (8, 8), dtype=np.uint8)
                with open(path, "xb") as file:
                    Image.fromarray(noise).save(file, format="PNG")
            except OSError:
                continue
            truth[path] = made.described(path)
        if not truth:
            (root / "a.png").parent.mkdir(parents=True, exist_ok=True)
            made.images(root, 1)
            truth[root / "0.png"] = made.described(root / "0.png")
        return truth

    def training(self, settings: dict[str, str], truth: dict[Path, np.ndarray], chance: random.Random) -> None:  # type: ignore[type-arg]
        """Ask as a run does, by the metadata of a batch."""
        provider = FeatureProvider.from_settings(resolve([("campaign", settings)]))
        paths = list(truth)
        chance.shuffle(paths)
        image = torch.zeros(len(paths), 1, 8, 8)
        names = [str(path) for path in paths]
        batch = {"image": image, chance.choice(["filepath", "image_path"]): names}
        features = provider.get(provider.samples_of(batch, image, (0.0, 1.0))).numpy()
        provider.store.close()
        for row, path in enumerate(paths):
            if not np.array_equal(features[row], truth[path]):
                raise Wrong(f"{str(path)!r} was given another feature")
