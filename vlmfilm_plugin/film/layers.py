"""FiLM itself: heads, projections and the modulation. Knows nothing of hosts, encoders or where a condition comes from.

FiLM is Perez et al. 2018, arXiv:1709.07871. Module names are those of the soft-seg port, so that its checkpoints load.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from vlmfilm_plugin.errors import FeatureError


class AdaptiveFiLMHead(nn.Module):
    """Map a condition vector to gamma and beta; a fresh head is the identity (gamma 1, beta 0).

    Args:
        cond_dim: width D of the condition vector.
        channels: C, channels of the features to modulate.
        hidden_dim: width of the hidden layer.
        gamma_scale: gamma = 1 + gamma_scale * tanh(g), in (1 - gamma_scale, 1 + gamma_scale); None: gamma = 1 + g, unbounded.
        beta_scale: beta = beta_scale * tanh(b), in (-beta_scale, beta_scale); None: beta = b, unbounded.
        use_layernorm: normalise the condition vector first.

    Shape:
        cond_vec (B, D) -> gamma (B, C, 1, 1), beta (B, C, 1, 1); differentiable. Runs in the dtype of its weights, also under autocast.

    Raises:
        FeatureError: cond_vec is not (B, cond_dim).
    """

    def __init__(
        self,
        cond_dim: int,
        channels: int,
        hidden_dim: int = 256,
        gamma_scale: float | None = 0.1,
        beta_scale: float | None = 0.1,
        use_layernorm: bool = True,
    ) -> None:
        super().__init__()
        self.cond_dim, self.channels = cond_dim, channels
        self.gamma_scale, self.beta_scale = gamma_scale, beta_scale
        self.ln = nn.LayerNorm(cond_dim) if use_layernorm else nn.Identity()
        self.mlp = nn.Sequential(nn.Linear(cond_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, 2 * channels))
        self._zero_last()

    def _zero_last(self) -> None:
        last = self.mlp[2]
        nn.init.zeros_(last.weight)  # type: ignore[arg-type]
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]

    def forward(self, cond_vec: Tensor) -> tuple[Tensor, Tensor]:
        _check_width(cond_vec, self.cond_dim, "cond_vec", "AdaptiveFiLMHead")
        with full_precision(cond_vec):
            weight = self.mlp[0].weight
            g, b = self.mlp(self.ln(cond_vec.to(weight.dtype)))[:, :, None, None].chunk(2, dim=1)  # type: ignore[arg-type]
            gamma = 1 + (g if self.gamma_scale is None else self.gamma_scale * torch.tanh(g))
            beta = b if self.beta_scale is None else self.beta_scale * torch.tanh(b)
        return gamma, beta

    def modulate(self, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        """Return `gamma * x + beta` in x's dtype; gamma and beta of x's rank."""
        return modulate(x, gamma, beta)

    def reset(self) -> None:
        """Set every tensor as in a fresh head, which is the identity."""
        _reset(self)
        self._zero_last()

    def change_probes(self) -> list[Tensor]:
        """Return the last bias: it changes whenever the weights are changed as a whole."""
        return [self.mlp[2].bias]  # type: ignore[list-item]

    def extra_repr(self) -> str:
        return f"cond_dim={self.cond_dim}, channels={self.channels}, gamma_scale={self.gamma_scale}, beta_scale={self.beta_scale}"


class ImageToConditionVector(nn.Module):
    """Project an image feature to a condition vector: Linear `proj`, then LayerNorm `ln`.

    Args:
        feat_dim: width F of the feature; None takes it from the first call (LazyLinear).
        cond_dim: width D of the condition vector.
        use_layernorm: apply `ln`.

    Shape:
        feature (B, F) -> cond_vec (B, D); differentiable in the projection, the feature itself is detached by its provider.

    Raises:
        FeatureError: (a RuntimeError) the feature is not (B, feat_dim).
    """

    def __init__(self, feat_dim: int | None, cond_dim: int, use_layernorm: bool = True) -> None:
        super().__init__()
        self.cond_dim = cond_dim
        self.proj = nn.LazyLinear(cond_dim) if feat_dim is None else nn.Linear(feat_dim, cond_dim)
        self.ln = nn.LayerNorm(cond_dim) if use_layernorm else nn.Identity()

    def forward(self, feature: Tensor) -> Tensor:
        # A LazyLinear takes its width from this very feature, which must be (B, F) all the same.
        is_lazy = isinstance(self.proj, nn.LazyLinear)
        _check_width(feature, feature.shape[-1] if is_lazy and feature.dim() else self.proj.in_features, "feature", "ImageToConditionVector")
        with full_precision(feature):
            cond_vec: Tensor = self.ln(self.proj(feature.to(self.proj.weight.dtype)))
        return cond_vec

    def reset(self) -> None:
        """Set every tensor as in a fresh projection."""
        _reset(self)

    def change_probes(self) -> list[Tensor]:
        """Return a small parameter that changes whenever the weights are changed as a whole."""
        return [self.proj.bias]


class TextToConditionVector(nn.Module):
    """Project a text embedding to a condition vector: Linear, ReLU, Linear.

    Shape:
        embedding (B, embed_dim) -> cond_vec (B, cond_dim); differentiable in the projection.

    Raises:
        FeatureError: (a RuntimeError) the embedding is not (B, embed_dim).
    """

    def __init__(self, embed_dim: int, cond_dim: int, hidden_dim: int = 256) -> None:
        super().__init__()
        self.embed_dim, self.cond_dim = embed_dim, cond_dim
        self.mlp = nn.Sequential(nn.Linear(embed_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, cond_dim))

    def forward(self, embedding: Tensor) -> Tensor:
        _check_width(embedding, self.embed_dim, "embedding", "TextToConditionVector")
        with full_precision(embedding):
            cond_vec: Tensor = self.mlp(embedding.to(self.mlp[0].weight.dtype))  # type: ignore[arg-type]
        return cond_vec

    def reset(self) -> None:
        """Set every tensor as in a fresh projection."""
        _reset(self)

    def change_probes(self) -> list[Tensor]:
        """Return a small parameter that changes whenever the weights are changed as a whole."""
        return [self.mlp[2].bias]  # type: ignore[list-item]


def modulate(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """Return `gamma * x + beta` in x's dtype.

    Shape:
        x (B, C, H, W); gamma and beta (B, C, 1, 1) -> (B, C, H, W); or of any rank, gamma and beta with the size 1 beside rows and channels.

    Half-precision features are modulated in the precision of gamma: bfloat16 would round gamma = 1.003 to 1.
    """
    y = torch.addcmul(beta, gamma, x)
    return y if y.dtype == x.dtype else y.to(x.dtype)


def identity_for(x: Tensor, axis: int = 1) -> tuple[Tensor, Tensor]:
    """Return the gamma 1 and beta 0 that leave x (B, C, H, W) alone: each (B, C, 1, 1); x of any rank has its channels at `axis`."""
    shape = x.shape[0], x.shape[axis], 1, 1
    return x.new_ones(shape), x.new_zeros(shape)


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """Return a context in which autocast leaves FiLM's own layers alone."""
    kind = x.device.type
    return torch.autocast(device_type=kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _reset(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.LayerNorm):
            layer.reset_parameters()


def _check_width(tensor: Tensor, expected: int, what: str, owner: str) -> None:
    if tensor.dim() == 2 and tensor.shape[1] == expected:
        return
    got = tensor.shape[-1] if tensor.dim() else 0
    raise FeatureError(
        f"{owner} cannot take this {what}: wrong width or shape",
        {"got": got, "expected": expected, "shape": f"{tuple(tensor.shape)}, expected (B, {expected})"},
        "use the encoder that FiLM was built for, or build FiLM with this width",
    )
