"""The page about other packages shows every conversation that is tried, as it was measured."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

from support.ecosystem import SCENARIOS

ROOT = Path(__file__).parents[2]
RESULTS = json.loads((ROOT / "benchmarks" / "results" / "ecosystem.json").read_text(encoding="utf-8"))[
    "results"
]
PAGE = (ROOT / "docs" / "ecosystem.md").read_text(encoding="utf-8")


def test_every_conversation_was_measured_as_it_is_now() -> None:
    assert {name: (found["package"], found["what"]) for name, found in RESULTS.items()} == {
        name: (scenario.package, (scenario.open.__doc__ or "").rstrip("."))
        for name, scenario in SCENARIOS.items()
    }


def test_the_rows_are_the_results() -> None:
    rows = [
        [cell.strip() for cell in row.split("|")[1:-1]] for row in re.findall(r"^\|.*\|$", PAGE, re.MULTILINE)
    ]
    assert rows[2:] == [
        [
            f"{found['package']} {found['version']}",
            found["what"],
            *(f"{turn['prompt']:,} / {turn['reused']:,}" for turn in found["turns"]),
        ]
        for found in RESULTS.values()
    ]


def test_every_package_is_installed_by_the_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = {re.split(r"[<>=]", line)[0] for line in project["optional-dependencies"]["ecosystem-tests"]}
    assert {scenario.package for scenario in SCENARIOS.values()} <= wanted
