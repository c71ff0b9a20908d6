"""Ids of what is answered. Clients merge what has the same id, so no two are ever equal."""

from __future__ import annotations

from uuid import uuid4


def new_id(prefix: str) -> str:
    """An id that begins with ``prefix`` and has 122 random bits."""
    return f"{prefix}{uuid4().hex}"
