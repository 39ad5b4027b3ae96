"""Run pip in this process and look at the environment before every file it makes, moves or removes.

python pip_watch.py SITE KILL PIP'S-FOLDER PIP-ARGUMENT... prints a JSON list of [event, file, missing], one for each such moment: `missing` are
the modules that an entry point of `torch.backends` names and that are not there. With KILL 0 or more the process kills itself at that moment.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path

EVENTS = {"os.rename": 0, "os.remove": 0, "os.rmdir": 0, "os.mkdir": 0}


def missing(site: Path) -> list[str]:
    """Return the modules without which `import torch` fails: what is left of metadata under pip's own names counts, as it does for Python."""
    found = []
    for file in site.glob("*.dist-info/entry_points.txt"):
        group = file.read_text().partition("[torch.backends]")[2].partition("[")[0]
        found += [name for name in re.findall(r"= *(\w+):", group) if not (site / f"{name}.py").is_file() or not (site / f"{name}.py").stat().st_size]
    return sorted(found)


def main() -> int:
    site, kill = Path(sys.argv[1]), int(sys.argv[2])
    moments: list[tuple[str, str, list[str]]] = []
    is_looking = False

    def look(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal is_looking
        is_write = event == "open" and isinstance(arguments[1], str) and bool(set(arguments[1]) & set("wax"))
        if is_looking or not (event in EVENTS or is_write):
            return
        is_looking = True
        try:
            if len(moments) == kill:
                os.kill(os.getpid(), signal.SIGKILL)
            moments.append((event, str(arguments[0]), missing(site)))
        finally:
            is_looking = False

    sys.path.append(sys.argv[3])
    sys.addaudithook(look)
    from pip._internal.cli.main import main as pip

    code = pip(sys.argv[4:])
    is_looking = True
    print(json.dumps(moments))
    return code


if __name__ == "__main__":
    raise SystemExit(main())
