"""Random module trees, stage patterns, shapes and dtypes: attach finds every block or refuses, and remove restores the module exactly."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vlmfilm_plugin import VlmFilmError, attach


class Tree(nn.Module):
    """A decoder of any nesting: `path` names the list of stages, `leaf` the block in a stage."""

    def __init__(self, path: list[str], stages: int, leaf: int, channels: list[int]) -> None:
        super().__init__()
        holder: nn.Module = self
        for name in path[:-1]:
            inner = nn.Module()
            holder.add_module(name, inner)
            holder = inner
        blocks = [nn.ModuleList(nn.Conv2d(1, channels[i % len(channels)], 1) for _ in range(leaf + 1)) for i in range(stages)]
        holder.add_module(path[-1], nn.ModuleList(blocks))
        self.blocks = [stage[leaf] for stage in blocks]

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [block(x) for block in self.blocks]


def snapshot(module: nn.Module) -> dict[str, Any]:
    return {
        name: (sorted(part.__dict__), list(part._modules), list(part._parameters), dict(part._forward_hooks), dict(part._forward_pre_hooks))
        for name, part in module.named_modules()
    }


names = st.text("abcdefgh_", min_size=1, max_size=6).filter(lambda name: not hasattr(nn.Module(), name))


@settings(max_examples=60, deadline=None)
@given(
    path=st.lists(names, min_size=1, max_size=3),
    stages=st.integers(1, 12),
    leaf=st.integers(0, 2),
    channels=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    chosen=st.one_of(st.none(), st.lists(st.integers(0, 13), min_size=1, max_size=4)),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    rows=st.integers(1, 5),
    broken=st.booleans(),
)
def test_attach_modulates_every_selected_block_and_remove_restores(
    path: list[str], stages: int, leaf: int, channels: list[int], chosen: list[int] | None, dtype: torch.dtype, rows: int, broken: bool
) -> None:
    tree = Tree(path, stages, leaf, channels).to(dtype)
    before = snapshot(tree)
    pattern = ".".join([*path, "*", str(leaf + 7 if broken else leaf)])
    try:
        handle = attach(tree, feature_dim=2, cond_dim=3, text_mlp_hidden_dim=3, targets=pattern, decoder_stages=chosen)
    except VlmFilmError:
        assert broken or (chosen is not None and max(chosen) >= stages)
        assert snapshot(tree) == before
        return
    assert [stage.index for stage in handle.stages] == (sorted(set(chosen)) if chosen else list(range(stages)))
    x = torch.randn(rows, 1, 2, 2).to(dtype)
    with torch.no_grad():
        plain = [block._conv_forward(x, block.weight, block.bias) for block in tree.blocks]
        for head in handle.film.heads:
            nn.init.constant_(head.mlp[2].bias, 1.0)
        with handle.condition(torch.randn(rows, 2)):
            found = tree(x)
    carrying = {stage.index for stage in handle.stages}
    for index, (a, b) in enumerate(zip(plain, found, strict=True)):
        assert b.dtype == dtype and torch.equal(a, b) == (index not in carrying)
    handle.remove()
    assert snapshot(tree) == before
