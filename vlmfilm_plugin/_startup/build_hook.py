"""A hook of hatchling's, and in no wheel: an editable install gets the start-up gate as real files of the environment.

A moved checkout must not break `import torch`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = "vlmfilm_plugin/_startup"


class GateHook(BuildHookInterface):
    """Copy the gate where the rest of the package is a path alone; in a wheel `sources` puts it there, among the first files."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the gate's files to an editable build."""
        if version == "editable":
            gate = sorted(Path(self.root, FOLDER).glob("*startup.py"))
            build_data["force_include_editable"] = {f"{FOLDER}/{path.name}": path.name for path in gate}
