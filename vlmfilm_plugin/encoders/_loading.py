"""Find and load the parts of a model: configuration, tokenizer, a tower alone, whole model.

Owns the differences between versions of transformers, placement on devices, and what is said when a part is missing. Every
`transformers` import is inside a function: building settings or reading the store must not pay for it.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmfilm_plugin.encoders._layouts import refuse_fetched_kernels, refuse_other_layouts
from vlmfilm_plugin.encoders._quantised import dtype_code, marks, quantised, refuse_quantised
from vlmfilm_plugin.encoders._weights import WeightFiles, incomplete
from vlmfilm_plugin.errors import EncoderError

if TYPE_CHECKING:
    import torch

    from vlmfilm_plugin.settings.record import Settings

NO_ACCELERATE_VARIABLE = "VLM_FORCE_NO_ACCELERATE"
_SPREADING = frozenset({"auto", "balanced", "balanced_low_0", "sequential"})
_EXAMPLE = "Qwen/Qwen2.5-VL-3B-Instruct"
_FIX = "give the folder of a model with `model_name`, or download the model beforehand: hf download {name}"


def read_config(settings: Settings, model_type: str | None = None) -> Any:
    """Read the model's configuration; no weights.

    Raises:
        EncoderError: the model is not found, or is not of `model_type`.
    """
    from transformers import AutoConfig

    refuse_other_layouts(folder_of(settings), name_of(settings))
    with explained("read the configuration of", settings):
        config = AutoConfig.from_pretrained(**source(settings), trust_remote_code=False)
    refuse_fetched_kernels(config, name_of(settings))
    found = type(config).model_type  # of the class: in some releases the instance answers for its text part
    if model_type not in (None, found):
        facts = {"model": name_of(settings), "found": f"model type {found!r}", "expected": f"model type {model_type!r}"}
        raise EncoderError(f"cannot use this model with encoder {settings.encoder}", facts, f"{_FIX.format(name=_EXAMPLE)}; or set `encoder` to 'hf'")
    if getattr(config, "_commit_hash", None) is None:
        # Recent releases of transformers no longer keep it; without it a model that changes on the hub would keep its old features.
        config._commit_hash = _cached_commit(settings)
    return config


def read_tokenizer(settings: Settings) -> Any:
    """Read the tokenizer."""
    from transformers import AutoTokenizer

    with explained("read the tokenizer of", settings):
        return AutoTokenizer.from_pretrained(**source(settings), trust_remote_code=False)


@dataclass(frozen=True)
class Part:
    """A part of a model, such as its vision tower: its class, and its own configuration."""

    kind: Any
    config: Any

    def dtypes(self) -> dict[str, str]:
        """Return the dtype of every weight of the part, by the part's own names; nothing is allocated."""
        import torch

        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return {name: dtype_code(weight.dtype) for name, weight in self.kind(self.config).state_dict().items()}


def load_part(settings: Settings, config: Any, part: Part) -> torch.nn.Module:
    """Load a part of the model; only the files that hold it are opened, or downloaded from the hub.

    Args:
        settings: model, dtype and device.
        config: of the whole model, read already; names the commit on the hub.
        part: its weights stand in the checkpoint under some prefix.

    Raises:
        EncoderError: the weights are not found, are quantised, or a weight of the part is missing.
    """
    import torch

    with explained("load the weights of", settings), torch.inference_mode(False):
        wanted, files = part.dtypes(), weight_files(settings, config)
        state = files.read(list(wanted), name_of(settings))
        prefix = files.prefix_of(list(wanted), name_of(settings))
        found = {key: "unread" for key in files.file_of} | {prefix + name: dtype_code(weight.dtype) for name, weight in state.items()}
        refuse_quantised(name_of(settings), config, found, wanted, prefix)
    return _load(part.kind, settings, pretrained_model_name_or_path=None, config=part.config, state_dict=state)


def load_model(settings: Settings, config: Any, model_class: Any, **options: Any) -> torch.nn.Module:
    """Load the whole model; weights whose configuration names a format of quantised ones by the library that owns the format.

    Raises:
        EncoderError: the weights are not found, not complete, or quantised in a format that nothing names.
    """
    with explained("load the weights of", settings):
        files = weight_files(settings, config)
        absent = files.absent() if folder_of(settings) is not None else []
        if absent:
            facts = {"model": name_of(settings), "missing files": ", ".join(absent), "expected": f"every weight of {model_class.__name__}"}
            raise EncoderError("cannot load the weights of the whole model: files are missing", facts, "download the model again, all of it")
        refuse_unnamed_formats(settings, config, files)
    # The set that was looked at, whatever else lies beside it, and of torch's own format by its safe loader alone.
    chosen = {"use_safetensors": files.are_safetensors, "weights_only": True, "trust_remote_code": False}
    return _load(model_class, settings, **source(settings, config), **chosen, **options)


def weight_names(settings: Settings, config: Any) -> list[str]:
    """Return the names of the weights in the checkpoint; none of them is read."""
    with explained("load the weights of", settings):
        return sorted(weight_files(settings, config).file_of)


def device_of(module: torch.nn.Module) -> torch.device:
    """Return the device that inputs go to: that of the first weight in memory (accelerate leaves others on `meta`)."""
    import torch

    return next((weight.device for weight in module.parameters() if weight.device.type != "meta"), torch.device(_default_device()))


