"""Say why FiLM is in no module: which host adapters there are, what became of each, and which UNets were there that none describes."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from importlib.metadata import EntryPoint
from types import ModuleType

from vlmfilm_plugin.entry_points import package_of
from vlmfilm_plugin.errors import HostError, some_of
from vlmfilm_plugin.hosts.adapter_files import FileAdapter
from vlmfilm_plugin.settings.mode import MODE_VARIABLE, STRICT_VARIABLE


def nothing_attached(
    optimizer: str,
    mode: str | None,
    entries: Mapping[str, Sequence[EntryPoint | FileAdapter]],
    seen: Mapping[str, str],
    failures: Mapping[str, BaseException],
) -> HostError:
    """Return the error of a process that was asked for FiLM and is about to train without it.

    Args:
        optimizer: what is about to update.
        mode: what the variable says.
        entries: host module -> entry points of the host adapters that name it.
        seen: host modules that were imported -> what became of them.
        failures: host adapters that could not be loaded, as `name = value` -> error.
    """
    facts: dict[str, object] = {"found": f"{optimizer}, and FiLM in no module of this process"}
    facts |= {f"imported {name}": fate for name, fate in seen.items()}
    facts |= {f"host adapter {name}": f"cannot be loaded: {type(error).__name__}: {error}" for name, error in failures.items()}
    if unets := sorted(_unets()):
        facts["UNets"] = some_of(unets, 6)
    absent = [name for name in entries if name not in seen]
    for package in sorted({_origin(entry) for name in absent for entry in entries[name]}):
        names = [name for name in absent if package in map(_origin, entries[name])]
        facts[f"{package} knows"] = ", ".join(map(_with_hint, names)) + ": not imported"
    facts["expected"] = "a host that a host adapter describes, or `vlmfilm_plugin.attach(unet)` before the optimizer is built"
    return HostError(
        f"{MODE_VARIABLE}={mode} asks for FiLM, and this run is about to train a plain baseline",
        facts,
        f"write a host adapter for this repo (README, section on other hosts), or unset {MODE_VARIABLE}; {STRICT_VARIABLE}=0 makes this a warning",
    )


def _with_hint(name: str) -> str:
    imported = [module for module in sys.modules if module.count(".") == name.count(".")]
    close = get_close_matches(name, imported, n=1, cutoff=0.8)
    return f"{name} (did you mean {close[0]}, which was imported?)" if close else name


def _unets() -> Iterator[str]:
    """Yield the UNet classes, by name, of the modules that are no installed package's."""
    from torch import nn

    for name, module in list(sys.modules.items()):
        if not isinstance(module, ModuleType) or _is_installed(module):
            continue
        for label, item in list(vars(module).items()):
            is_unet = "unet" in label.lower() and inspect.isclass(item) and issubclass(item, nn.Module)
            if is_unet and item.__module__ == name:
                yield f"{name}.{label}"


def _is_installed(module: ModuleType) -> bool:
    path = getattr(module, "__file__", None)
    if path is None:
        return getattr(module, "__name__", "") != "__main__"
    return "site-packages" in path or path.startswith(sys.base_prefix)


def _origin(entry: EntryPoint | FileAdapter) -> str:
    return entry.value if isinstance(entry, FileAdapter) else package_of(entry)
