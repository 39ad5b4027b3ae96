"""Kills at random moments: what was said to be stored is there and right, files are whole or not there, inputs stay, and the next run goes on."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import made
import numpy as np
import torch
from referee import FORK, Kind, Wrong
from safetensors.torch import load_file
from small_unet import SmallUNet, inputs

from vlmfilm_plugin import apply_adapter, attach, export_adapter, files
from vlmfilm_plugin.encoders.descriptor import DescriptorEncoder
from vlmfilm_plugin.features.store.admin import opened, verify
from vlmfilm_plugin.features.store.store import FeatureStore
from vlmfilm_plugin.warmup.encode import warm_up


def fork_and_kill(work: Callable[[Any], None], after_s: float | None) -> tuple[list[Any], float]:
    """Run `work(send)` in a process and kill it `after_s` seconds after its start; return what it sent, and how long it ran."""
    here, there = FORK.Pipe(duplex=False)
    process = FORK.Process(target=lambda: work(there.send))
    start = time.monotonic()
    process.start()
    there.close()
    if after_s is not None:
        process.join(after_s)
        process.kill()  # nothing where it has ended
    said = []
    try:
        while True:
            said.append(here.recv())
    except EOFError:
        pass
    process.join()
    return said, time.monotonic() - start


class Killed(Kind):
    """Work that is killed: a first whole run tells how long it takes."""

    def prepare(self, folder: Path) -> None:
        self.shared = folder
        self.make(folder)
        times = []
        for number in range(1 if self.is_short else 3):
            (folder / f"trial-{number}").mkdir()
            times.append(fork_and_kill(self.work(folder / f"trial-{number}", random.Random(number)), None)[1])
        self.takes = sorted(times)[len(times) // 2]

    def attempt(self, number: int, folder: Path, chance: random.Random) -> str:
        said, _ = fork_and_kill(self.work(folder, chance), chance.uniform(0, 1.1) * self.takes)
        return self.check(folder, said)

    def make(self, folder: Path) -> None:
        """Make the inputs."""

    def work(self, folder: Path, chance: random.Random) -> Callable[[Any], None]:
        """Return what is killed."""
        raise NotImplementedError

    def check(self, folder: Path, said: list[Any]) -> str:
        """Say how it ended."""
        raise NotImplementedError


def sound(folder: Path) -> None:
    """Check that a store is whole, if there is one."""
    if (folder / "features.sqlite").is_file():
        with opened(folder) as file:
            found = verify(file)
        if not found.is_sound:
            raise Wrong(f"a damaged store: {found.damaged[:2]} {found.problems[:2]}")


class WarmupKills(Killed):
    name, full, short, limit_s = "kill warm-up", 60, 2, 60.0
    count, batch = 96, 8

    def make(self, folder: Path) -> None:
        paths = made.images(folder / "images", self.count)
        self.truth = {str(path): made.described(path) for path in paths}

    def work(self, folder: Path, chance: random.Random) -> Callable[[Any], None]:
        return lambda send: self.warm_up(folder)

    def warm_up(self, folder: Path) -> Any:
        settings = {"encoder": "descriptor", "cache_dir": str(folder / "cache")}
        return warm_up(self.shared / "images", (), settings, batch_size=self.batch, readers=2, show_progress=False)

    def check(self, folder: Path, said: list[Any]) -> str:
        identity = DescriptorEncoder().identity
        sound(folder / "cache")
        with FeatureStore(folder / "cache") as store:
            stored = store.count(identity)
        if stored % self.batch:
            raise Wrong(f"{stored} features: half a batch")
        report = self.warm_up(folder)
        if (report.hits, report.encoded, report.failures) != (stored, self.count - stored, []):
            raise Wrong(f"{stored} were stored, then {report.hits} found and {report.encoded} encoded")
        with FeatureStore(folder / "cache") as store:
            rows = store.read(identity, store.keys(identity))
        found = {"/" + key.split(":/", 1)[-1]: row.feature for key, row in rows.items()}
        if set(found) != set(self.truth) or any(not np.array_equal(found[path], feature) for path, feature in self.truth.items()):
            raise Wrong("a wrong feature after going on")
        return "went on" if stored else "began again"


class TrainingKills(Killed):
    name, full, short, limit_s = "kill training", 60, 2, 60.0
    steps = 12

    def make(self, folder: Path) -> None:
        self.paths = made.images(folder / "images", 2 * self.steps)
        # What a first forward imports, this process has imported when it is forked: else most kills would fall into that.
        handle = attach(SmallUNet(), encoder="descriptor", cond_dim=8, text_mlp_hidden_dim=8, cache_dir=str(folder / "first"))
        with torch.no_grad(), handle.condition(images=self.paths[:2]):
            handle.unet(*inputs(2))
        torch.optim.SGD(handle.unet.parameters(), lr=0.1)
        self.truth = {str(path): made.described(path) for path in self.paths}

    def work(self, folder: Path, chance: random.Random) -> Callable[[Any], None]:
        def train(send: Any) -> None:
            torch.manual_seed(0)
            handle = attach(SmallUNet(), encoder="descriptor", cond_dim=8, text_mlp_hidden_dim=8, cache_dir=str(folder / "cache"))
            optimizer = torch.optim.SGD(handle.unet.parameters(), lr=0.1)
            for step in range(self.steps):
                with handle.condition(images=self.paths[2 * step : 2 * step + 2]):
                    handle.unet(*inputs(2)).square().mean().backward()
                optimizer.step()
                send(step)

        return train

    def check(self, folder: Path, said: list[Any]) -> str:
        identity = DescriptorEncoder().identity
        sound(folder / "cache")
        with FeatureStore(folder / "cache") as store:
            rows = store.read(identity, store.keys(identity))
        if len(rows) < 2 * len(said):
            raise Wrong(f"{len(said)} steps of two images were made, {len(rows)} features are there")
        true = {tuple(feature) for feature in self.truth.values()}
        if any(tuple(row.feature) not in true for row in rows.values()):
            raise Wrong("a feature of no image")
        return f"{'some' if said else 'no'} steps kept"


class FileKills(Killed):
    """A command that writes one file, killed: the file is whole or not there, or still the old one."""

    limit_s = 60.0

    def work(self, folder: Path, chance: random.Random) -> Callable[[Any], None]:
        is_nameless, is_forced = chance.random() < 0.5, chance.random() < 0.5
        if is_forced:
            (folder / "out").write_bytes(b"old")

        def write(send: Any) -> None:
            if not is_nameless:
                files._NAMELESS = 0
            self.write(folder / "out", is_forced)

        return write

    def write(self, out: Path, force: bool) -> None:
        """Write the file."""
        raise NotImplementedError

    def is_whole(self, out: Path) -> bool:
        """Tell whether the file is what it should be."""
        raise NotImplementedError

    def check(self, folder: Path, said: list[Any]) -> str:
        if {path: path.read_bytes() for path in self.inputs} != self.inputs:
            raise Wrong("an input was changed")
        out, strange = folder / "out", [path.name for path in folder.iterdir() if path.name != "out" and not path.name.endswith(".partial")]
        if strange:
            raise Wrong(f"left behind: {strange}")
        if not out.exists():
            return "not there"
        if out.read_bytes() == b"old":
            return "the old one"
        if not self.is_whole(out):
            raise Wrong(f"half a file of {out.stat().st_size} bytes")
        return "whole"


class ExportKills(FileKills):
    name, full, short = "kill export", 150, 2

    def make(self, folder: Path) -> None:
        self.source = made.film_checkpoint(folder / "film.ckpt", widths=(256, 128, 64))
        export_adapter(self.source, folder / "truth")
        self.truth, self.inputs = load_file(folder / "truth"), {self.source: self.source.read_bytes()}

    def write(self, out: Path, force: bool) -> None:
        export_adapter(self.source, out, force=force)

    def is_whole(self, out: Path) -> bool:
        return made.same(load_file(out), self.truth)


class ApplyKills(FileKills):
    name, full, short = "kill apply", 150, 2

    def make(self, folder: Path) -> None:
        self.plain = made.film_checkpoint(folder / "plain.ckpt", widths=(256, 128, 64), with_film=False)
        self.weights = folder / "weights.safetensors"
        export_adapter(made.film_checkpoint(folder / "film.ckpt", widths=(256, 128, 64)), self.weights)
        apply_adapter(self.weights, self.plain, folder / "truth")
        self.truth = torch.load(folder / "truth", weights_only=True)["state_dict"]
        self.inputs = {path: path.read_bytes() for path in (self.plain, self.weights)}

    def write(self, out: Path, force: bool) -> None:
        apply_adapter(self.weights, self.plain, out, force=force)

    def is_whole(self, out: Path) -> bool:
        return made.same(torch.load(out, weights_only=True)["state_dict"], self.truth)


class CacheKills(Killed):
    """`cache merge`, `import` and `prune`, killed: both stores stay sound, and doing it again does the rest."""

    name, full, short, limit_s = "kill cache commands", 90, 2, 60.0
    count = 600

    def make(self, folder: Path) -> None:
        made.make_store(folder / "source", self.count)
        made.command("cache", "export", folder / "exported", "--namespace", made.IDENTITY.fingerprint, "--cache-dir", folder / "source")

    def work(self, folder: Path, chance: random.Random) -> Callable[[Any], None]:
        self.action = chance.choice(["merge", "import", "prune"])
        if self.action == "prune":
            made.command("cache", "merge", self.shared / "source", folder / "cache")
        return lambda send: self.again(folder)

    def again(self, folder: Path) -> None:
        arguments: dict[str, tuple[object, ...]] = {
            "merge": ("merge", self.shared / "source", folder / "cache"),
            "import": ("import", self.shared / "exported", "--cache-dir", folder / "cache"),
            "prune": ("prune", "--keep", made.IDENTITY.fingerprint, "--cache-dir", folder / "cache"),
        }
        if code := made.command("cache", *arguments[self.action]):
            raise Wrong(f"{self.action} ended with exit code {code}")

    def check(self, folder: Path, said: list[Any]) -> str:
        sound(folder / "cache")
        if (folder / "cache").exists():
            made.check_store(folder / "cache", self.count)
        self.again(folder)
        sound(folder / "cache")
        sound(self.shared / "source")
        if (kept := made.check_store(folder / "cache", self.count)) != self.count:
            raise Wrong(f"{kept} of {self.count} features are left")
        return self.action
