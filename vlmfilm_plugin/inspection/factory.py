"""A UNet from `module:factory`, and example arguments from texts such as `cond=1,1,64,64` and `1:int64`."""

from __future__ import annotations

import importlib
import os
import re
import sys
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from vlmfilm_plugin.errors import HostError, SettingsError
from vlmfilm_plugin.inspection.look import inspect
from vlmfilm_plugin.inspection.sighting import NONE, Facts, Sighting
from vlmfilm_plugin.inspection.starter import adapter_for

_INPUT = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<shape>[1-9]\d*(?:,[1-9]\d*)*)?(?::(?P<type>\w+))?")
_TYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "uint8", "bool")


def look_at(target: str, inputs: list[str]) -> dict[str, Any]:
    """Build the UNet, run it once, and return what was seen as plain data.

    Raises:
        HostError: the factory is not found, raises, or returns no module; or as `inspect`.
        SettingsError: an input that cannot be read.
    """
    args, named = _arguments(inputs)
    unet = _built(target)
    found = inspect(unet, *args, **named)
    why = "no script ran: say it by `steps` here, or write `with vlmfilm_plugin.running_batch({'image': images}, phase='train'):` around the step"
    return found.as_json() | adapter_for(Sighting(found.unets[0], type(unet), Facts(rows=NONE, why=why)))


def _built(target: str) -> nn.Module:
    name, _, attribute = target.partition(":")
    # As `python train.py` would: modules of the working directory.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        factory: Any = importlib.import_module(name)
    except ImportError as error:
        facts = {"factory": target, "error": f"{type(error).__name__}: {error}", "looked in": os.getcwd()}
        raise HostError("cannot import the module of the factory", facts, "start in the folder of your repo, or correct the name") from error
    for part in attribute.split("."):
        if not hasattr(factory, part):
            closest = get_close_matches(part, dir(factory), n=3)
            facts = {"factory": target, "found": f"no {part!r} in {name}", "closest": ", ".join(closest) or "none"}
            raise HostError("cannot find the factory", facts, "correct the name")
        factory = getattr(factory, part)
    if isinstance(factory, nn.Module):
        return factory
    try:
        unet = factory()
    except Exception as error:
        facts = {"factory": target, "error": f"{type(error).__name__}: {error}", "expected": "a function without arguments that returns the UNet"}
        raise HostError("the factory raised", facts, "give a function that builds the net in one configuration") from error
    if not isinstance(unet, nn.Module):
        facts = {"factory": target, "found": f"a {type(unet).__name__}", "expected": "a torch.nn.Module"}
        raise HostError("the factory returned no module", facts, "let it return the UNet")
    return unet


def _arguments(inputs: list[str]) -> tuple[list[Tensor], dict[str, Tensor]]:
    args: list[Tensor] = []
    named: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for text in inputs:
        read = _INPUT.fullmatch(text)
        kind = (read["type"] or "float32") if read is not None else ""
        if read is None or kind not in _TYPES or not (read["shape"] or read["type"]):
            facts = {"found": repr(text), "expected": "a shape, such as 1,1,64,64, 1:int64, cond=1,1,64,64 or :int64", "types": ", ".join(_TYPES)}
            raise SettingsError("cannot read --input", facts, "correct it")
        shape = [int(size) for size in (read["shape"] or "").split(",") if size]
        dtype: torch.dtype = getattr(torch, kind)
        value = torch.randn(shape, generator=generator).to(dtype) if dtype.is_floating_point else torch.ones(shape, dtype=dtype)
        if read["name"]:
            named[read["name"]] = value
        else:
            args.append(value)
    return args, named
