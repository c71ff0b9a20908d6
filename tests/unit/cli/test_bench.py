"""The verdict of `agent-memory bench`, from made-up times."""

from __future__ import annotations

import pytest

from agent_memory_core.cli.bench import Measured, break_even, verdict


def measured(*times: tuple[int, float, float]) -> list[Measured]:
    return [Measured(tokens, cold, 0.01, resumed, 0.02, 1000) for tokens, cold, resumed in times]


@pytest.mark.parametrize(
    ("times", "tokens"),
    [
        ([(100, 1.0, 0.5), (200, 2.0, 0.5)], 100),
        ([(100, 0.4, 0.5), (200, 0.6, 0.5)], 150),
        ([(100, 0.5, 0.5), (200, 0.7, 0.5)], 100),
        ([(100, 0.1, 0.5), (200, 0.2, 0.5)], None),
        ([(100, 1.0, 0.5), (200, 0.4, 0.5), (300, 0.8, 0.5)], 225),
        ([(100, 1.0, 0.5), (200, 0.4, 0.5)], None),
    ],
)
def test_it_pays_where_resuming_has_won_for_good(times: list[tuple[int, float, float]], tokens: int) -> None:
    assert break_even(measured(*times)) == tokens


def test_the_verdict_says_so() -> None:
    won = verdict(measured((100, 0.4, 0.5), (1200, 6.0, 0.5)))
    assert "from about 120 tokens on." in won
    assert "12.0 times sooner" in won
    assert "the shortest that was measured" in verdict(measured((100, 1.0, 0.5)))
    assert "not worth it here" in verdict(measured((100, 0.1, 0.5)))
