"""What the tests of this folder share."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _all_cores(all_cores: None) -> None:
    """Whoever fights over a store does so at the same moment."""
