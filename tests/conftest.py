"""What all tests share: no network, one thread, and one tiny Qwen2.5-VL on disk."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Before anything imports the hub's client, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def tiny_qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny Qwen2.5-VL; read it, do not change it."""
    from tiny_qwen import build

    return build(tmp_path_factory.mktemp("tiny_qwen"))


@pytest.fixture(autouse=True)
def _no_condition_is_left_in_force() -> Iterator[None]:
    """Check that a test starts with no condition in force and no forward open, and leaves none."""
    from vlmfilm_plugin.forward.context import stacks

    assert (stacks.conditions, stacks.contexts) == ([], [])
    yield
    left = len(stacks.conditions), len(stacks.contexts)
    # The next test must not fail for this one.
    stacks.conditions, stacks.contexts = [], []
    assert left == (0, 0), "conditions and contexts that a forward left behind"
