"""`agent-memory check` and `agent-memory stats`: the folder on disk as a whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated

import typer

from agent_memory_core import CheckReport
from agent_memory_core.cli.options import CacheDir, DiskBudget, err, out, stored_memory

ProfileModel = Annotated[
    str | None,
    typer.Option("--model", help="The model whose profile sets the disk budget.", show_default=False),
]


def check(
    cache_dir: CacheDir = None,
    model: ProfileModel = None,
    disk_budget: DiskBudget = None,
    fix: Annotated[
        bool, typer.Option("--fix", help="Repair what can be repaired. Intact sessions are never deleted.")
    ] = False,
) -> None:
    """Compare every stored file with the catalog and its checksum, and say what was found."""
    opened = stored_memory(cache_dir=cache_dir, model=model, disk_budget_mb=disk_budget)
    with opened as memory, err.status("reading every block"):
        report = memory.check(fix=fix)
    for line in _lines(report):
        out.print(line, soft_wrap=True)
    if fix and not report.clean:
        out.print("what could be repaired was repaired.")
    if not report.clean and not fix:
        raise typer.Exit(1)


def _lines(report: CheckReport) -> Iterator[str]:
    yield f"{report.files} sound files, {report.nbytes / 2**20:.2f} MiB"
    for key in report.missing:
        yield f"missing: the file of {key.hex()}"
    for path in report.damaged:
        yield f"damaged: {path}"
    for path in report.foreign:
        yield f"not ours: {path}"
    for sentence in report.catalog:
        yield f"catalog: {sentence}"
    if report.over_quota:
        yield f"over the disk budget: {report.over_quota / 2**20:.2f} MiB, evicted when a turn needs room"
    if report.unknown or report.leftovers:
        yield (
            f"harmless remains of a killed process: {len(report.unknown)} files that the catalog does not name, "
            f"{report.leftovers} temporary files"
        )
    if report.quarantined:
        yield f"in the quarantine: {report.quarantined} files that were found damaged earlier and are not used"
    if report.clean:
        yield "all is well"


def stats(cache_dir: CacheDir = None, model: ProfileModel = None, disk_budget: DiskBudget = None) -> None:
    """Print how much is stored and what the limits are, as JSON."""
    with stored_memory(cache_dir=cache_dir, model=model, disk_budget_mb=disk_budget) as memory:
        out.print_json(json.dumps(memory.stats().to_dict()["store"]))
