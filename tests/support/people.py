"""Agents for tests of coordination."""

from __future__ import annotations

from typing import Any


def people(*names: str, **more: Any) -> list[dict[str, Any]]:
    """Agents of these ids, with equal other fields."""
    return [{"agent_id": name, **more} for name in names]
