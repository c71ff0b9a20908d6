"""Which cases of a long list `make test` tries, and which it leaves to `make test-heavy`."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def some_of(values: Iterable[Any], kept: Collection[Any]) -> list[Any]:
    """All values as parameters of a test, those that are not ``kept`` with the mark ``heavy``."""
    values = list(values)
    assert set(kept) <= set(values), "what is kept is one of the values"
    return [value if value in kept else pytest.param(value, marks=pytest.mark.heavy) for value in values]
