"""Host adapters that are files: the Python files named by `VLM_FILM_HOSTS`, beside the installed ones. Executes what the user names himself."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import ModuleType

from vlmfilm_plugin.errors import HostError
from vlmfilm_plugin.settings.mode import HOSTS_VARIABLE

TRIGGERS = "vlmfilm_modules"


@dataclass(frozen=True)
class FileAdapter:
    """A host adapter from a file, loaded; it stands where an entry point would.

    Attributes:
        name: the host module that triggers it.
        value: the file.
        module: the file, executed.
    """

    name: str
    value: str
    module: ModuleType

    def load(self) -> ModuleType:
        """Return the host adapter."""
        return self.module


def absolute_paths(environ: Mapping[str, str], base_dir: str) -> list[Path]:
    """Return the files that the variable names, relative ones against `base_dir`, each once."""
    named = [part for part in environ.get(HOSTS_VARIABLE, "").split(os.pathsep) if part.strip()]
    return list(dict.fromkeys(Path(os.path.abspath(os.path.join(base_dir, os.path.expanduser(part.strip())))) for part in named))


def file_adapters(paths: Sequence[Path]) -> list[FileAdapter]:
    """Load each file once and return it under every host module that it says triggers it.

    Raises:
        HostError: a file is missing, is no Python file, cannot be executed, or names no modules.
    """
    return [FileAdapter(name, str(path), adapter) for path in paths for adapter in [_execute(path)] for name in _triggers(path, adapter)]


def _execute(path: Path) -> ModuleType:
    if not path.is_file() or path.suffix != ".py":
        found = "a folder" if path.is_dir() else "no such file" if not path.exists() else f"a file that ends in {path.suffix!r}"
        raise _refusal(path, found, "a Python file (.py)")
    name = f"vlmfilm_adapter_{sha256(str(path).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise _refusal(path, "a file that Python cannot import", "a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    # Functions of the host adapter are pickled with the UNet: they are found by the module's name.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise _refusal(path, f"{type(error).__name__}: {error}", "a file that can be executed") from error
    return module


def _triggers(path: Path, adapter: ModuleType) -> list[str]:
    named = getattr(adapter, TRIGGERS, None)
    if not isinstance(named, (list, tuple)) or not named or not all(isinstance(each, str) and each.strip() for each in named):
        raise _refusal(path, f"{TRIGGERS} = {named!r}", f'the names of your host\'s modules: `{TRIGGERS} = ["package.unet", "package.trainer"]`')
    return list(dict.fromkeys(named))


def _refusal(path: Path, found: str, expected: str) -> HostError:
    return HostError(
        f"cannot use host adapter {path}",
        {"found": found, "expected": expected, "origin": HOSTS_VARIABLE},
        f"correct the file, or take it out of {HOSTS_VARIABLE}",
    )
