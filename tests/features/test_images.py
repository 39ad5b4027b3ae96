"""Images: every mode, bit depth and range a host or a data set may bring, and every file that is none."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vlmfilm_plugin.errors import ImageReadError
from vlmfilm_plugin.features.images import from_array, from_tensor, read_image, sample_range
from vlmfilm_plugin.features.store.protocol import SourceStamp

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def _saved(image: Image.Image, path: Path, **options: Any) -> Path:
    image.save(path, **options)
    return path


def _grey(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    values = np.asarray(image)
    assert (values == values[..., :1]).all()
    return values[..., 0]


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P"])
def test_eight_bit_modes_keep_their_values(tmp_path: Path, mode: str) -> None:
    path = _saved(Image.fromarray(RAMP).convert(mode), tmp_path / "a.png")
    assert (_grey(read_image(path)) == RAMP).all()


def test_one_bit_becomes_black_and_white(tmp_path: Path) -> None:
    path = _saved(Image.fromarray(RAMP > 100), tmp_path / "a.png")
    assert (_grey(read_image(path)) == np.where(RAMP > 100, 255, 0)).all()


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    path = _saved(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), tmp_path / "a.tif")
    assert read_image(path).getpixel((0, 0)) == (255, 0, 0)


def test_alpha_is_dropped_and_never_composited(tmp_path: Path) -> None:
    path = _saved(Image.new("RGBA", (4, 4), (10, 20, 30, 0)), tmp_path / "a.png")
    assert read_image(path).getpixel((0, 0)) == (10, 20, 30)


def test_transparent_palette_keeps_its_colours(tmp_path: Path) -> None:
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 200, 100, 50])
    path = _saved(palette, tmp_path / "a.png", transparency=1)
    assert read_image(path).getpixel((0, 0)) == (200, 100, 50)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bit_is_scaled_by_its_full_range(tmp_path: Path, name: str) -> None:
    dim = np.linspace(1000, 3000, 64).astype(np.uint16).reshape(8, 8)
    values = _grey(read_image(_saved(Image.fromarray(dim), tmp_path / name)))
    assert (values == np.rint(dim / 65535 * 255)).all()
    assert values.max() == 12, "stretched to its own maximum"


def test_big_endian_sixteen_bit_equals_little_endian() -> None:
    values = np.array([[0, 256, 65535, 32768]], dtype=np.uint16)
    big = Image.frombytes("I;16B", (4, 1), values.astype(">u2").tobytes())
    assert _grey(from_array(big)).tolist() == [[0, 1, 255, 128]]


def test_big_endian_array_equals_little_endian() -> None:
    values = np.array([[0, 256, 65535, 32768]], dtype=">u2")
    assert _grey(from_array(values)).tolist() == [[0, 1, 255, 128]]


def test_mode_i_with_sixteen_bit_values_is_read_and_beyond_is_refused() -> None:
    assert _grey(from_array(Image.fromarray(np.array([[0, 65535]], dtype=np.int32)))).tolist() == [[0, 255]]
    for values in ([[0, 65536]], [[-1, 5]]):
        with pytest.raises(ImageReadError, match="32-bit integers"):
            from_array(Image.fromarray(np.array(values, dtype=np.int32)))


def test_float_mode_is_read_in_unit_range_only(tmp_path: Path) -> None:
    path = _saved(Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32)), tmp_path / "a.tif")
    assert _grey(read_image(path)).tolist() == [[0, 128, 255]]
    bad = _saved(Image.fromarray(np.array([[0.0, 255.0]], dtype=np.float32)), tmp_path / "b.tif")
    with pytest.raises(ImageReadError, match=r"floats in \[0, 255\]") as caught:
        read_image(bad)
    assert str(bad) in str(caught.value)


def test_exif_orientation_is_not_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    path = _saved(Image.new("RGB", (8, 4)), tmp_path / "a.jpg", exif=exif)
    assert read_image(path).size == (8, 4)


def test_missing_file_names_the_path(tmp_path: Path) -> None:
    with pytest.raises(ImageReadError) as caught:
        read_image(tmp_path / "no.png")
    assert caught.value.facts["file"] == tmp_path / "no.png"
    assert caught.value.fix and "path" in caught.value.fix
    assert list(caught.value.facts)[-1] == "expected"


@pytest.mark.parametrize("content", [b"", b"hello, this is text\n", b"\x89PNG\r\n\x1a\n", b"\x00" * 4096], ids=["empty", "text", "header", "zeros"])
def test_a_file_that_is_no_image_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(ImageReadError) as caught:
        read_image(path)
    assert str(path) in str(caught.value) and "PIL said" in caught.value.facts


@pytest.mark.filterwarnings("ignore:Truncated File Read")
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.bmp"])
def test_every_truncation_is_refused_or_complete(tmp_path: Path, name: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    whole = _saved(Image.fromarray(noise), tmp_path / name)
    content, expected = whole.read_bytes(), np.asarray(read_image(whole))
    for length in range(1, len(content) - 1, max(len(content) // 40, 1)):
        whole.write_bytes(content[:length])
        try:
            # A missing trailer may be harmless; missing pixels may not.
            assert (np.asarray(read_image(whole)) == expected).all()
        except ImageReadError as error:
            assert str(whole) in str(error)


def test_flipped_bytes_never_raise_anything_else(tmp_path: Path) -> None:
    path = _saved(Image.fromarray(RAMP), tmp_path / "a.png")
    content, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(content)
        damaged[rng.integers(8, len(content))] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        with contextlib.suppress(ImageReadError):
            read_image(path)


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path, tmp_path / "pipe.png", Path("/dev/zero")):
        for read in (read_image, sample_range, SourceStamp.of):
            with pytest.raises(ImageReadError) as caught:
                read(path)
            assert str(path) in str(caught.value)


@pytest.mark.parametrize("factor", [1.5, 3.0])
def test_decompression_bomb_is_an_error_also_where_pil_only_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    path = _saved(Image.new("L", (60, 50)), tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(3000 / factor))
    with pytest.raises(ImageReadError, match="at most"):
        read_image(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_tensor_of_any_float_dtype(dtype: torch.dtype) -> None:
    row = torch.tensor([[-1.0, 0.0, 1.0]], dtype=dtype)
    assert _grey(from_tensor(row[None], (-1, 1))).tolist() == [[0, 128, 255]]


def test_range_is_stated_and_not_guessed() -> None:
    bright = torch.full((1, 2, 2), 0.5)
    assert _grey(from_tensor(bright, (-1, 1)))[0, 0] == 191
    assert _grey(from_tensor(bright, (0, 1)))[0, 0] == 128


def test_values_outside_the_range_are_clamped_infinity_included() -> None:
    row = torch.tensor([[-torch.inf, -3.0, 7.0, torch.inf]])
    assert _grey(from_tensor(row, (-1, 1))).tolist() == [[0, 0, 255, 255]]


def test_three_channels_keep_their_order() -> None:
    row = torch.stack([torch.full((2, 3), value) for value in (0.0, 0.5, 1.0)])
    image = from_tensor(row, (0, 1))
    assert image.size == (3, 2) and image.getpixel((0, 0)) == (0, 128, 255)


def test_row_is_left_as_it_was_and_grad_is_no_obstacle() -> None:
    row = torch.rand(3, 4, 4, requires_grad=True)
    before = row.detach().clone()
    from_tensor(row, (0, 1))
    assert torch.equal(row.detach(), before)
    with torch.inference_mode():
        from_tensor(torch.rand(1, 4, 4), (0, 1))


def test_integer_tensor_with_its_range() -> None:
    assert _grey(from_tensor(torch.tensor([[0, 51, 255]], dtype=torch.uint8), (0, 255))).tolist() == [[0, 51, 255]]


def test_meta_tensor_of_monai() -> None:
    data = pytest.importorskip("monai.data")
    row = data.MetaTensor(torch.tensor([[[0.0, 1.0]]]), meta={"filename_or_obj": "a.png"})
    assert _grey(from_tensor(row, (0, 1))).tolist() == [[0, 255]]


@pytest.mark.parametrize("shape", [(2, 4, 4), (4, 4, 4), (1, 1, 4, 4), (4,), (3, 0, 4), ()])
def test_tensor_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ImageReadError, match="shape"):
        from_tensor(torch.zeros(shape), (0, 1))


def test_nan_is_refused() -> None:
    with pytest.raises(ImageReadError, match="1 NaN of 2"):
        from_tensor(torch.tensor([[0.0, torch.nan]]), (0, 1))


@pytest.mark.parametrize("value_range", [(1, 1), (1, 0), (0, float("inf")), (float("nan"), 1)])
def test_empty_range_is_refused(value_range: tuple[float, float]) -> None:
    with pytest.raises(ImageReadError, match="value_range"):
        from_tensor(torch.zeros(1, 2, 2), value_range)


@pytest.mark.parametrize("shape", [(2, 2), (2, 2, 1), (2, 2, 3), (2, 2, 4)])
def test_array_shapes(shape: tuple[int, ...]) -> None:
    assert _grey(from_array(np.full(shape, 7, dtype=np.uint8))).tolist() == [[7, 7], [7, 7]]


def test_array_dtypes() -> None:
    assert _grey(from_array(np.array([[False, True]]))).tolist() == [[0, 255]]
    assert _grey(from_array(np.array([[0, 65535]], dtype=np.uint16))).tolist() == [[0, 255]]
    assert _grey(from_array(np.array([[0.0, 1.0]], dtype=np.float16))).tolist() == [[0, 255]]


@pytest.mark.parametrize(
    "array",
    [
        np.array([[0.0, 1.01]]),
        np.array([[-0.1, 1.0]]),
        np.array([[np.nan, 1.0]]),
        np.array([[np.inf, 1.0]]),
        np.array([[1, 2]]),
        np.array([[1j]]),
        np.zeros((3, 4, 4, 3)),
        np.zeros((3, 4, 5)),
        np.zeros((0, 4)),
        np.array([["a"]]),
    ],
)
def test_array_of_unknown_range_or_shape_is_refused(array: np.ndarray) -> None:
    with pytest.raises(ImageReadError) as caught:
        from_array(array)
    assert {"found", "expected"} <= set(caught.value.facts)


def test_float_array_outside_unit_range_says_so() -> None:
    with pytest.raises(ImageReadError, match=r"floats in \[0, 200\]"):
        from_array(np.array([[0.0, 200.0]]))


def test_path_pil_and_other_objects(tmp_path: Path) -> None:
    path = _saved(Image.fromarray(RAMP), tmp_path / "a.png")
    assert (_grey(from_array(str(path))) == RAMP).all() and (_grey(from_array(path)) == RAMP).all()
    assert from_array(Image.new("LA", (2, 2))).mode == "RGB"
    with pytest.raises(ImageReadError, match="list"):
        from_array([[1]])  # type: ignore[arg-type]


def test_importing_it_imports_no_torch() -> None:
    code = "import sys, vlmfilm_plugin.features.images; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", ["stack.tif", "stack.gif", "stack.png", "stack.webp", "stack.mpo", "stack.jpg"])
def test_a_file_of_several_images_is_refused_and_one_of_one_is_read(tmp_path: Path, name: str) -> None:
    slices = [Image.fromarray(np.full((32, 32, 3), value, dtype=np.uint8)) for value in (10, 120, 240)]
    Image.init()
    if name in ("stack.mpo", "stack.jpg") and "MPO" not in Image.SAVE_ALL:
        pytest.skip("this version of PIL writes no file of several photographs")
    kind = {"stack.jpg": "MPO"}.get(name)  # a camera's file of several images is called .jpg, too
    path = _saved(slices[0], tmp_path / name, save_all=True, append_images=slices[1:], **({"format": kind} if kind else {}))
    with pytest.raises(ImageReadError, match="several images") as caught:
        read_image(path)
    assert "3 images" in str(caught.value.facts["found"]) and caught.value.fix
    if name != "stack.mpo":
        read_image(_saved(slices[0], tmp_path / f"one{path.suffix}"))


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


def test_a_file_that_holds_postscript_starts_no_program(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("gs", "gswin32c"):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "image.png").write_bytes(EPS)
    code = (
        "import sys\nfrom vlmfilm_plugin.features.images import read_image\nfrom vlmfilm_plugin.errors import ImageReadError\n"
        "try: read_image(sys.argv[1])\nexcept ImageReadError as error: sys.exit(7)"
    )
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "image.png")], env=environment, check=False).returncode == 7
    assert not (tmp_path / "started").exists()


def test_the_range_of_samples_is_that_of_the_file(tmp_path: Path) -> None:
    deep = np.linspace(0, 4095, 256).astype(np.uint16).reshape(16, 16)
    for name in ("a.png", "a.tif"):
        assert sample_range(_saved(Image.fromarray(deep), tmp_path / name)) == (0, 4095, 65535)
    assert sample_range(_saved(Image.fromarray(RAMP // 2 + 9), tmp_path / "b.png")) == (9, 136, 255)
    assert sample_range(_saved(Image.fromarray(RAMP.astype(np.float32) / 510), tmp_path / "c.tif")) == (0, 0.5, 1)
    assert sample_range(_saved(Image.new("1", (4, 4)), tmp_path / "d.png")) is None
