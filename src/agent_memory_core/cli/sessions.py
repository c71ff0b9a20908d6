"""`agent-memory sessions`: the sessions on disk, listed, shown, deleted and pinned."""

from __future__ import annotations

import datetime
import re
from typing import Annotated

import typer
from rich.table import Table

from agent_memory_core.cli.options import CacheDir, Namespace, SessionId, out, stored_memory

app = typer.Typer(no_args_is_help=True, help="List, show, pin and delete the sessions on disk.")


@app.command("list")
def list_sessions(
    cache_dir: CacheDir = None,
    namespace: Annotated[
        str | None, typer.Option(help="List only the sessions of this namespace.", show_default=False)
    ] = None,
) -> None:
    """List all sessions on disk, the most recently used first."""
    table = Table()
    for name in ("session", "namespace", "model", "pinned", "last use"):
        table.add_column(name)
    for name in ("branches", "tokens", "MiB"):
        table.add_column(name, justify="right")
    with stored_memory(cache_dir=cache_dir) as memory:
        for info in memory.sessions(namespace):
            table.add_row(
                info.session_id,
                info.namespace,
                info.model,
                "yes" if info.pinned else "",
                _time(info.last_use),
                str(info.branches),
                str(info.tokens),
                f"{info.nbytes / 2**20:.2f}",
            )
    out.print(table)


@app.command()
def show(session: SessionId, cache_dir: CacheDir = None, namespace: Namespace = "default") -> None:
    """Show one session and its branches."""
    with stored_memory(cache_dir=cache_dir) as memory:
        branches = memory.branches(session, namespace)
        infos = [info for info in memory.sessions(namespace) if info.session_id == session]
    for info in infos:
        _say(
            f"session {info.session_id!r} in namespace {info.namespace!r}, model {info.model}: {info.tokens} tokens, "
            f"{info.nbytes / 2**20:.2f} MiB, last used {_time(info.last_use)}{', pinned' if info.pinned else ''}"
        )
    for branch in branches:
        _say(
            f"branch {branch.branch_id}: {branch.tokens} tokens, the last answer begins at token "
            f"{branch.prompt_tokens}, lane {branch.lane!r}, last used {_time(branch.last_use)}"
        )


@app.command()
def forget(session: SessionId, cache_dir: CacheDir = None, namespace: Namespace = "default") -> None:
    """Delete a session. Blocks that other sessions share stay."""
    with stored_memory(cache_dir=cache_dir) as memory:
        found = memory.forget(session, namespace)
    _say(f"session {session!r} was deleted." if found else f"there was no session {session!r}.")


@app.command("forget-namespace")
def forget_namespace(
    namespace: Annotated[str, typer.Argument(help="The namespace.")], cache_dir: CacheDir = None
) -> None:
    """Delete all sessions of a namespace, pinned ones too."""
    with stored_memory(cache_dir=cache_dir) as memory:
        count = memory.forget_namespace(namespace)
    one = count == 1
    said = f"{count} session{'' if one else 's'} of namespace {namespace!r}"
    _say(f"{said} {'was' if one else 'were'} deleted.")


@app.command()
def prune(
    older_than: Annotated[
        str, typer.Option(help="How long ago the last use has to be, as 12h, 30d or 8w.", show_default=False)
    ],
    cache_dir: CacheDir = None,
    namespace: Annotated[
        str | None, typer.Option(help="Delete only sessions of this namespace.", show_default=False)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be deleted.")] = False,
) -> None:
    """Delete the sessions that nobody has used for a time. Pinned ones stay."""
    age = _duration(older_than)
    with stored_memory(cache_dir=cache_dir) as memory:
        gone = memory.prune(age, namespace, dry_run=dry_run)
        for info in gone:
            _say(
                f"session {info.session_id!r} in namespace {info.namespace!r}, last used {_time(info.last_use)}"
            )
    one = len(gone) == 1
    done = "would be" if dry_run else "was" if one else "were"
    _say(f"{len(gone)} session{'' if one else 's'} {done} deleted.")


_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def _duration(text: str) -> datetime.timedelta:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text.strip())
    if found is None:
        raise typer.BadParameter(
            f"{text!r} is not a time: a number with s, m, h, d or w, as 30d.", param_hint="--older-than"
        )
    return datetime.timedelta(**{_UNITS[found[2]]: float(found[1])})


@app.command()
def pin(
    session: SessionId,
    cache_dir: CacheDir = None,
    namespace: Namespace = "default",
    off: Annotated[bool, typer.Option("--off", help="Allow the session to be evicted again.")] = False,
) -> None:
    """Keep a session on disk even when the disk budget is full."""
    with stored_memory(cache_dir=cache_dir) as memory:
        memory.pin(session, namespace, pinned=not off)
    _say(f"session {session!r} is {'no longer ' if off else ''}pinned.")


def _time(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds).isoformat(" ", "seconds")


def _say(text: str) -> None:
    out.print(text, soft_wrap=True)
