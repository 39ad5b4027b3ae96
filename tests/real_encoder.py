"""What the slow test and the benchmark of the real encoder measure alike: agreement with its graph, and how well its features know a source again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlmfilm_plugin.demo import pictures, real_weights
from vlmfilm_plugin.features.provider import FeatureProvider
from vlmfilm_plugin.settings.layers import resolve

# Runs the graph as onnx itself reads it, up to the encoder's last normalisation.
_RUN_GRAPH = """
import sys, numpy, onnx
from onnx.reference import ReferenceEvaluator
graph = onnx.load(sys.argv[1]).graph
end = "/backbone/layernorm/Add_1_output_0"
last = next(i for i, node in enumerate(graph.node) if end in node.output)
output = onnx.helper.make_tensor_value_info(end, onnx.TensorProto.FLOAT, None)
part = onnx.helper.make_graph(graph.node[: last + 1], "encoder", graph.input, [output], graph.initializer)
model = onnx.helper.make_model(part, opset_imports=[onnx.helper.make_opsetid("", 14)])
numpy.save(sys.argv[3], ReferenceEvaluator(model).run(None, {"input_image": numpy.load(sys.argv[2])})[0])
"""


def graph_difference(fetched: Path, folder: Path) -> tuple[float, float, dict[str, Any]]:
    """Return the largest difference of the checkpoint's output from the graph's, its largest value, and what was told of the loading.

    Args:
        fetched: what `real_weights.fetch` has filled.
        folder: for what is written in between.
    """
    from transformers import Dinov2Model

    model: Any
    model, told = Dinov2Model.from_pretrained(real_weights.fetch(fetched), output_loading_info=True)
    x = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    np.save(folder / "x.npy", x)
    real_weights.run_with_reader(fetched, "-c", _RUN_GRAPH, str(fetched / real_weights.GRAPH), str(folder / "x.npy"), str(folder / "y.npy"))
    with torch.no_grad():
        y = model.eval()(torch.from_numpy(x)).last_hidden_state.numpy()
    return float(np.abs(y - np.load(folder / "y.npy")).max()), float(np.abs(y).max()), told


def random_weights(real: Path, folder: Path) -> Path:
    """Write a checkpoint of the same shape with random weights to `folder`, and return it."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    Dinov2Model(Dinov2Config.from_pretrained(real)).save_pretrained(folder)  # type: ignore[no-untyped-call]
    (folder / "preprocessor_config.json").write_text((real / "preprocessor_config.json").read_text())
    return folder


def provider_of(model: Path, cache: Path) -> FeatureProvider:
    """Return the provider of a model's features as a run has it, with a store of its own."""
    return FeatureProvider.from_settings(resolve([("argument", {"encoder": "hf", "model_name": str(model), "cache_dir": str(cache)})]))


def nearest_neighbour(provider: FeatureProvider, data: Path) -> float:
    """Return the share of test pictures whose nearest training picture, by the cosine of centred features, is of their source."""
    train, test = (provider.of_images(sorted((data / split).glob("*.png"))).double() for split in ("train", "test"))
    train, test = (torch.nn.functional.normalize(x - train.mean(0), dim=1) for x in (train, test))
    found = (test @ train.T).argmax(1) % len(pictures.SOURCES)
    return float((found == torch.arange(len(test)) % len(pictures.SOURCES)).double().mean())
