"""Inside packages that others wrote a conversation pays for its new tokens only, and a killed process costs none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support import ecosystem
from support.ecosystem import SCENARIOS

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_killed_process_costs_no_token(name: str, tmp_path: Path) -> None:
    scenario = SCENARIOS[name]
    if not scenario.is_installed:
        pytest.skip(f"{scenario.package} is not installed: make ecosystem")
    whole = ecosystem.run(name, tmp_path / "whole", 0, 3)
    before = ecosystem.run(name, tmp_path / "killed", 0, 2, kill=True)
    (after,) = ecosystem.run(name, tmp_path / "killed", 2, 3)
    if scenario.repeats:
        assert [*before, after] == whole, "the same words, prompts and reused tokens"
    for turn in (whole[1], whole[2], after):
        assert new_tokens(turn) <= 0.45 * whole[0]["prompt"] / whole[0]["calls"] * turn["calls"]
        assert turn["reused"] >= 0.7 * turn["prompt"]


def new_tokens(turn: dict[str, Any]) -> int:
    return int(turn["prompt"] - turn["reused"])
