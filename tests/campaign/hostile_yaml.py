"""YAML of others, and YAML that was damaged: read as it says, or refused by name, at once."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from referee import Kind, Wrong

from vlmfilm_plugin.encoders._questions import read_questionnaire
from vlmfilm_plugin.errors import VlmFilmError
from vlmfilm_plugin.settings.layers import layers_of, resolve
from vlmfilm_plugin.settings.yaml_file import read_mapping
from vlmfilm_plugin.warmup.image_list import read_plan

QUESTIONS = "questions:\n  - id: contrast\n    text: How strong?\n    options: {A: weak, B: strong}\n"
SETTINGS = "encoder: descriptor\ncond_dim: 16\ndecoder_stages: [0, 1]\ngamma_scale: 0.5\n"
HOST = "arch_name: medsegdiff_flow\nmodel:\n  vlm_film_config: {encoder: descriptor}\ndata: {train_dir: none}\n"
TOKENS = (
    "&a ", "*a", "<<: ", "[", "]", "{", "}", ": ", "- ", "\n", "\t", "!!python/name:os.system ", "!!python/object/apply:os.mkdir [went-off]",
    "!!binary x", "? ", "%YAML 9.9\n", "---\n", "...\n", "'", '"', "|", ">", "#", "\0", "\ufeff", "\u2028", "é", "2020-13-45", "0x_",
    "1e999", ".nan", "~", "1:99:99", "@", "`", "0o8", "!!set {a}", "!!omap [a: 1]", "!!timestamp x", "!!int x", "!!float x", "!!bool x",
)  # fmt: skip


def aliases(chance: random.Random, is_merge: bool) -> str:
    width, depth = chance.randrange(2, 12), chance.randrange(3, 40)
    lines = ["k0: &k0 {a: 1}" if is_merge else "k0: &k0 [x]"]
    for level in range(1, depth):
        inner = ", ".join([f"*k{level - 1}"] * width)
        lines.append(f"k{level}: &k{level}\n  <<: [{inner}]" if is_merge else f"k{level}: &k{level} [{inner}]")
    return "\n".join(lines)


def nested(chance: random.Random) -> str:
    depth = chance.choice([100, 1000, 20_000, 200_000])
    ways = [
        "[" * depth,
        "{a: " * depth,
        "- " * depth,
        "? " * depth,
        "[" * depth + "]" * depth,
        "!!a " * depth,
        "".join(f"{' ' * n}k:\n" for n in range(min(depth, 2000))),
    ]
    return "a: " * chance.randrange(2) + chance.choice(ways)


def damaged(chance: random.Random) -> str:
    text = chance.choice([QUESTIONS, SETTINGS, HOST])
    for _ in range(chance.randrange(1, 8)):
        place = chance.randrange(len(text) + 1)
        text = text[:place] + chance.choice(TOKENS) + text[place + chance.randrange(3) :]
    return text


def doubled(chance: random.Random) -> str:
    lines = chance.choice([SETTINGS, HOST]).splitlines()
    line = chance.choice([line for line in lines if ":" in line])
    return "\n".join([*lines, line.split(":")[0] + ": other"])


class HostileYaml(Kind):
    name, full, short, limit_s = "hostile YAML", 1500, 40, 10.0

    def attempt(self, number: int, folder: Path, chance: random.Random) -> str:
        way = ("aliases", "merges", "nested", "damaged", "doubled", "damaged", "bytes")[number % 7]
        text = {
            "aliases": lambda: aliases(chance, False),
            "merges": lambda: aliases(chance, True),
            "nested": lambda: nested(chance),
            "damaged": lambda: damaged(chance),
            "doubled": lambda: doubled(chance),
            "bytes": lambda: "",
        }[way]()
        path = folder / "file.yaml"
        path.write_bytes(chance.randbytes(chance.randrange(2000)) if way == "bytes" else text.encode("utf-8", "surrogatepass"))
        readers: dict[str, Callable[[], Any]] = {
            "mapping": lambda: read_mapping(path, "the file", "correct it"),
            "settings": lambda: resolve(layers_of({"VLM_FILM_CONFIG": str(path)})),
            "questions": lambda: read_questionnaire(resolve([("a", {"questionnaire": str(path)})])),
            "host": lambda: read_plan(path, ["train"]),
        }
        read = 0
        for name, reader in readers.items():
            try:
                found = reader()
            except VlmFilmError as error:
                if "file.yaml" not in str(error) and name != "host":
                    raise Wrong(f"{name}: the file is not named: {str(error)[:200]}") from error
                continue
            except Exception as error:
                error.args = (f"{name}: {error}",)
                raise
            read += 1
            if way == "doubled":
                raise Wrong(f"{name}: a key that stands twice was read")
            if name == "mapping" and way == "damaged" and found != yaml.safe_load(path.read_text("utf-8")):
                raise Wrong("something else was read than it says")
        if (folder / "went-off").exists():
            raise Wrong("a payload ran")
        return "read" if read else "refused"
