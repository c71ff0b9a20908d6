"""The breaker opens after failures in a row, for longer each time, and one success closes it."""

from __future__ import annotations

from agent_memory_core.storage.cold.breaker import FAILURES, FIRST, LONGEST, Breaker


def test_it_opens_after_failures_in_a_row_only() -> None:
    breaker = Breaker(lambda: 0.0)
    for _ in range(FAILURES - 1):
        breaker.failed()
    assert breaker.wait == 0
    breaker.worked()
    for _ in range(FAILURES - 1):
        breaker.failed()
    assert breaker.wait == 0
    breaker.failed()
    assert breaker.wait == FIRST


def test_one_try_after_the_pause_decides() -> None:
    now = 0.0
    breaker = Breaker(lambda: now)
    for _ in range(FAILURES):
        breaker.failed()
    pauses = [breaker.wait]
    for _ in range(6):
        now += breaker.wait
        assert breaker.wait == 0
        breaker.failed()
        pauses.append(breaker.wait)
    assert pauses == sorted(pauses)
    assert pauses[1] == 2 * FIRST
    assert pauses[-1] == LONGEST
    now += LONGEST
    breaker.worked()
    breaker.failed()
    assert breaker.wait == 0
