"""Whose feature each row gets in loops of users around a library's UNet, by pixels: an epoch, shuffled, two workers (`row_probe`)."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from processes import python, succeed
from row_probe import make_image
from stand_in import SETTINGS

HERE = Path(__file__).parent
COUNT = 11
pytest.importorskip("monai", reason="monai is not installed")
from library_loops import make_volumes  # noqa: E402

needs_nibabel = pytest.mark.skipif(find_spec("nibabel") is None, reason="nibabel is not installed: MONAI reads NIfTI files by it")


# Rows: of eleven images, once; of windows of 32 in 64 pixels; of volumes, patches and then windows.
@pytest.mark.parametrize(
    ("kind", "at_least"),
    [("plain", 11), ("lightning", 11), ("accelerated", 11), ("windows", 44), pytest.param("volumes", 11 + 44, marks=needs_nibabel)],
)
def test_every_row_is_conditioned_on_its_own_image_and_in_shuffle_none(tmp_path: Path, kind: str, at_least: int) -> None:
    files = [tmp_path / "pictures" / f"{number:02}.png" for number in range(COUNT)]
    for number, file in enumerate(files):
        make_image(file, number, COUNT)
    shown = files
    if kind == "volumes":
        make_volumes(files, tmp_path / "pictures")
        shown = [tmp_path / "pictures" / f"view{number}.pt" for number in range(COUNT)]
    (tmp_path / "files.txt").write_text("\n".join(map(str, shown)))
    for mode in ("on", "shuffle"):
        out = tmp_path / f"{mode}.json"
        probe = {"PROBE_OUT": str(out), "PROBE_FILES": str(tmp_path / "files.txt"), "PYTHONPATH": str(HERE.parent)}
        variables = {**SETTINGS, "VLM_FILM_FEATURE_TRANSFORM": "none", "VLM_FILM_CACHE_DIR": str(tmp_path / "cache"), **probe}
        succeed(python(HERE / "library_loops.py", kind, "fork", tmp_path / "pictures", cwd=tmp_path, VLM_FILM_MODE=mode, **variables))
        rows = json.loads(out.read_text())
        assert len(rows) >= at_least and all(is_clear for _, _, is_clear in rows), rows
        assert {own for own, _, _ in rows} == set(range(COUNT))
        own = sum(mine == used for mine, used, _ in rows)
        print(f"{kind} {mode}: {own} of {len(rows)}")
        assert own == (len(rows) if mode == "on" else 0), rows
