"""Fixtures of the host tests."""

from __future__ import annotations

import pytest
from stand_in import StandIn


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> StandIn:
    """Return the stand-in host, shared: each test gives its runs names of their own."""
    return StandIn(tmp_path_factory.mktemp("stand_in"))
