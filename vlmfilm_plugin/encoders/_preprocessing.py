"""The image processor of a model: always through PIL, with the pixel limits of the settings, and the facts that identify it."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from vlmfilm_plugin.encoders._loading import explained, name_of, source, version
from vlmfilm_plugin.errors import EncoderError

if TYPE_CHECKING:
    from vlmfilm_plugin.settings.record import Settings

_PIXEL_VALUES = (
    *("do_resize", "resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "do_convert_rgb"),
    *("patch_size", "temporal_patch_size", "merge_size"),
)
# What other image processors have besides; a value that is not there is no fact.
_MORE_VALUES = ("do_center_crop", "crop_size", "crop_pct", "do_pad", "pad_size", "max_num_patches", "do_pan_and_scan")
# And what is rarer, in the files of other models than those the first version was tried with.
_RARE_VALUES = (
    *("do_grayscale", "do_flip_channel_order", "do_thumbnail", "do_align_long_axis", "do_crop_margin", "do_affine_transform", "rescale_offset"),
    *("size_divisor", "size_divisibility", "ensure_multiple_of", "keep_aspect_ratio", "do_image_splitting", "crop_to_patches", "min_patches"),
    *("max_patches", "max_image_size", "background_color", "offset", "include_top", "pad_mode", "pan_and_scan_min_crop_size"),
    *("pan_and_scan_max_num_crops", "pan_and_scan_min_ratio_to_activate", "normalize_factor", "default_to_square"),
)
# Preprocessed by torchvision alone; the values under the same names mean the same to this one, but it resizes through PIL.
_STAND_INS = {"DINOv3ViTImageProcessor": "ViTImageProcessor"}


def read_image_processor(settings: Settings) -> Any:
    """Read the image processor, with `min_pixels` and `max_pixels` of the settings in place of its own.

    Raises:
        EncoderError: it is not found, needs torchvision, or the pixel limits do not fit it or each other.
    """
    limits = {key: value for key in ("min_pixels", "max_pixels") if (value := getattr(settings, key)) is not None}
    with explained("read the image processor of", settings):
        processor = _pil_processor(settings)
        edges: list[Any] = [(getattr(processor, "size", None) or {}).get(edge) for edge in ("shortest_edge", "longest_edge")]
        if limits and None in edges:
            facts = {"found": f"{type(processor).__name__}, which resizes to one size", "expected": "a processor with pixel limits, as Qwen's"}
            raise EncoderError(f"cannot limit the pixels for {name_of(settings)}", facts, f"take out {' and '.join(limits)}")
        if limits:
            processor = type(processor).from_dict({**processor.to_dict(), **limits})
            edges = [processor.size.get(edge) for edge in ("shortest_edge", "longest_edge")]
    if None not in edges and edges[0] > edges[1]:
        facts = {"min_pixels": edges[0], "max_pixels": edges[1], "expected": "min_pixels <= max_pixels"}
        raise EncoderError(f"cannot resize images for {name_of(settings)}", facts, "correct `min_pixels` or `max_pixels`")
    return processor


def _pil_processor(settings: Settings) -> Any:
    # The PIL one on purpose: the others resize through torchvision where it is installed, with slightly different values,
    # and a feature must not depend on which packages are there.
    import transformers
    from transformers.image_processing_utils import BaseImageProcessor

    is_new = version() >= (5, 0)
    values, _ = BaseImageProcessor.get_image_processor_dict(source(settings)["pretrained_model_name_or_path"], revision=settings.revision)
    stand_in = _STAND_INS.get(str(values.get("image_processor_type")).removesuffix("Fast"))
    if stand_in is not None:
        values = {key: value for key, value in values.items() if key != "image_processor_type"}
        return getattr(transformers, stand_in + ("Pil" if is_new else "")).from_dict(values)
    choice: dict[str, Any] = {"trust_remote_code": False, **({"backend": "pil"} if is_new else {"use_fast": False})}
    processor = transformers.AutoImageProcessor.from_pretrained(**source(settings), **choice)
    name = type(processor).__name__
    if name.endswith("Fast") or any(base.__name__ == "TorchvisionBackend" for base in type(processor).__mro__):
        facts = {"model": name_of(settings), "found": name, "expected": "an image processor that works through PIL"}
        raise EncoderError("cannot preprocess for this model: it needs torchvision", facts, "use another model")
    return processor


def processor_facts(processor: Any, model_type: str) -> dict[str, object]:
    """Return what identifies the preprocessing: the values that change pixels, and the class where it is not the model's own.

    Not the name of the model's own class and no other value: both differ between versions of transformers that preprocess alike, and a
    checkpoint must not lose its features by an upgrade.
    """
    values = _values(processor)
    held = processor.to_dict()
    values |= {key: held[key] for key in _RARE_VALUES if held.get(key) is not None}
    name = _plain_class(type(processor).__name__)
    if name not in _own_classes(model_type):
        values["class"] = name
    return _digest(values)


def processor_facts_of_first_version(processor: Any) -> dict[str, object]:
    """Return what identified the preprocessing in the first version of this package."""
    return _digest(_values(processor))


def _values(processor: Any) -> dict[str, object]:
    held = processor.to_dict()
    values = {key: held.get(key) for key in _PIXEL_VALUES}
    values |= {key: held[key] for key in _MORE_VALUES if held.get(key) is not None}
    size = getattr(processor, "size", None) or {}
    values["size"] = [size.get(edge) for edge in ("shortest_edge", "longest_edge")]
    if size.get("height") is not None:
        values["size"] = [size["height"], size["width"]]
    return values


def _digest(values: dict[str, object]) -> dict[str, object]:
    text = json.dumps(values, sort_keys=True, default=str)
    return {"values": hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}


def _plain_class(name: str) -> str:
    return name.removesuffix("Fast").removesuffix("Pil")


def _own_classes(model_type: str) -> set[str]:
    """Return the image processors that transformers gives to models of this type, without the endings that name a backend."""
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

    held: Any = IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type, ())
    names = held.values() if isinstance(held, dict) else (held,) if isinstance(held, str) else held
    return {_plain_class(name) for name in (*names, *_STAND_INS.values()) if name}
