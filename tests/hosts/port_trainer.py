"""Train models of the soft-seg port for a few steps in its own repo; save a checkpoint of each, and what it makes of six images.

python port_trainer.py REPO FOLDER

FOLDER/cases.json holds (kind, arguments of the model) by name; kind is `film` (FlowModelVLMFiLM) or `direct` (FlowModel with use_vlm_film).
The port's loader of its vision-language model is replaced from outside, by a tiny Qwen2.5-VL and its image processor alone. Nothing is written
to the repo. NAME.ckpt is Lightning's own; NAME.pt holds inputs, features and outputs: with FiLM, without it, and with FiLM at the other kind's
place.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

repo, folder = sys.argv[1], os.path.abspath(sys.argv[2])
sys.dont_write_bytecode = True
sys.argv = [os.path.join(repo, "scripts", "train.py")]  # the repo finds its root from argv[0]
sys.path.insert(0, repo)
os.chdir(repo)

import lightning as L  # noqa: E402 - after the working directory
import torch  # noqa: E402
from small_machine import provide_torchvision  # noqa: E402
from torch import nn  # noqa: E402

torch.set_num_threads(1)
provide_torchvision()

import src.losses  # noqa: E402 - registers them
import src.registry  # noqa: E402, F401 - first: the repo imports itself in a circle
from src.archs.components.diffusion_unet import MedSegDiffUNet  # noqa: E402
from src.archs.components.diffusion_unet_vlm_film import MedSegDiffUNetVLMFiLM  # noqa: E402
from src.archs.components.vlm_conditioner import QwenVLMTextGenerator  # noqa: E402
from src.archs.flow_model import FlowModel  # noqa: E402
from src.archs.flow_model_vlm_film import FlowModelVLMFiLM  # noqa: E402


def load_tiny(self: Any) -> None:
    """Stand for the port's loader: the processor that it asks for wants torchvision, and the model gigabytes."""
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

    if self._vlm_loaded:
        return
    images = Qwen2VLImageProcessorPil.from_pretrained(self.model_name)
    self._processor = lambda **given: dict(images(images=given["images"], return_tensors="pt"))
    self._model = Qwen2_5_VLForConditionalGeneration.from_pretrained(self.model_name, dtype=torch.float32).eval().requires_grad_(False)
    self._input_device, self._vlm_loaded = torch.device("cpu"), True


QwenVLMTextGenerator._load_model = load_tiny


class Named(torch.utils.data.Dataset[Any]):
    """Six images of noise with a bright square, and their labels."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        image, label = torch.rand(1, 32, 32, generator=generator) * 2 - 1, torch.full((1, 32, 32), -1.0)
        image[:, 4 + index : 16, 8:20] += 0.2 * index
        label[:, 4 + index : 16, 8:20] = 1.0
        return {"image": image.clamp(-1, 1), "label": label, "name": f"train/image/{index}.png"}


class AtBlock2(MedSegDiffUNet):  # type: ignore[misc]
    def forward(self, *args: Any, junction_gate: Any = None, junction_warmup_active: bool = False, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def train(kind: str, settings: dict[str, Any], out: str) -> None:
    torch.manual_seed(0)
    model = (FlowModelVLMFiLM if kind == "film" else FlowModel)(**settings)
    for head in model.vlm_film_heads:  # heads that have moved far, in few steps
        nn.init.normal_(head.mlp[2].weight, std=0.3)
    loader = torch.utils.data.DataLoader(Named(), batch_size=3)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = L.Trainer(max_epochs=2, accelerator="cpu", limit_val_batches=0, num_sanity_val_steps=0, default_root_dir=os.path.dirname(out), **quiet)
    trainer.fit(model, loader)
    trainer.save_checkpoint(f"{out}.ckpt")
    model.eval()
    rows = [loader.dataset[index] for index in range(6)]
    image, names = torch.stack([row["image"] for row in rows]), [row["name"] for row in rows]
    torch.manual_seed(7)
    x, time, seen = torch.randn(6, 2 if "multitask" in settings["arch_name"] else 1, 32, 32), torch.linspace(0.05, 0.95, 6), {}
    handle = model.vlm_film_conditioner.image_to_cond.register_forward_pre_hook(lambda _, args: seen.update(features=args[0].detach().clone()))
    with torch.no_grad():
        cond = model.vlm_film_conditioner.compute_condition(image=image, batch={"image": image, "name": names}, global_step=5, is_train=False)
        handle.remove()
        stages = getattr(model, "_vlm_film_stage_indices", None)
        cond = cond if stages is None else {**cond, "_vlm_film_stage_indices": stages}
        film = {"vlm_cond": cond, "vlm_film_heads": model.vlm_film_heads}
        plain, on = model.unet(x, time, image), model.unet(x, time, image, **film)
        base = model.unet.base_unet
        base.__class__ = AtBlock2 if kind == "film" else MedSegDiffUNetVLMFiLM
        film["vlm_cond"] = {**cond, "_vlm_film_stage_indices": stages if stages is not None else list(range(len(model.vlm_film_heads)))}
        other = model.unet(x, time, image, **film)
    torch.save({"x": x, "time": time, "image": image, "features": seen["features"].float(), "plain": plain, "on": on, "other": other}, f"{out}.pt")


for name, (kind, settings) in json.loads(Path(folder, "cases.json").read_text()).items():
    train(kind, settings, os.path.join(folder, name))
