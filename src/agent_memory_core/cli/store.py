"""`agent-memory check` and `agent-memory stats`: the folder on disk as a whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Annotated

import typer

from agent_memory_core import CheckReport
from agent_memory_core.cli.formats import count, print_json, size
from agent_memory_core.cli.options import CacheDir, DiskBudget, Json, err, say, stored_memory

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
    as_json: Json = False,
) -> None:
    """Compare every stored file with the catalog and its checksum, and say what was found."""
    opened = stored_memory(cache_dir=cache_dir, model=model, disk_budget_mb=disk_budget)
    with opened as memory, err.status("reading every block"):
        report = memory.check(fix=fix)
    if as_json:
        print_json(dataclasses.asdict(report) | {"clean": report.clean})
    else:
        _tell(report, fix)
    if not report.clean and not fix:
        raise typer.Exit(1)


def _tell(report: CheckReport, fix: bool) -> None:
    for line in _lines(report):
        say(line)
    if fix and not report.clean:
        say("what could be repaired was repaired.")


def _lines(report: CheckReport) -> Iterator[str]:
    yield f"{count(report.files, 'sound file')}, {size(report.nbytes)}"
    for key in report.missing:
        yield f"missing: the file of {key.hex()}"
    for path in report.damaged:
        yield f"damaged: {path}"
    for path in report.foreign:
        yield f"not ours: {path}"
    for sentence in report.catalog:
        yield f"catalog: {sentence}"
    if report.over_quota:
        yield f"over the disk budget: {size(report.over_quota)}, evicted when a turn needs room"
    if report.unknown or report.leftovers:
        yield (
            f"harmless remains of a killed process: {len(report.unknown)} files that the catalog does not name, "
            f"{report.leftovers} temporary files"
        )
    if report.quarantined:
        yield f"in the quarantine: {report.quarantined} files that were found damaged earlier and are not used"
    if report.clean:
        yield "all is well"


def stats(
    cache_dir: CacheDir = None,
    model: ProfileModel = None,
    disk_budget: DiskBudget = None,
    as_json: Json = False,
) -> None:
    """Show how much is stored and what the limits are."""
    with stored_memory(cache_dir=cache_dir, model=model, disk_budget_mb=disk_budget) as memory:
        store, folder = memory.stats().store, memory.config.cache_dir
    if as_json:
        print_json(dataclasses.asdict(store))
        return
    say(f"{folder}: {count(store.sessions, 'session')} with {count(store.branches, 'branch', 'branches')}")
    say(f"{size(store.bytes)} in {count(store.files, 'file')}, of at most {size(store.quota)}")
    say(f"{size(store.volume_free)} free on the volume, of which {size(store.min_free)} are left free")
    if store.quarantined:
        say(f"{count(store.quarantined, 'damaged file')} in the quarantine: agent-memory check says more")
