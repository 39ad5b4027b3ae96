"""The integration pages: the script of each is taken from its page and run on tiny data, plain, `off` and `on`."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from processes import python, succeed
from stand_in import SETTINGS

import vlmfilm_plugin

HERE = Path(__file__).parent
DOCS = Path(vlmfilm_plugin.__file__).parent / "docs"
NEEDS = {"smp": ["segmentation_models_pytorch"], "diffusers": ["diffusers"], "monai": ["monai", "nibabel"]}
START = f"import sys; sys.path[:0] = [{str(HERE)!r}, '.']; import torchvision_stand_in, runpy; torchvision_stand_in.provide_torchvision()\n"
START += "runpy.run_path('train.py', run_name='__main__')"


def pages() -> list[Any]:
    missing = {page: [name for name in names if find_spec(name) is None] for page, names in NEEDS.items()}
    return [
        pytest.param(page, marks=pytest.mark.skipif(bool(names), reason=f"{', '.join(names)} is not installed")) for page, names in missing.items()
    ]


def make_data(folder: Path, page: str) -> None:
    """Write ten images and masks: what is to be segmented depends on the level of the whole image."""
    for kind in ("image", "mask"):
        (folder / "data" / kind).mkdir(parents=True)
    for number in range(10):
        random = np.random.default_rng(number)
        image = (random.random((64, 64)) * 60 + 20 * number).astype(np.uint8)
        mask = ((image > 20 * number + 30) ^ (number % 2 == 0)).astype(np.uint8) * 255
        if page == "monai":
            import nibabel

            for kind, pixels in (("image", image), ("mask", mask)):
                volume = np.stack([pixels] * 12, -1).astype(np.float32) / 255
                nibabel.Nifti1Image(volume, np.eye(4)).to_filename(folder / "data" / kind / f"{number}.nii.gz")
        else:
            Image.fromarray(np.stack([image] * 3, -1)).save(folder / "data" / "image" / f"{number}.png")
            Image.fromarray(mask).save(folder / "data" / "mask" / f"{number}.png")


@pytest.mark.parametrize("page", pages())
def test_the_script_of_a_page_trains_film_when_on_and_is_the_plain_one_when_off(tmp_path: Path, page: str) -> None:
    (script,) = re.findall(r"^```python\n(# train.py\n.*?)^```", (DOCS / f"{page}.md").read_text(encoding="utf-8"), re.S | re.M)
    make_data(tmp_path, page)
    (tmp_path / "train.py").write_text(script)
    held: dict[str | None, dict[str, torch.Tensor]] = {}
    said: dict[str | None, str] = {}
    for mode in (None, "off", "on"):
        variables = {**SETTINGS, "VLM_FILM_CACHE_DIR": str(tmp_path / "cache")} if mode else {}
        said[mode] = succeed(python("-c", START, cwd=tmp_path, VLM_FILM_MODE=mode, **variables))
        held[mode] = torch.load(tmp_path / "unet.pt", weights_only=True)
    plain, off, on = held[None], held["off"], held["on"]
    assert not any("vlm_film" in name for name in plain)
    assert all(torch.equal(off[name], value) for name, value in plain.items())
    assert all("vlm_film." in name for name in off.keys() - plain.keys())
    assert "[VLM] FiLM attached: mode=on" in said["on"]
    assert any(not torch.equal(on[name], value) for name, value in plain.items()), "FiLM changes what the host learns"
    last_layers = [value for name, value in on.items() if re.search(r"vlm_film\.heads\..*mlp\.2\.weight", name)]
    assert last_layers and all(layer.any() for layer in last_layers), "each head starts at zero and trains"
    if page == "monai":
        outputs = {mode: [line for line in text.splitlines() if not line.startswith("[")] for mode, text in said.items()}
        assert outputs["off"] == outputs[None] != outputs["on"] and len(outputs["on"]) == 10
