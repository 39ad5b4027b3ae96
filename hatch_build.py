"""An editable install gets the start-up gate as a real file of the environment: a moved checkout must not break `import torch`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

GATE = "vlmfilm_plugin/_startup"


class GateHook(BuildHookInterface):
    """Copy the gate where the rest of the package is a path alone; in a wheel `sources` puts it there, among the first files."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the gate's files to an editable build."""
        if version == "editable":
            build_data["force_include_editable"] = {f"{GATE}/{path.name}": path.name for path in sorted(Path(self.root, GATE).glob("*.py"))}
