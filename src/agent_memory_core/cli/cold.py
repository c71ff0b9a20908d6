"""`agent-memory cold`: the copy of the sessions in an object store."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from agent_memory_core.cli.options import CacheDir, Namespace, err, out, stored_memory

app = typer.Typer(
    no_args_is_help=True, help="The copy of the sessions in an object store, for other machines."
)

Url = Annotated[
    str | None,
    typer.Option("--url", help="The bucket or folder, such as s3://bucket/folder.", show_default=False),
]
Sessions = Annotated[list[str], typer.Argument(help="The ids of the sessions.", show_default=False)]
SomeSessions = Annotated[
    list[str] | None, typer.Argument(help="The ids of the sessions; none means all of the namespace.")
]


@app.command()
def status(cache_dir: CacheDir = None, url: Url = None) -> None:
    """Print what waits to be uploaded, as JSON."""
    with stored_memory(cache_dir=cache_dir, cold_url=url) as memory:
        out.print_json(json.dumps(memory.cold.status().to_dict()))


@app.command()
def push(
    sessions: SomeSessions = None,
    namespace: Namespace = "default",
    cache_dir: CacheDir = None,
    url: Url = None,
) -> None:
    """Upload sessions now, also those from before there was a cold tier."""
    with stored_memory(cache_dir=cache_dir, cold_url=url) as memory:
        cold = memory.cold
        names = sessions or [info.session_id for info in memory.sessions(namespace)]
        with err.status("uploading"):
            for name in names:
                cold.push(name, namespace)
        done = cold.status()
        out.print(
            f"{len(names)} sessions are in the object store, {done.uploaded_bytes / 2**20:.2f} MiB new."
        )


@app.command()
def pull(
    sessions: Sessions, namespace: Namespace = "default", cache_dir: CacheDir = None, url: Url = None
) -> None:
    """Download sessions now; a turn of one does it by itself."""
    with stored_memory(cache_dir=cache_dir, cold_url=url) as memory, err.status("downloading"):
        found = [name for name in sessions if memory.cold.pull(name, namespace)]
        nbytes = memory.cold.status().downloaded_bytes
    out.print(f"{len(found)} of {len(sessions)} sessions had news, {nbytes / 2**20:.2f} MiB.")


@app.command()
def sweep(
    cache_dir: CacheDir = None,
    url: Url = None,
    ttl_days: Annotated[
        float | None,
        typer.Option(help="Delete sessions that nobody has used for so many days.", show_default=False),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count.")] = False,
) -> None:
    """Delete from the object store what is too old and what no session has any more."""
    with stored_memory(cache_dir=cache_dir, cold_url=url, cold_ttl_days=ttl_days) as memory:
        with err.status("reading the heads of all sessions"):
            done = memory.cold.sweep(dry_run=dry_run)
        out.print_json(json.dumps(done.to_dict()))