def dtype_of(module: torch.nn.Module) -> torch.dtype:
    """Return the dtype that a module computes in: that of its first weight which is a float of 16 bits or more."""
    import torch

    return next((weight.dtype for weight in module.parameters() if weight.dtype.is_floating_point and weight.itemsize > 1), torch.float32)


def refuse_unnamed_formats(settings: Settings, config: Any, files: WeightFiles) -> None:
    """Refuse quantised weights that no library would dequantise, since the configuration names no format."""
    if getattr(config, "quantization_config", None) is not None:
        return
    found = files.dtypes()
    if marked := marks(found):
        raise quantised(name_of(settings), config, {key: found[key] for key in marked})


def _load(model_class: Any, settings: Settings, **options: Any) -> torch.nn.Module:
    import torch

    # A class that does not say where it may be cut stays on one device.
    spread = settings.device_map in _SPREADING and _has_accelerate() and bool(getattr(model_class, "_no_split_modules", None))
    # Weights in hand have no configuration of their own to say their type.
    own = next((weight.dtype for weight in options.get("state_dict", {}).values() if weight.is_floating_point()), "auto")
    options["dtype" if version() >= (4, 56) else "torch_dtype"] = own if settings.dtype == "auto" else getattr(torch, settings.dtype)
    if spread:
        options["device_map"] = settings.device_map
    # fork_rng: transformers draws initial values before it loads; the host's own random numbers must not move.
    with explained("load the weights of", settings), torch.random.fork_rng(devices=[]), torch.inference_mode(False):
        model, report = model_class.from_pretrained(**options, output_loading_info=True)
        missing = sorted(report["missing_keys"]) + [str(key) for key in report["mismatched_keys"]]
        if missing:
            raise incomplete(name_of(settings), "missing or of another shape", missing, f"every weight of {model_class.__name__}")
        if not spread:
            wanted = None if settings.device_map in _SPREADING else settings.device_map
            model = model.to(torch.device(wanted or _default_device()))
        is_quantised = getattr(model, "is_quantized", False)
        if device_of(model).type == "cpu" and dtype_of(model) == torch.float16 and not is_quantised:
            # Half precision lacks kernels on many CPUs and is slower than float32 on the rest; bfloat16 is kept.
            model = model.float()
    loaded: torch.nn.Module = model.eval().requires_grad_(False)
    return loaded


def _cached_commit(settings: Settings) -> str | None:
    """Return the commit of a hub model whose configuration has just been read, as the cache's folder names it."""
    if folder_of(settings) is not None:
        return None
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(settings.model_name, "config.json", revision=settings.revision)
    return Path(path).parent.name if isinstance(path, str) else None


def weight_files(settings: Settings, config: Any) -> WeightFiles:
    """Return the weight files of the model, at the commit of `config` where it is known."""
    revision, named = getattr(config, "_commit_hash", None) or settings.revision, getattr(config, "transformers_weights", None)
    return WeightFiles.of(str(folder_of(settings) or settings.model_name), revision, named)


def source(settings: Settings, config: Any = None) -> dict[str, Any]:
    """Return where `from_pretrained` finds the model, at the commit of `config` where it is known."""
    folder = folder_of(settings)
    revision = getattr(config, "_commit_hash", None) or settings.revision
    return {"pretrained_model_name_or_path": str(folder or settings.model_name), **({"revision": revision} if revision and folder is None else {})}


def folder_of(settings: Settings) -> Path | None:
    """Return the folder of a local model, or None for one of the hub."""
    path = Path(settings.model_name).expanduser()
    return path if path.is_dir() else None


def name_of(settings: Settings) -> str:
    """Return what errors call the model."""
    return f"{settings.model_name!r}   (from {settings.origin('model_name')})"


@contextmanager
def explained(action: str, settings: Settings) -> Iterator[None]:
    """Turn whatever is raised inside into an `EncoderError` about the model."""
    try:
        yield
    except EncoderError:
        raise
    except Exception as error:  # transformers, safetensors, the hub and the device each raise their own; the cause stays attached
        said = " ".join(str(error).split()) or type(error).__name__
        if "trust_remote_code" in said:
            facts = {"model": name_of(settings), "found": "a model that brings code of its own (auto_map)", "expected": "one that transformers knows"}
            fix = "use another model; code from a model's folder is never run"
            raise EncoderError(f"cannot {action} the model: it would have to run its own code", facts, fix) from error
        looks_local = folder_of(settings) is None and settings.model_name.startswith((".", "/", "~", os.sep))
        facts = {
            "model": name_of(settings),
            "found": "no folder of this name" if looks_local else said[:300],
            "expected": "the folder of a model, or a hub name that is in the local cache or can be downloaded",
        }
        # A folder that is there but broken is no name to download either.
        known = looks_local or folder_of(settings) is not None
        fix = _FIX.format(name=_EXAMPLE if known else settings.model_name)
        raise EncoderError(f"cannot {action} the model", facts, fix) from error


def _has_accelerate() -> bool:
    # One process a GPU: a model spread over all of them would be there once for each rank.
    is_alone = os.environ.get("LOCAL_RANK") is None
    return is_alone and os.environ.get(NO_ACCELERATE_VARIABLE) != "1" and importlib.util.find_spec("accelerate") is not None


def _default_device() -> str:
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    rank = os.environ.get("LOCAL_RANK", "")
    return f"cuda:{int(rank) % torch.cuda.device_count()}" if rank.isdecimal() else "cuda"


def version() -> tuple[int, int]:
    """Return major and minor version of transformers."""
    import transformers

    major, minor = transformers.__version__.split(".")[:2]
    return int(major), int(minor)
