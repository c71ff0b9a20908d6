"""Inside packages that others wrote a conversation pays for its new tokens only, and a killed process costs none."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import ecosystem
from support.ecosystem import SCENARIOS, counts

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_killed_process_costs_no_token(name: str, tmp_path: Path) -> None:
    scenario = SCENARIOS[name]
    if not scenario.is_installed:
        pytest.skip(f"{scenario.package} is not installed: make ecosystem")
    whole = ecosystem.run(name, tmp_path / "whole", 0, 3)
    before = ecosystem.run(name, tmp_path / "killed", 0, 2, kill=True)
    (after,) = ecosystem.run(name, tmp_path / "killed", 2, 3)
    # Every call has the tokens that it would have had, of the prompt and of the answer, and reuses as many.
    assert [*before, after] == whole
    for turn in whole:
        for call in turn["calls"]:
            assert call["generated"]
            assert call["session"] == "t"
            assert call["reused"] >= call["floor"], (
                "what a branch of the session begins with is not computed again"
            )
    first = counts(whole[0])
    for turn in (whole[1], whole[2], after):
        told = counts(turn)
        assert told["reused"] >= 0.7 * told["prompt"]
        assert told["prompt"] - told["reused"] <= 0.45 * first["prompt"] / first["calls"] * told["calls"]
