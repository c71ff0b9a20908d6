"""What all tests share."""

from __future__ import annotations

import os

import pytest

pytest.register_assert_rewrite("support.conversations")

# Before anything is imported: tests must not depend on the settings of whoever runs them, nor on the network.
for _name in [name for name in os.environ if name.startswith(("AGENT_MEMORY_", "SEMANTIC_"))]:
    del os.environ[_name]
os.environ["HF_HUB_OFFLINE"] = "1"
