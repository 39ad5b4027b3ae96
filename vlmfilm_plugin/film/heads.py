"""Heads by name: what a head must be, and which one the setting `head` names. A head of your own is one file and one `register_head`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Protocol

import torch
from torch import Tensor, nn

from vlmfilm_plugin.errors import SettingsError
from vlmfilm_plugin.film.layers import AdaptiveFiLMHead


class Head(Protocol):
    """What turns a condition vector into gamma and beta, and modulates features with them. An `nn.Module`; a fresh one is the identity.

    Whatever a head does, gamma 1 and beta 0 leave the features alone to the bit. What it keeps between gamma and beta and the features,
    such as a normalisation, is its own affair: everyone else stores, selects rows of, logs and hands over gamma and beta alone.

    Attributes:
        channels: C, channels of the features to modulate.
    """

    channels: int

    def __call__(self, cond_vec: Tensor) -> tuple[Tensor, Tensor]:
        """Return gamma and beta, each (B, C, 1, 1), for cond_vec (B, D); differentiable."""

    def modulate(self, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        """Return the modulated features (B, C, H, W) in x's dtype; torch.compile must be able to follow it.

        Features of another rank, or with their channels last, come as (B, C, N, 1), N all positions of space.
        """

    def reset(self) -> None:
        """Set every tensor as in a fresh head, which is the identity."""

    def change_probes(self) -> list[Tensor]:
        """Return small tensors that change whenever the weights are changed as a whole, such as by an EMA."""


@dataclass(frozen=True)
class HeadShape:
    """What the settings say of a head: widths of cond_vec, of the features and of a hidden layer, bounds (None: unbounded), a LayerNorm."""

    cond_dim: int
    channels: int
    hidden_dim: int
    gamma_scale: float | None
    beta_scale: float | None
    use_layernorm: bool


HeadFactory = Callable[[HeadShape], Head]


def _film(shape: HeadShape) -> Head:
    return AdaptiveFiLMHead(shape.cond_dim, shape.channels, shape.hidden_dim, shape.gamma_scale, shape.beta_scale, shape.use_layernorm)


HEADS: dict[str, HeadFactory] = {"film": _film}


def register_head(name: str, factory: HeadFactory) -> Callable[[], None]:
    """Add a head under a name for the setting `head`; return a function that takes it out again.

    Args:
        factory: builds a fresh `Head` of a `HeadShape`. The name travels in every checkpoint: register the head before one is loaded.

    Raises:
        SettingsError: the name is taken.
    """
    if name in HEADS:
        raise SettingsError(f"cannot register head {name!r}: the name is taken", {"known": sorted(HEADS)}, "choose another name")
    HEADS[name] = factory

    def undo() -> None:
        if HEADS.get(name) is factory:
            del HEADS[name]

    return undo


def check_head(name: str, origin: str) -> None:
    """Check that there is a head of that name.

    Raises:
        SettingsError: there is none.
    """
    if name not in HEADS:
        closest = get_close_matches(name, HEADS, n=1)
        facts = {"found": f"{name!r}   (from {origin})", "known": ", ".join(sorted(HEADS))}
        raise SettingsError(
            "cannot use `head`: unknown name", facts, f"set it to {closest[0] if closest else sorted(HEADS)[0]!r}, or register it first"
        )


def build_head(name: str, shape: HeadShape) -> nn.Module:
    """Build a fresh head; one from outside is checked to be one.

    Raises:
        SettingsError: there is no such head, it lacks a part of a head, gives something else than gamma and beta, or is not the identity.
    """
    check_head(name, "the FiLM to build")
    head = HEADS[name](shape)
    if isinstance(head, AdaptiveFiLMHead):
        return head
    lacking = sorted({"channels", "modulate", "reset", "change_probes"} - set(dir(head)))
    if not isinstance(head, nn.Module) or lacking:
        found = f"{type(head).__name__} without {', '.join(lacking)}" if lacking else f"{type(head).__name__}, which is no nn.Module"
        raise SettingsError(f"cannot use head {name!r}", {"found": found, "expected": "a Head"}, "correct the head")
    with torch.no_grad():
        gamma, beta = head(torch.zeros(1, shape.cond_dim))
        x = torch.linspace(-2, 3, 4 * shape.channels).view(1, shape.channels, 2, 2)
        expected = (1, shape.channels, 1, 1)
        if gamma.shape != expected or beta.shape != expected or not torch.equal(head.modulate(x, gamma, beta), x):
            facts = {"gamma": tuple(gamma.shape), "beta": tuple(beta.shape), "expected": f"both {expected}, and features left alone to the bit"}
            raise SettingsError(f"cannot use head {name!r}: a fresh one is not the identity", facts, "correct the head")
    return head
