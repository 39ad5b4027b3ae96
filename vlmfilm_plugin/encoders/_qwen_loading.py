"""Find and load the parts of a Qwen2.5-VL checkpoint: configuration, image processor, tokenizer, vision tower, whole model.

Owns the differences between versions of transformers, placement on devices, and what is said when a part is missing. Every
`transformers` import is inside a function: building settings or reading the store must not pay for it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmfilm_plugin.errors import EncoderError

if TYPE_CHECKING:
    import torch

    from vlmfilm_plugin.settings import Settings

MODEL_TYPE = "qwen2_5_vl"
NO_ACCELERATE_VARIABLE = "VLM_FORCE_NO_ACCELERATE"
_SPREADING = frozenset({"auto", "balanced", "balanced_low_0", "sequential"})
_PIXEL_VALUES = (
    *("do_resize", "resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "do_convert_rgb"),
    *("patch_size", "temporal_patch_size", "merge_size"),
)
_CHUNK, _CHUNKS = 64 * 1024, 16
_EXAMPLE = "Qwen/Qwen2.5-VL-3B-Instruct"
_FIX = "give the folder of a Qwen2.5-VL model with `model_name`, or download the model beforehand: hf download {name}"


def read_config(settings: Settings) -> Any:
    """Read the model's configuration; no weights.

    Raises:
        EncoderError: the model is not found, or is not a Qwen2.5-VL.
    """
    from transformers import AutoConfig

    with _explained("read the configuration of", settings):
        config = AutoConfig.from_pretrained(**_source(settings))
    if config.model_type != MODEL_TYPE:
        facts = {"model": _name(settings), "found": f"model type {config.model_type!r}", "expected": f"model type {MODEL_TYPE!r}"}
        raise EncoderError("cannot use this model as a Qwen2.5-VL encoder", facts, _FIX.format(name=_EXAMPLE))
    return config


def read_image_processor(settings: Settings) -> Any:
    """Read the image processor, with `min_pixels` and `max_pixels` of the settings in place of its own.

    Raises:
        EncoderError: it is not found, or the pixel limits do not fit each other.
    """
    from transformers import AutoImageProcessor

    # The PIL one on purpose: the others resize through torchvision where it is installed, with slightly different values,
    # and a feature must not depend on which packages are there.
    choice: dict[str, Any] = {"backend": "pil"} if _version() >= (5, 0) else {"use_fast": False}
    limits = {key: value for key in ("min_pixels", "max_pixels") if (value := getattr(settings, key)) is not None}
    with _explained("read the image processor of", settings):
        processor = AutoImageProcessor.from_pretrained(**_source(settings), **choice)
        if limits:
            processor = type(processor).from_dict({**processor.to_dict(), **limits})
    low, high = (processor.size.get(edge) for edge in ("shortest_edge", "longest_edge"))
    if low is not None and high is not None and low > high:
        facts = {"min_pixels": low, "max_pixels": high, "expected": "min_pixels <= max_pixels"}
        raise EncoderError(f"cannot resize images for {_name(settings)}", facts, "correct `min_pixels` or `max_pixels`")
    return processor


def read_tokenizer(settings: Settings) -> Any:
    """Read the tokenizer."""
    from transformers import AutoTokenizer

    with _explained("read the tokenizer of", settings):
        return AutoTokenizer.from_pretrained(**_source(settings))


def load_tower(settings: Settings, config: Any) -> torch.nn.Module:
    """Load the vision tower alone; the language model, four fifths of the weights, is never materialised.

    Raises:
        EncoderError: the weights are not found, or a weight of the tower is missing.
    """
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    # The language model's keys are unexpected here by design; missing ones are checked in `_load`. As long as the class has the prefix
    # `model`, transformers 4 takes the keys under it and drops the tower's; it gets one that no checkpoint has.
    quirks: dict[str, Any] = {"_keys_to_ignore_on_load_unexpected": [r".*"], "base_model_prefix": "vision_tower_alone"}
    mapping: dict[str, Any] = {"key_mapping": {r"^model\.visual\.": "", r"^visual\.": ""}}
    if _version() < _KEY_MAPPING_SINCE:
        quirks["base_model_prefix"], mapping = "visual", {}
    tower = type("Qwen2_5_VisionTower", (Qwen2_5_VisionTransformerPretrainedModel,), quirks)
    return _load(tower, settings, config=config.vision_config, **mapping)


def load_model(settings: Settings) -> torch.nn.Module:
    """Load the whole model.

    Raises:
        EncoderError: the weights are not found or not complete.
    """
    from transformers import Qwen2_5_VLForConditionalGeneration

    return _load(Qwen2_5_VLForConditionalGeneration, settings)


def device_of(module: torch.nn.Module) -> torch.device:
    """Return the device that inputs go to: that of the first weight in memory (accelerate leaves others on `meta`)."""
    import torch

    return next((weight.device for weight in module.parameters() if weight.device.type != "meta"), torch.device(_default_device()))


def model_facts(settings: Settings, config: Any) -> dict[str, object]:
    """Return what identifies the weights: the content of a local folder, wherever it lies, or a hub name and its commit."""
    folder = _folder(settings)
    if folder is not None:
        return {"model": f"folder:{_folder_digest(folder)}", "revision": None}
    return {"model": settings.model_name, "revision": getattr(config, "_commit_hash", None) or settings.revision}


def processor_facts(processor: Any) -> dict[str, object]:
    """Return what identifies the preprocessing: the values that change pixels.

    Neither the class's name nor the other values: both differ between versions of transformers that preprocess alike, and a checkpoint
    must not lose its features by an upgrade.
    """
    held = processor.to_dict()
    values = {key: held.get(key) for key in _PIXEL_VALUES}
    size = processor.size
    values["size"] = [size.get(edge) for edge in ("shortest_edge", "longest_edge")]
    text = json.dumps(values, sort_keys=True, default=str)
    return {"values": hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}


# transformers before this has no `key_mapping`; its loader strips the base model's prefix instead.
_KEY_MAPPING_SINCE = (4, 50)


def _load(model_class: Any, settings: Settings, **options: Any) -> torch.nn.Module:
    import torch

    spread = settings.device_map in _SPREADING and _has_accelerate()
    options["dtype" if _version() >= (4, 56) else "torch_dtype"] = "auto" if settings.dtype == "auto" else getattr(torch, settings.dtype)
    if spread:
        options["device_map"] = settings.device_map
    # fork_rng: transformers draws initial values before it loads; the host's own random numbers must not move.
    with _explained("load the weights of", settings), torch.random.fork_rng(devices=[]), torch.inference_mode(False):
        model, report = model_class.from_pretrained(**_source(settings), **options, output_loading_info=True)
        missing = sorted(report["missing_keys"]) + [str(key) for key in report["mismatched_keys"]]
        if missing:
            shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            facts = {"model": _name(settings), "missing or of another shape": shown, "expected": f"every weight of {model_class.__name__}"}
            raise EncoderError("cannot use these weights: some are missing", facts, "download the model again; its files are not complete")
        if not spread:
            wanted = None if settings.device_map in _SPREADING else settings.device_map
            model = model.to(torch.device(wanted or _default_device()))
        if device_of(model).type == "cpu" and next(model.parameters()).dtype == torch.float16:
            # Half precision lacks kernels on many CPUs and is slower than float32 on the rest; bfloat16 is kept.
            model = model.float()
    loaded: torch.nn.Module = model.eval().requires_grad_(False)
    return loaded


def _source(settings: Settings) -> dict[str, Any]:
    folder = _folder(settings)
    revision = {"revision": settings.revision} if settings.revision is not None and folder is None else {}
    return {"pretrained_model_name_or_path": str(folder or settings.model_name), **revision}


def _folder(settings: Settings) -> Path | None:
    path = Path(settings.model_name).expanduser()
    return path if path.is_dir() else None


def _name(settings: Settings) -> str:
    return f"{settings.model_name!r}   (from {settings.origin('model_name')})"


@contextmanager
def _explained(action: str, settings: Settings) -> Iterator[None]:
    try:
        yield
    except EncoderError:
        raise
    except Exception as error:  # transformers, safetensors, the hub and the device each raise their own; the cause stays attached
        said = " ".join(str(error).split()) or type(error).__name__
        looks_local = _folder(settings) is None and settings.model_name.startswith((".", "/", "~", os.sep))
        facts = {
            "model": _name(settings),
            "found": "no folder of this name" if looks_local else said[:300],
            "expected": "the folder of a Qwen2.5-VL model, or a hub name that is in the local cache or can be downloaded",
        }
        # A folder that is there but broken is no name to download either.
        known = looks_local or _folder(settings) is not None
        fix = _FIX.format(name=_EXAMPLE if known else settings.model_name)
        raise EncoderError(f"cannot {action} the Qwen2.5-VL model", facts, fix) from error


def _folder_digest(folder: Path) -> str:
    """Digest the configuration and a sample of every weight file: new weights change it, moving the folder does not."""
    state = hashlib.blake2b(digest_size=8)
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    config = folder / "config.json"
    state.update(config.read_bytes() if config.is_file() else b"")
    for path in weights:
        size = path.stat().st_size
        state.update(f"{path.name}:{size};".encode())
        last = max(size - _CHUNK, 0)
        with path.open("rb") as file:
            for offset in sorted({last * index // (_CHUNKS - 1) for index in range(_CHUNKS)}):
                file.seek(offset)
                state.update(file.read(_CHUNK))
    return state.hexdigest()


def _has_accelerate() -> bool:
    return os.environ.get(NO_ACCELERATE_VARIABLE) != "1" and importlib.util.find_spec("accelerate") is not None


def _default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _version() -> tuple[int, int]:
    import transformers

    major, minor = transformers.__version__.split(".")[:2]
    return int(major), int(minor)
