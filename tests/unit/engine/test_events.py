"""Observers: each is told once, in order, and none can harm another."""

from __future__ import annotations

from typing import Any

import pytest

from agent_memory_core import BlocksEvicted
from agent_memory_core.engine.events import Observers


def test_one_observer_added_twice_is_told_twice_and_removed_one_by_one() -> None:
    observers, seen = Observers(), list[Any]()
    first, second = observers.add(seen.append), observers.add(seen.append)
    observers.tell(BlocksEvicted(1))
    first()
    first()
    observers.tell(BlocksEvicted(2))
    second()
    observers.tell(BlocksEvicted(3))
    assert seen == [BlocksEvicted(1), BlocksEvicted(1), BlocksEvicted(2)]


def test_an_observer_that_fails_or_leaves_does_not_disturb_the_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    observers, seen = Observers(), list[Any]()

    def leaves(event: Any) -> None:
        leave()
        raise ZeroDivisionError("an observer's own fault")

    leave = observers.add(leaves)
    observers.add(seen.append)
    observers.tell(BlocksEvicted(1))
    observers.tell(BlocksEvicted(2))
    assert seen == [BlocksEvicted(1), BlocksEvicted(2)]
    assert caplog.text.count("an observer failed on BlocksEvicted") == 1
