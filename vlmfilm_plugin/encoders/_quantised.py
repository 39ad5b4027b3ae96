"""Quantised weights: a checkpoint that keeps integers or 8-bit floats beside scales, which would be loaded as if they were the weights.

Knows how such weights look in a file, whoever wrote them; dequantising them is the business of the library that owns the format.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from vlmfilm_plugin.errors import EncoderError, some_of

# As safetensors writes them; a tensor's own dtype is brought to these by `dtype_code`.
_WHOLE = frozenset({"F64", "F32", "F16", "BF16"})
_PACKED = re.compile(r"^(I8|U8|F8.*|F4.*|F6.*|I4|U4)$")
# What stands beside a quantised weight: its scales, zero points, block statistics or packed values.
_BESIDE = re.compile(r"(^|[._])(w?scales?|scale_inv|zero_?points?|qzeros|qweight|absmax|quant_map|quant_state|SCB|g_idx|weight_packed)($|[._])")


def dtype_code(dtype: object) -> str:
    """Return a dtype of torch as safetensors writes it: `F32`, `I8`, `F8_E4M3`."""
    name = str(dtype).removeprefix("torch.")
    for long, short in (("bfloat", "BF"), ("float8_", "F8_"), ("float4_", "F4_"), ("float", "F"), ("uint", "U"), ("int", "I")):
        if name.startswith(long):
            return short + name[len(long) :].upper()
    return name.upper()


def marks(dtypes: Mapping[str, str]) -> list[str]:
    """Return the keys of a checkpoint that a quantised weight, or what stands beside one, is kept under.

    Args:
        dtypes: key -> dtype, as safetensors writes it.
    """
    return sorted(key for key, dtype in dtypes.items() if _PACKED.match(dtype) or _stands_beside(key, dtypes))


def _stands_beside(key: str, keys: Iterable[str]) -> bool:
    module, _, leaf = key.rpartition(".")
    if leaf.startswith("weight_"):  # weight_scale, weight_scale_inv, weight_packed, weight_zero_point
        return _BESIDE.search(leaf.removeprefix("weight_")) is not None or leaf == "weight_packed"
    if "weight." in key:  # weight.absmax, weight.quant_map, weight.quant_state.bitsandbytes__nf4
        return _BESIDE.search(key.partition("weight.")[2]) is not None
    # SCB, qzeros, scales: names of their own, which a layer of another kind might have too, but not beside these.
    return leaf in {"SCB", "qweight", "qzeros", "g_idx"} or (leaf == "scales" and f"{module}.qweight" in keys)


def refuse_quantised(model: str, config: Any, found: Mapping[str, str], expected: Mapping[str, str], prefix: str) -> None:
    """Check the weights of a part of a model, which are loaded as they are.

    Args:
        model: how errors call the model.
        found: key -> dtype in the checkpoint.
        expected: name -> dtype in the part.
        prefix: of the part in the checkpoint.

    Raises:
        EncoderError: a weight that should be a float of 16 bits or more is kept in another form.
    """
    inside = {key: dtype for key, dtype in found.items() if key.startswith(prefix)}
    other = [prefix + name for name, dtype in expected.items() if dtype in _WHOLE and found.get(prefix + name, dtype) not in _WHOLE]
    # Of what is the part's own: a layer may be called after a scale.
    names = {prefix + name for name in expected}
    beside = [key for key in marks(inside) if key not in names]
    modules = {name.rpartition(".")[0] for name in names}
    beside = [key for key in beside if any(_is_below(key, module) for module in modules)]
    if other or beside:
        raise quantised(model, config, {key: found[key] for key in [*other, *beside]})


def _is_below(key: str, module: str) -> bool:
    return key.startswith(module + ".") and key[len(module) + 1 :].count(".") <= 2


def quantised(model: str, config: Any, found: Mapping[str, str]) -> EncoderError:
    """Return the error about quantised weights."""
    shown = some_of([f"{key} {dtype}" for key, dtype in found.items()])
    said = getattr(config, "quantization_config", None) or {}
    method = said.get("quant_method") if isinstance(said, Mapping) else getattr(said, "quant_method", None)
    facts = {"model": model, "format": method or "not stated in config.json", "found": shown, "expected": "weights in float16, bfloat16 or float32"}
    return EncoderError("cannot use these weights: they are quantised", facts, "use the model as it was before quantisation")
