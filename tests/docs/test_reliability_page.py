"""The page about reliability: each promise names tests that exist, and the figures are those that were measured."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
RESULTS = json.loads((ROOT / "benchmarks" / "results" / "reliability.json").read_text(encoding="utf-8"))[
    "results"
]
NAMED = re.findall(r"`([\w/]+\.py)::(\w+)`", PAGE)


@pytest.mark.parametrize(("path", "name"), NAMED)
def test_each_named_test_exists(path: str, name: str) -> None:
    text = (ROOT / "tests" / path).read_text(encoding="utf-8")
    assert re.search(rf"^(async )?def {name}\(", text, re.MULTILINE)


def test_no_promise_is_without_a_test() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| Fault")]
    promises = [row for row in rows if row.count("|") == 4]
    assert len(promises) > 25
    assert all("::" in row for row in promises)


def test_what_was_measured_keeps_the_promises() -> None:
    kills, damage, faults, soak = (RESULTS[part] for part in ("kills", "damage", "faults", "soak"))
    assert kills["kills"] >= 500
    assert soak["minutes"] >= 30
    assert (
        kills["lost"]
        == kills["wrong"]
        == kills["unclean"]
        == damage["wrong"]
        == damage["refused"]
        == soak["wrong"]
        == 0
    )
    assert kills["largest_share"] <= 1.05
    # Between an eviction of one process and a write of another, files are there that count no more.
    assert max(soak["disk"]) <= 1.1 * soak["disk_budget"]
    assert all(fault["right"] and fault["saved_afterwards"] for fault in faults["faults"].values())
