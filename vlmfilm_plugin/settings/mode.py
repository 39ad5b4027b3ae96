"""The variables: `VLM_FILM_MODE`, and the names that are no settings."""

from __future__ import annotations

import os
from collections.abc import Mapping
from difflib import get_close_matches

from vlmfilm_plugin.errors import SettingsError

MODE_VARIABLE = "VLM_FILM_MODE"

MODES = ("on", "off", "shuffle")

CONFIG_VARIABLE = "VLM_FILM_CONFIG"

PREFIX = "VLM_FILM_"

AUTOLOAD_VARIABLE = "TORCH_DEVICE_BACKEND_AUTOLOAD"
"""torch's own: whether it calls entry points, and with them this package."""

STRICT_VARIABLE = "VLM_FILM_STRICT"
"""0: what would make a run asked to be FiLM a baseline is a warning, no error."""

HOSTS_VARIABLE = "VLM_FILM_HOSTS"

INSPECT_VARIABLE = "VLM_FILM_INSPECT"
"""Set by `vlmfilm inspect` for the host's script: the file that what was seen is written to."""

NOT_SETTINGS = frozenset({MODE_VARIABLE, CONFIG_VARIABLE, STRICT_VARIABLE, HOSTS_VARIABLE, INSPECT_VARIABLE})


def read_mode(environ: Mapping[str, str] | None = None) -> str | None:
    """Return `VLM_FILM_MODE` (`on`, `off` or `shuffle`), or None where it is unset.

    Raises:
        SettingsError: the variable is set to anything else, the empty string included.
    """
    value = (os.environ if environ is None else environ).get(MODE_VARIABLE)
    if value is None or value in MODES:
        return value
    closest = get_close_matches(value.strip().lower(), MODES, n=1, cutoff=0.4)
    raise SettingsError(
        f"cannot use {MODE_VARIABLE}: not a mode",
        {"found": repr(value), "expected": "on, off or shuffle"},
        f"set {MODE_VARIABLE}={closest[0]}" if closest else f"unset {MODE_VARIABLE}, or set it to one of these",
    )


def is_strict(environ: Mapping[str, str] | None = None) -> bool:
    """Tell whether a run that was asked to be FiLM and would be a baseline is stopped: not with `VLM_FILM_STRICT=0`.

    Raises:
        SettingsError: the variable is neither 0 nor 1.
    """
    value = (os.environ if environ is None else environ).get(STRICT_VARIABLE, "1")
    if value not in ("0", "1"):
        facts = {"found": repr(value), "expected": "1 (as unset), or 0: warn where a run would be a baseline, and go on"}
        raise SettingsError(f"cannot use {STRICT_VARIABLE}", facts, f"set {STRICT_VARIABLE}=0, or unset it")
    return value == "1"


def is_autoload_on(environ: Mapping[str, str]) -> bool:
    """Tell whether torch calls its entry points; as torch reads it, anything but 1 is off."""
    return environ.get(AUTOLOAD_VARIABLE, "1") == "1"


def refuse_changed_mode(expected: str | None) -> None:
    """Check that `VLM_FILM_MODE` still says what it said at activation (None: it was unset); one that was taken out says nothing.

    Raises:
        SettingsError: it says something else, which would be ignored.
    """
    now = os.environ.get(MODE_VARIABLE, expected)
    if now != expected:
        raise SettingsError(
            f"{MODE_VARIABLE} was changed after VLM-FiLM was activated",
            {"found": repr(now), "expected": f"{expected!r}, as at activation"},
            "restart the process (the notebook's kernel) with the mode you want",
        )
