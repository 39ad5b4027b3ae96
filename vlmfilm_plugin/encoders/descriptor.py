"""Deterministic image descriptors: an encoder that needs no model, no weights and no download.

This is no vision-language model and understands nothing: it measures brightness, contrast, edges, frequencies and ridges of
one image with numpy. It is the default of the demo and the tests, and a baseline in its own right. Knows nothing of settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from vlmfilm_plugin.encoders.base import EncoderIdentity

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image
    from torch import Tensor

    Plane = NDArray[np.float64]

VERSION = 1
SIZE = 96
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
_SCALES = (1, 2, 4)
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_GRID = 4
_ORIENTATIONS = 8
_FREQUENCY_BINS = 10
_RIDGE_SIGMAS = (1.0, 2.0, 4.0)
_RIDGE_STATISTICS = 3
_PER_SCALE = 2 + len(_QUANTILES)
FEATURE_DIM = len(_SCALES) * _PER_SCALE + _GRID**2 + 4 + _ORIENTATIONS + _FREQUENCY_BINS + 2 * _RIDGE_STATISTICS * len(_RIDGE_SIGMAS)

# Constants that bring each kind of number to about unit range. They are fixed, never fitted to data or to one image:
# a global change of brightness or contrast must stay visible in the feature.
_LEVEL_GAIN, _LEVEL_CENTRE = 2.0, 0.5
_SPREAD_GAIN = 4.0
_GRADIENT_GAIN = 8.0
_RIDGE_GAIN = 16.0
_POWER_FLOOR, _POWER_SPAN = 1e-8, 8.0


class DescriptorEncoder:
    """Measure an image by fixed statistics of its luminance; no VLM, nothing learned.

    The image becomes luminance in [0, 1] on an absolute scale, is averaged down to 96 x 96, and yields levels, spreads and
    quantiles at three scales, a 4 x 4 grid of means, gradient statistics and orientations, radial power, and ridge responses
    (largest Hessian eigenvalue, Frangi et al. 1998) for dark and bright ridges at three widths.

    Shape:
        feature: (N, 77) float32, each number about in [-1, 1]; 34 of them are brightness levels.
    """

    @property
    def identity(self) -> EncoderIdentity:
        """Return the facts that decide a feature: this encoder, its version, and its working size in pixels."""
        return EncoderIdentity({"encoder": "descriptor", "version": VERSION, "size": SIZE, "width": FEATURE_DIM})

    @property
    def feature_dim(self) -> int:
        """Return F, a constant."""
        return FEATURE_DIM

    @property
    def is_loaded(self) -> bool:
        """Tell whether weights are in memory: never, there are none."""
        return False

    def encode(self, images: Sequence[Image]) -> Tensor:
        """Measure images (RGB, 8 bit, any sizes).

        Shape:
            return: (N, F) float32, CPU, detached; a row depends on its own image alone, bit for bit.
        """
        import torch

        rows = np.zeros((len(images), FEATURE_DIM), dtype=np.float32)
        for index, image in enumerate(images):
            rows[index] = describe(luminance(image))
        # A tensor made under inference mode could not take part in autograd later.
        with torch.inference_mode(False):
            return torch.from_numpy(rows)

    def release(self) -> None:
        """Do nothing: there is nothing to drop."""


def luminance(image: Image) -> Plane:
    """Return the luminance of an image on an absolute scale, averaged over areas.

    Shape:
        return: (96, 96) float64 in [0, 1].
    """
    rgb = np.asarray(image.convert("RGB"), dtype=np.float64) / 255.0
    plane = rgb[..., 0] * _LUMA[0] + rgb[..., 1] * _LUMA[1] + rgb[..., 2] * _LUMA[2]
    squared: Plane = _resample(_resample(plane, SIZE).T, SIZE).T
    return squared


def describe(plane: Plane) -> Plane:
    """Return the numbers of one luminance plane.

    Shape:
        plane: (96, 96) in [0, 1].
        return: (F,) float64.
    """
    parts = [_levels(_shrink(plane, scale)) for scale in _SCALES]
    parts.append((_shrink(plane, SIZE // _GRID).ravel() - _LEVEL_CENTRE) * _LEVEL_GAIN)
    parts.append(_gradients(plane))
    parts.append(_radial_power(plane))
    parts.extend(_ridges(_blur(plane, sigma), sigma) for sigma in _RIDGE_SIGMAS)
    return np.concatenate(parts)


def _resample(plane: Plane, size: int) -> Plane:
    """Average axis 0 over `size` equal spans, exactly, for any length."""
    length = plane.shape[0]
    total = np.concatenate([np.zeros((1, plane.shape[1])), np.cumsum(plane, axis=0)])
    edges = np.linspace(0.0, length, size + 1)
    whole = np.minimum(edges.astype(np.int64), length - 1)
    at_edges = total[whole] + (edges - whole)[:, None] * plane[whole]
    means: Plane = np.clip((at_edges[1:] - at_edges[:-1]) * (size / length), 0.0, 1.0)
    return means


def _shrink(plane: Plane, factor: int) -> Plane:
    side = plane.shape[0] // factor
    means: Plane = plane.reshape(side, factor, side, factor).mean(axis=(1, 3))
    return means


def _levels(plane: Plane) -> Plane:
    levels = np.array([plane.mean(), *np.quantile(plane, _QUANTILES)])
    return np.append((levels - _LEVEL_CENTRE) * _LEVEL_GAIN, plane.std() * _SPREAD_GAIN)


def _gradients(plane: Plane) -> Plane:
    down, right = np.gradient(plane)
    size = np.hypot(down, right)
    # Orientation without direction: a vessel's two walls point opposite ways and mean the same.
    bins = np.floor(np.mod(np.arctan2(down, right), np.pi) * (_ORIENTATIONS / np.pi)).astype(np.int64) % _ORIENTATIONS
    share = np.bincount(bins.ravel(), weights=size.ravel(), minlength=_ORIENTATIONS) / (size.sum() + 1e-3 * size.size)
    statistics = np.array([size.mean(), size.std(), np.quantile(size, 0.9), np.quantile(size, 0.99)])
    return np.concatenate([statistics * _GRADIENT_GAIN, share * 4.0])


def _radial_power(plane: Plane) -> Plane:
    window = np.hanning(SIZE)
    spectrum = np.abs(np.fft.rfft2((plane - plane.mean()) * np.outer(window, window)) / plane.size) ** 2
    radius = np.hypot(np.fft.fftfreq(SIZE)[:, None], np.fft.rfftfreq(SIZE)[None, :])
    edges = np.geomspace(1.0 / SIZE, 0.5, _FREQUENCY_BINS + 1)
    bins = np.digitize(radius.ravel(), edges) - 1
    inside = (bins >= 0) & (bins < _FREQUENCY_BINS)
    count = np.bincount(bins[inside], minlength=_FREQUENCY_BINS)
    power = np.bincount(bins[inside], weights=spectrum.ravel()[inside], minlength=_FREQUENCY_BINS) / np.maximum(count, 1)
    return np.log10(power + _POWER_FLOOR) / _POWER_SPAN + 1.0


def _ridges(plane: Plane, sigma: float) -> Plane:
    down, right = np.gradient(plane)
    yy, yx = np.gradient(down)
    xx = np.gradient(right, axis=1)
    middle, half = (yy + xx) / 2.0, np.hypot((yy - xx) / 2.0, yx)
    # sigma squared makes second derivatives comparable across widths (Lindeberg's normalisation).
    dark, bright = np.maximum(middle + half, 0.0), np.maximum(half - middle, 0.0)
    scaled = [response * sigma**2 * _RIDGE_GAIN for response in (dark, bright)]
    return np.array([figure for r in scaled for figure in (r.mean(), np.quantile(r, 0.9), np.quantile(r, 0.99) / 2.0)])


def _blur(plane: Plane, sigma: float) -> Plane:
    radius = int(np.ceil(3.0 * sigma))
    offsets = np.arange(-radius, radius + 1)
    kernel = np.exp(-0.5 * (offsets / sigma) ** 2)
    kernel /= kernel.sum()
    for _ in range(2):
        padded = np.pad(plane, ((radius, radius), (0, 0)), mode="edge")
        windows = np.lib.stride_tricks.sliding_window_view(padded, len(kernel), axis=0)
        plane = np.einsum("ijk,k->ij", windows, kernel).T
    return plane
