"""The one reader of YAML files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vlmfilm_plugin.errors import SettingsError
from vlmfilm_plugin.settings.mode import CONFIG_VARIABLE


def read_yaml(path: Path) -> Mapping[str, object]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: not UTF-8, or an impossible date or number
        raise SettingsError(
            f"cannot read the file of {CONFIG_VARIABLE}", {"file": path, "error": " ".join(str(error).split())}, "give the path of a YAML file"
        ) from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SettingsError(
            f"cannot use the file of {CONFIG_VARIABLE}",
            {"file": path, "found": type(content).__name__, "expected": "a mapping of setting names to values"},
            "write one `name: value` a line",
        )
    return content
