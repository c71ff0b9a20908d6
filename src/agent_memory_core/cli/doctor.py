"""`agent-memory doctor`: this machine in one screen, with what to do about what is wrong."""

from __future__ import annotations

import dataclasses

import typer

from agent_memory_core import Finding, examine_machine
from agent_memory_core.cli.formats import count, print_json, table
from agent_memory_core.cli.options import CacheDir, DiskBudget, Json, Model, err, given, out, say

_MARKS = {"ok": "ok", "note": "note", "fault": "FAULT"}


def doctor(
    model: Model = None, cache_dir: CacheDir = None, disk_budget: DiskBudget = None, as_json: Json = False
) -> None:
    """Look at what a memory needs of this machine: versions, backend, disk, memory, known traps. Loads no model."""
    with err.status("looking"):
        found = examine_machine(given(model=model, cache_dir=cache_dir, disk_budget_mb=disk_budget))
    if as_json:
        print_json([dataclasses.asdict(finding) for finding in found])
    else:
        _tell(found)
    if any(finding.verdict == "fault" for finding in found):
        raise typer.Exit(1)


def _tell(found: tuple[Finding, ...]) -> None:
    rows = table("", "what", "found")
    for finding in found:
        advice = f"\n{finding.advice}" if finding.advice else ""
        rows.add_row(_MARKS[finding.verdict], finding.subject, finding.value + advice)
    out.print(rows)
    faults = sum(finding.verdict == "fault" for finding in found)
    notes = sum(finding.verdict == "note" for finding in found)
    parts = [count(faults, "fault")] * bool(faults) + [count(notes, "note")] * bool(notes)
    say(" and ".join(parts) or "all is well")
