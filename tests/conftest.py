"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

pytest.register_assert_rewrite("support.conversations")

# Before anything is imported: tests must not depend on the settings of whoever runs them, nor on the network.
for _name in [name for name in os.environ if name.startswith(("AGENT_MEMORY_", "SEMANTIC_"))]:
    del os.environ[_name]
os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Unit tests run first: they are quick, and what they find explains what fails after them."""
    items.sort(key=lambda item: "unit" not in item.path.relative_to(TESTS).parts)
