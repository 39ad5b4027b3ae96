"""One flipped bit in a file: what is read is the truth, or is left out, or is refused; never something else."""

from __future__ import annotations

import random
from pathlib import Path

import made
import torch
from referee import Kind, Wrong
from safetensors.torch import load_file

from vlmfilm_plugin import apply_adapter, export_adapter
from vlmfilm_plugin.checkpoints.peek import peek
from vlmfilm_plugin.checkpoints.reading import read_checkpoint
from vlmfilm_plugin.errors import CheckpointError, VlmFilmError


def flipped(source: Path, target: Path, chance: random.Random) -> Path:
    """Write a copy with one bit flipped; beginnings, where headers are, get a third of the flips."""
    data = bytearray(source.read_bytes())
    end = len(data) if chance.random() < 0.7 else min(len(data), 4096)
    data[chance.randrange(end)] ^= 1 << chance.randrange(8)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)
    return target


def is_read(path: Path) -> bool:
    """Tell whether a checkpoint can be read."""
    try:
        read_checkpoint(path)
    except CheckpointError:
        return False
    return True


class StoreFlips(Kind):
    name, full, short = "flip store", 800, 8

    def prepare(self, folder: Path) -> None:
        self.source = made.make_store(folder / "cache")

    def attempt(self, number: int, folder: Path, chance: random.Random) -> str:
        cache = folder / "cache"
        flipped(self.source, cache / self.source.name, chance)
        for action in ("stats", "verify"):
            made.command("cache", action, "--cache-dir", cache)
        merged = made.command("cache", "merge", cache, folder / "merged")
        if merged != 2:
            made.check_store(folder / "merged")
        if made.command("cache", "export", folder / "out", "--namespace", made.IDENTITY.fingerprint, "--cache-dir", cache) == 0:
            made.command("cache", "import", folder / "out", "--cache-dir", folder / "imported")
            made.check_store(folder / "imported")
        found = made.check_store(cache)
        verdict = made.command("cache", "verify", "--cache-dir", cache)
        if found < 30 and verdict == 0:
            raise Wrong(f"{30 - found} features are gone, and verify finds nothing")
        return "all there" if found == 30 else "left out"


class CheckpointFlips(Kind):
    name, full, short = "flip checkpoint", 700, 8

    def prepare(self, folder: Path) -> None:
        self.source = made.film_checkpoint(folder / "film.ckpt")
        export_adapter(self.source, folder / "weights")
        self.weights, self.truth = folder / "weights", load_file(folder / "weights")
        self.state = torch.load(self.source, weights_only=True)["state_dict"]
        self.facts = peek(self.source)

    def attempt(self, number: int, folder: Path, chance: random.Random) -> str:
        damaged = flipped(self.source, folder / "film.ckpt", chance)
        told, fates = self.facts, set()
        try:
            told = peek(damaged)
        except VlmFilmError:
            fates.add("refused")
        if told is None and is_read(damaged):
            raise Wrong("it counts as a plain baseline, and no line says why")
        if told is not None and (told.encoder, told.architecture, told.gate) != (self.facts.encoder, self.facts.architecture, self.facts.gate):  # type: ignore[union-attr]
            raise Wrong("another description is believed")
        for name, work in (
            ("export", lambda: export_adapter(damaged, folder / "out")),
            ("apply", lambda: apply_adapter(self.weights, damaged, folder / "whole")),
        ):
            try:
                work()
            except VlmFilmError:
                fates.add("refused")
                continue
            fates.add("whole")
            is_true = made.same(load_file(folder / "out"), self.truth) if name == "export" else self.is_copy(folder / "whole")
            if not is_true:
                raise Wrong(f"{name} wrote other weights without a word")
        return " and ".join(sorted(fates))

    def is_copy(self, path: Path) -> bool:
        state = torch.load(path, weights_only=True)["state_dict"]
        return made.same({name: state[name] for name in self.state if name in state}, self.state)


class WeightFlips(Kind):
    name, full, short = "flip exported weights", 500, 8

    def prepare(self, folder: Path) -> None:
        self.source, self.plain = folder / "weights", made.film_checkpoint(folder / "plain.ckpt", with_film=False)
        export_adapter(made.film_checkpoint(folder / "film.ckpt"), self.source)
        apply_adapter(self.source, self.plain, folder / "truth.ckpt")
        self.truth = torch.load(folder / "truth.ckpt", weights_only=True)

    def attempt(self, number: int, folder: Path, chance: random.Random) -> str:
        apply_adapter(flipped(self.source, folder / "weights", chance), self.plain, folder / "out")
        found = torch.load(folder / "out", weights_only=True)
        if not made.same(found["state_dict"], self.truth["state_dict"]) or found["vlm_film"] != self.truth["vlm_film"]:
            raise Wrong("other weights, or another description, were applied")
        return "whole"


class FeatureFileFlips(Kind):
    name, full, short = "flip exported features", 300, 4

    def prepare(self, folder: Path) -> None:
        made.make_store(folder / "cache")
        self.source = folder / "features"
        made.command("cache", "export", self.source, "--namespace", made.IDENTITY.fingerprint, "--cache-dir", folder / "cache")

    def attempt(self, number: int, folder: Path, chance: random.Random) -> str:
        code = made.command("cache", "import", flipped(self.source, folder / "features", chance), "--cache-dir", folder / "cache")
        if not (folder / "cache").exists():
            return "refused"
        found = made.check_store(folder / "cache")
        if code == 0 and found < 30:
            raise Wrong(f"{30 - found} features were not taken, and nothing said so")
        return {0: "whole", 1: "left out", 2: "refused"}[code]
