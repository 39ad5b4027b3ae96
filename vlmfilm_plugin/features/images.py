"""Images in, 8-bit RGB out: files, arrays and tensors become the one form every encoder takes.

Owns bit depth and value range. A range is stated by the file format or by the caller and never guessed from the values, because
an image without dark pixels would then be read as a different one. Knows nothing of encoders; torch is never imported here.
"""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from vlmfilm_plugin.errors import ImageReadError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

# What hosts read. A name says nothing of the content: of all formats PIL would start Ghostscript for a file that holds PostScript.
FORMATS = ("PNG", "TIFF", "JPEG", "BMP", "GIF", "WEBP", "PPM", "JPEG2000")
_FIX_FILE = "replace the file by a PNG, TIFF, JPEG or BMP image that PIL can open"
_SIXTEEN_BIT = frozenset({"I;16", "I;16L", "I;16B", "I;16N"})
# 8-bit modes whose samples PIL converts to RGB without a choice of range.
_EIGHT_BIT = frozenset({"1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB", "HSV", "RGBX"})
_WITH_ALPHA = frozenset({"LA", "PA", "RGBA", "La", "RGBa"})


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """Read an image file as RGB, 8 bit.

    Alpha is dropped, not composited, and EXIF orientation is not applied: the pixels are those a host reads.
    16-bit samples are scaled by their full range, 65535; 32-bit float samples must lie in [0, 1].

    Args:
        path: a file that PIL can open.

    Raises:
        ImageReadError: the file is missing, damaged, not an image of a known format, too large, holds several images, or is of a mode that
            has no stated range.
    """
    with _loaded(Path(path)) as image:
        return _to_rgb(image, str(path))


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """Open an image file of a known format without decoding it; raises what PIL raises, and OSError for what is no regular file."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        # Opening a pipe waits for its other side, and a device has no end.
        raise OSError("a folder, a device or a pipe")
    return Image.open(path, formats=FORMATS)


def sample_range(path: str | os.PathLike[str]) -> tuple[float, float, float] | None:
    """Return the lowest and the highest sample of an image file, and the highest that its container holds; None for one of two levels.

    Raises:
        ImageReadError: as `read_image`.
    """
    with _loaded(Path(path)) as image:
        if image.mode == "1":
            return None
        if image.mode in _SIXTEEN_BIT or image.mode == "I":
            values, limit = np.asarray(image), 65535.0
        elif image.mode == "F":
            values, limit = np.asarray(image), 1.0
        else:
            values, limit = np.asarray(_to_rgb(image, str(path))), 255.0
        return float(values.min()), float(values.max()), limit


@contextmanager
def _loaded(source: Path) -> Iterator[Image.Image]:
    """Open and decode a file of one image, and turn whatever PIL raises into an `ImageReadError`."""
    try:
        with warnings.catch_warnings():
            # Above its first limit PIL only warns about a decompression bomb; a warning is easily lost in a training log.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with open_image(source) as opened:
                opened.load()
                _refuse_several(opened, source)
                yield opened
    except ImageReadError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        limit = f"at most {Image.MAX_IMAGE_PIXELS} pixels"
        raise _unreadable(source, error, limit, "shrink the image, or raise PIL.Image.MAX_IMAGE_PIXELS if the file is trusted") from error
    except FileNotFoundError as error:
        raise _unreadable(source, error, "an image file", "correct the path, or restore the file") from error
    except UnidentifiedImageError as error:
        raise _unreadable(source, error, f"an image file: {', '.join(FORMATS)}", _FIX_FILE) from error
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, MemoryError) as error:
        # PIL's decoders raise all of these for damaged files (SyntaxError for a broken PNG chunk).
        raise _unreadable(source, error, "a complete image file", _FIX_FILE) from error


def _refuse_several(image: Image.Image, source: Path) -> None:
    """Refuse a file of several images: a feature is stored by the file, and every slice of it would get that of the first."""
    count = getattr(image, "n_frames", 1)
    if count > 1:
        facts = {"file": source, "found": f"{count} images in one {image.format} file", "expected": "one image"}
        raise ImageReadError(f"cannot read image {source}: it holds several images", facts, "write each of them to a file of its own")


def from_array(image: Image.Image | NDArray[Any] | str | os.PathLike[str]) -> Image.Image:
    """Convert a PIL image, a numpy array or an image file to RGB, 8 bit.

    Args:
        image: a PIL image, a path (see `read_image`), or an array.

    Shape:
        array: (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), the fourth channel being dropped; uint8 [0, 255],
        uint16 [0, 65535] (full range), bool, or float [0, 1].

    Raises:
        ImageReadError: another shape or dtype, or float values outside [0, 1].
    """
    if isinstance(image, Image.Image):
        return _to_rgb(image, "a PIL image")
    if isinstance(image, str | os.PathLike):
        return read_image(image)
    if not isinstance(image, np.ndarray):
        raise _refused("an image", type(image).__name__, "a PIL image, a numpy array or a path", "convert it to one of these")
    if image.ndim == 3 and image.shape[2] in (1, 4):
        image = image[:, :, 0] if image.shape[2] == 1 else image[:, :, :3]
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3) or 0 in image.shape:
        raise _refused("an array", f"shape {image.shape}", "shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)", "move channels last")
    return _rgb_from_samples(_eight_bit(image, "an array"))


def from_tensor(row: Tensor, value_range: tuple[float, float]) -> Image.Image:
    """Convert one image tensor to RGB, 8 bit; values outside the range are clamped.

    Args:
        row: one image on any device, any real dtype, MONAI MetaTensor included; not changed.
        value_range: (lo, hi), the values of black and white in `row`, such as (-1, 1) or (0, 1); never guessed.

    Shape:
        row: (H, W) or (C, H, W) with C 1 or 3.

    Raises:
        ImageReadError: another shape, NaN, or an empty or infinite range.
    """
    lo, hi = (float(edge) for edge in value_range)
    if not (np.isfinite(lo) and np.isfinite(hi) and lo < hi):
        raise _refused("a tensor", f"value_range {value_range}", "(lo, hi), finite, lo < hi", "state the range of the host's images")
    shape = tuple(row.shape)
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[0] not in (1, 3)) or 0 in shape:
        raise _refused("a tensor", f"shape {shape}", "shape (H, W), (1, H, W) or (3, H, W)", "pick the channels the encoder shall see")
    # numpy has no bfloat16; a MetaTensor's own class would carry its metadata through every step below.
    plain = row.as_tensor() if hasattr(row, "as_tensor") else row
    values = plain.detach().cpu().double().numpy()
    if np.isnan(values).any():
        raise _refused("a tensor", f"{int(np.isnan(values).sum())} NaN of {values.size} values", "numbers", "check the host's preprocessing")
    samples = _rounded((np.clip(values, lo, hi) - lo) * (255.0 / (hi - lo)))
    return _rgb_from_samples(samples if samples.ndim == 2 else np.moveaxis(samples, 0, -1))


def _to_rgb(image: Image.Image, origin: str) -> Image.Image:
    mode = image.mode
    if mode in _SIXTEEN_BIT or mode == "I":
        return _rgb_from_samples(_wide_integers(image, origin))
    if mode == "F":
        return _rgb_from_samples(_eight_bit(np.asarray(image), origin))
    if mode == "P" and "transparency" in image.info:
        # Without this PIL warns; RGBA first and alpha dropped next gives the palette's own colours.
        image = image.convert("RGBA")
    if image.mode in _WITH_ALPHA:
        # The colour under a transparent pixel is kept as stored: compositing would invent a background.
        image = image.convert("RGBA") if image.mode != "RGBA" else image
        bands = image.split()[:3]
        return Image.merge("RGB", bands)
    if mode in _EIGHT_BIT:
        return image.convert("RGB")
    raise _refused(origin, f"PIL mode {mode!r}", "a grey, RGB, palette or CMYK image", "convert the file to 8-bit or 16-bit PNG")


def _wide_integers(image: Image.Image, origin: str) -> NDArray[np.uint8]:
    values = np.asarray(image)
    if image.mode == "I":
        # PIL opens a 16-bit grey PNG as 32-bit 'I' in some versions; a true 32-bit image has no range we could know.
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > 65535:
            raise _refused(origin, f"32-bit integers in [{low}, {high}]", "16-bit values, [0, 65535]", "convert the file to 16-bit PNG")
    return _eight_bit(values.astype(np.uint16), origin)


def _eight_bit(values: NDArray[Any], origin: str) -> NDArray[np.uint8]:
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return _rounded(values * 255.0)
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:
        # By the full range, not by the image's own minimum and maximum: stretching each image to itself
        # would erase exactly the contrast and background differences that the features are to carry.
        return _rounded(values.astype(np.float64) * (255.0 / 65535.0))
    if values.dtype.kind == "f":
        if not np.isfinite(values).all():
            raise _refused(origin, "NaN or infinite values", "floats in [0, 1]", "check how the array was made")
        low, high = float(values.min()), float(values.max())
        if low < 0.0 or high > 1.0:
            raise _refused(
                origin, f"floats in [{low:g}, {high:g}]", "floats in [0, 1]", "scale by the known range of the data, or pass uint8 or uint16"
            )
        return _rounded(values.astype(np.float64) * 255.0)
    raise _refused(origin, f"dtype {values.dtype}", "uint8, uint16, bool, or float in [0, 1]", "convert by the known range of the data")


def _rounded(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    samples: NDArray[np.uint8] = np.rint(values).astype(np.uint8)
    return samples


def _rgb_from_samples(samples: NDArray[np.uint8]) -> Image.Image:
    rgb = np.repeat(samples[:, :, None], 3, axis=2) if samples.ndim == 2 else samples
    if rgb.shape[2] == 1:
        rgb = np.repeat(rgb, 3, axis=2)
    return Image.fromarray(np.ascontiguousarray(rgb))


def _unreadable(path: Path, error: BaseException, expected: str, fix: str) -> ImageReadError:
    said = " ".join(str(error).split()) or type(error).__name__
    return ImageReadError(f"cannot read image {path}", {"file": path, "PIL said": said, "expected": expected}, fix)


def _refused(origin: str, found: str, expected: str, fix: str) -> ImageReadError:
    return ImageReadError(f"cannot use {origin} as an image", {"found": found, "expected": expected}, fix)
