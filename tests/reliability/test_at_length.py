"""The short form of ``make reliability``: the same program, with fewer kills, damages and minutes.

It runs in a process of its own, from which others are forked before any engine has run there.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.reliability import damage, faults, kills

ROOT = Path(__file__).parents[2]
SHORT = ("--kills", "30", "--every", "11", "--quick", "--minutes", "0.1")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("reliability") / "found.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "reliability.py"), *SHORT, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads(out.read_text())["results"]
    return results


@pytest.mark.heavy
def test_killed_processes_lose_nothing_and_tell_nothing_wrong(found: dict[str, Any]) -> None:
    seen = found["kills"]
    assert (seen["lost"], seen["wrong"], seen["unclean"]) == (0, 0, 0)
    assert seen["largest_share"] <= 1.05
    # Kills that hit nothing, and looks at nothing, prove nothing.
    assert seen["kills"] >= 30
    assert seen["turns"] > 30
    assert seen["resumed"] > 10
    assert len(seen["at_points"]) > 5


@pytest.mark.heavy
def test_damaged_stores_open_and_give_the_same_answers(found: dict[str, Any]) -> None:
    seen = found["damage"]
    assert {name: seen[name] for name in ("refused", "wrong", "not_saved", "unclean")} == {
        "refused": 0,
        "wrong": 0,
        "not_saved": 0,
        "unclean": 0,
    }
    assert seen["damages"] > 15


@pytest.mark.heavy
def test_under_every_fault_turns_are_answered_and_saved_again_after_it(found: dict[str, Any]) -> None:
    seen = found["faults"]["faults"]
    assert set(seen) == set(faults.FAULTS) - faults.LONG
    for name, one in seen.items():
        assert one["right"], name
        assert one["saved_meanwhile"] or one["reason"], name
        assert one["saved_afterwards"], name


@pytest.mark.heavy
def test_nothing_grows_at_the_edge_of_all_budgets(found: dict[str, Any]) -> None:
    seen = found["soak"]
    assert (seen["wrong"], seen["unclean"]) == (0, 0)
    assert seen["evicted"] > 10
    # Between an eviction of one process and a write of another, files are there that count no more.
    assert max(seen["disk"]) <= 1.25 * seen["disk_budget"]
    assert seen["descriptors"][1] <= seen["descriptors"][0] + 2
    assert seen["threads"][1] <= seen["threads"][0] + 2


def test_every_kind_of_file_and_table_is_damaged_in_every_way() -> None:
    cases = [(what, how) for what, how, _ in damage.cases()]
    assert len(cases) == len(set(cases)) > 200
    assert {f"table {name}" for name in ("records", "branches", "sessions", "totals")} <= {
        what for what, _ in cases
    }
    assert len(kills.POINTS) > 10
