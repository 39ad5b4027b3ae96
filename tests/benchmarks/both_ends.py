"""Run the suite on the oldest and on the newest versions that pyproject.toml declares, each in a virtual environment of its own.

python tests/benchmarks/both_ends.py                              # both ends, with this interpreter
python tests/benchmarks/both_ends.py --end oldest --python python3.10 -- tests/encoders

The oldest end pins every floor (`name>=1.2` -> `name==1.2`); the newest takes what pip gives. `PIP_CONSTRAINT` is respected for the newest end,
such as for torch's CPU build. Not in CI: it downloads gigabytes and takes an hour.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import tomllib

ROOT = Path(__file__).parents[2]
# Installed by themselves: their own metadata asks for gigabytes that nothing here uses.
ALONE = ["med-seg-diff-pytorch==0.3.3"]
# Types and formatting are those of the newest versions.
AT_THE_NEWEST_END = ["tests/test_readme.py::test_static_checks_are_clean", "tests/hosts/test_host_adapter_types.py"]


def floors() -> list[str]:
    """Return every dependency of the package and of its extras for users at its floor; the tools of the tests stay new."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = dict.fromkeys([*project["dependencies"], *extras["demo"], *extras["gate"]])
    return [re.sub(r">=\s*([\w.]+).*", r"==\1", requirement) for requirement in wanted]


def run_end(end: str, python: str, folder: Path, arguments: list[str]) -> str:
    """Install one end and run the suite there; return pytest's closing line."""
    venv = folder / end
    subprocess.run([python, "-m", "venv", str(venv)], check=True)
    own = str(venv / "bin" / "python")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VLM_F")}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    if end == "oldest":
        arguments = [*arguments, *(f"--deselect={name}" for name in AT_THE_NEWEST_END)]
        (folder / "floors.txt").write_text("\n".join(floors()) + "\n", encoding="utf-8")
        environment["PIP_CONSTRAINT"] = str(folder / "floors.txt")
    pip = [own, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, f"{ROOT}[test]"], check=True, env=environment)
    subprocess.run([*pip, "--no-deps", *ALONE], check=True, env=environment)
    command = [own, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    lines = done.stdout.splitlines()
    print("\n".join(line for line in lines if line.startswith(("FAILED", "ERROR"))))
    return lines[-1] if lines else f"pytest printed nothing, exit code {done.returncode}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--end", choices=["oldest", "newest", "both"], default="both")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the environments")
    parser.add_argument("--folder", type=Path, default=None, help="where the environments are made; default: a temporary folder")
    parser.add_argument("arguments", nargs="*", help="for pytest; after `--`")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for end in ["oldest", "newest"] if given.end == "both" else [given.end]:
            print(f"{end}: {run_end(end, given.python, folder, given.arguments)}", flush=True)


if __name__ == "__main__":
    main()
