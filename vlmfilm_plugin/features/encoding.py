"""From pictures to features by an encoder that is proven first; and what features must be before anybody uses them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vlmfilm_plugin.encoders.base import Encoder, encode_annotated
from vlmfilm_plugin.encoders.determinism import prove_deterministic
from vlmfilm_plugin.errors import FeatureError
from vlmfilm_plugin.features.samples import Sample
from vlmfilm_plugin.features.store.protocol import SourceStamp, StoredFeature

if TYPE_CHECKING:
    from PIL.Image import Image


class Encoding:
    """Encode pictures; before the first features are used the encoder is shown to give an image one feature, whatever stands beside it."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._is_proven = False

    def of(self, samples: Sequence[Sample], stamps: Sequence[SourceStamp | None], pictures: Sequence[Image]) -> list[StoredFeature]:
        """Return one row a sample, its feature (F,) in float32; nothing is stored.

        Raises:
            FeatureError, UnsteadyEncoderError, EncoderError: as their names say.
        """
        # The host may be in inference mode (validation) and has its own random stream: neither may reach the encoder.
        cuda = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=cuda):
            features, given = encode_annotated(self._encoder, pictures)
            check_features(features, self._encoder.feature_dim, [sample.key for sample in samples])
            if not self._is_proven and pictures:
                prove_deterministic(self._encoder, pictures, features)
                self._is_proven = True
        arrays = features.detach().to("cpu", torch.float32).numpy()
        notes: Sequence[str | None] = given if given is not None else [None] * len(samples)
        return [StoredFeature(sample.key, array, stamp, note) for sample, array, stamp, note in zip(samples, arrays, stamps, notes, strict=True)]


def rounded(row: StoredFeature, dtype: str) -> StoredFeature:
    """Return a row as a store of this dtype reads it back, so that a run is the same with a full and an empty store."""
    return row._replace(feature=row.feature.astype(np.dtype(dtype)))


def stack(rows: Sequence[StoredFeature]) -> Tensor:
    """Return the features (N, F) of N > 0 rows of one width: float32, CPU, memory of their own."""
    # By torch: NumPy takes three times as long from float16 to float32.
    return torch.from_numpy(np.stack([row.feature for row in rows])).float()


def check_features(features: Tensor, feature_dim: int, keys: Sequence[str] | None = None) -> None:
    """Check features (N, F).

    Raises:
        FeatureError: the shape is not (N, feature_dim), or a row holds NaN or infinite values (checked on the CPU alone).
    """
    if features.dim() != 2 or features.shape[1] != feature_dim:
        raise FeatureError(
            "cannot use these features: wrong width or shape",
            {"got": tuple(features.shape), "expected": f"(N, {feature_dim})"},
            "use the encoder that FiLM was built for, or build FiLM with this width",
        )
    if features.device.type == "cpu" and not bool(torch.isfinite(features).all()):
        row = int((~torch.isfinite(features)).any(dim=1).nonzero()[0])
        raise FeatureError(
            f"the feature of {keys[row] if keys else f'row {row}'} holds NaN or infinite values",
            {"row": row, "expected": "finite values"},
            "look at that image, or run the encoder with dtype float32",
        )
