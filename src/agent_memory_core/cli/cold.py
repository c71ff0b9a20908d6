"""`agent-memory cold`: the copy of the sessions in an object store."""

from __future__ import annotations

from typing import Annotated

import typer

from agent_memory_core.agents import PersistentAgentManager
from agent_memory_core.cli.formats import count, print_json, size
from agent_memory_core.cli.options import CacheDir, Json, Namespace, err, say, stored_memory

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
def status(cache_dir: CacheDir = None, url: Url = None, as_json: Json = False) -> None:
    """Show what waits to be uploaded."""
    with stored_memory(cache_dir=cache_dir, cold_url=url) as memory:
        found = memory.cold.status()
    if as_json:
        print_json(found.to_dict())
        return
    say(
        f"waiting to be uploaded: {count(found.waiting, 'session')} with {count(found.waiting_turns, 'turn')}; to be "
        f"forgotten there: {found.forgetting}"
    )
    if found.failure:
        say(f"the last upload failed: {found.failure}")


@app.command()
def push(
    sessions: SomeSessions = None,
    namespace: Namespace = "default",
    cache_dir: CacheDir = None,
    url: Url = None,
) -> None:
    """Upload sessions now, also those from before there was a cold tier, and what was said to agents."""
    with stored_memory(cache_dir=cache_dir, cold_url=url) as memory:
        cold = memory.cold
        names = sessions or [info.session_id for info in memory.sessions(namespace)]
        with err.status("uploading"):
            for name in names:
                cold.push(name, namespace)
            with PersistentAgentManager(memory=memory, namespace=namespace) as manager:
                agents = manager.push_agents()
        done = cold.status()
    say(f"{count(len(names), 'session')} in the object store, {size(done.uploaded_bytes)} of it new")
    if agents:
        say(f"what was said to {count(agents, 'agent')} is there, too")


@app.command()
def pull(
    sessions: Sessions, namespace: Namespace = "default", cache_dir: CacheDir = None, url: Url = None
) -> None:
    """Download sessions now, and the agents of these names; a turn of one does it by itself."""
    with stored_memory(cache_dir=cache_dir, cold_url=url) as memory, err.status("downloading"):
        found = [name for name in sessions if memory.cold.pull(name, namespace)]
        with PersistentAgentManager(memory=memory, namespace=namespace) as manager:
            agents = [name for name in sessions if manager.pull_agent(name)]
        nbytes = memory.cold.status().downloaded_bytes
    say(f"{len(found)} of {count(len(sessions), 'session')} had news, {size(nbytes)}")
    if agents:
        say(f"here are now the agents {', '.join(map(repr, agents))}")


@app.command()
def sweep(
    cache_dir: CacheDir = None,
    url: Url = None,
    ttl_days: Annotated[
        float | None,
        typer.Option(help="Delete sessions that nobody has used for so many days.", show_default=False),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count.")] = False,
    as_json: Json = False,
) -> None:
    """Delete from the object store what is too old and what no session has any more."""
    opened = stored_memory(cache_dir=cache_dir, cold_url=url, cold_ttl_days=ttl_days)
    with opened as memory, err.status("reading the heads of all sessions"):
        done = memory.cold.sweep(dry_run=dry_run)
    if as_json:
        print_json(done.to_dict())
        return
    say(f"{count(done.sessions, 'session')}, {count(done.records, 'record')} of {size(done.nbytes)}")
    verb = "could be deleted" if dry_run else "were deleted"
    say(
        f"{verb}: {done.expired} of the sessions and {done.deleted} of the records, {size(done.deleted_bytes)}"
    )
