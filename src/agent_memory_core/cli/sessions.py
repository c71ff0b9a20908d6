"""`agent-memory sessions`: the sessions on disk, listed, shown, deleted and pinned."""

from __future__ import annotations

import datetime
import re
from typing import Annotated

import typer

from agent_memory_core.cli.formats import ago, count, moment, print_json, size, table, with_moments
from agent_memory_core.cli.options import CacheDir, Json, Namespace, SessionId, fail, out, say, stored_memory

app = typer.Typer(no_args_is_help=True, help="List, show, pin and delete the sessions on disk.")


@app.command("list")
def list_sessions(
    cache_dir: CacheDir = None,
    namespace: Annotated[
        str | None, typer.Option(help="List only the sessions of this namespace.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """List all sessions on disk, the most recently used first."""
    with stored_memory(cache_dir=cache_dir) as memory:
        found = memory.sessions(namespace)
    if as_json:
        print_json(with_moments(found, *_MOMENTS))
        return
    if not found:
        say("there is no session yet: agent-memory chat makes one.")
        return
    rows = table("session", "namespace", "model", "last use", "tokens", "size", right=("tokens", "size"))
    for info in found:
        name = info.session_id + (" (pinned)" if info.pinned else "")
        used, nbytes = ago(info.last_use), size(info.nbytes)
        rows.add_row(name, info.namespace, info.model, used, f"{info.tokens:,}", nbytes)
    out.print(rows)


@app.command()
def show(
    session: SessionId, cache_dir: CacheDir = None, namespace: Namespace = "default", as_json: Json = False
) -> None:
    """Show one session and its branches."""
    with stored_memory(cache_dir=cache_dir) as memory:
        branches = memory.branches(session, namespace)
        infos = [info for info in memory.sessions(namespace) if info.session_id == session]
    if as_json:
        (found,) = with_moments(infos, *_MOMENTS)
        print_json(found | {"branches": with_moments(branches, *_MOMENTS)})
        return
    for info in infos:
        say(
            f"session {info.session_id!r} in namespace {info.namespace!r}, model {info.model}: "
            f"{count(info.tokens, 'token')}, {size(info.nbytes)}, "
            f"last used {_moment(info.last_use)}{', pinned' if info.pinned else ''}"
        )
    for branch in branches:
        say(
            f"branch {branch.branch_id}: {count(branch.tokens, 'token')}, the last answer begins at token "
            f"{branch.prompt_tokens:,}, lane {branch.lane!r}, last used {_moment(branch.last_use)}"
        )


@app.command()
def forget(session: SessionId, cache_dir: CacheDir = None, namespace: Namespace = "default") -> None:
    """Delete a session. Blocks that other sessions share stay."""
    with stored_memory(cache_dir=cache_dir) as memory:
        found = memory.forget(session, namespace)
    if not found:
        raise fail(f"there is no session {session!r} in namespace {namespace!r}.")
    say(f"session {session!r} was deleted.")


@app.command("forget-namespace")
def forget_namespace(
    namespace: Annotated[str, typer.Argument(help="The namespace.")], cache_dir: CacheDir = None
) -> None:
    """Delete all sessions of a namespace, pinned ones too."""
    with stored_memory(cache_dir=cache_dir) as memory:
        number = memory.forget_namespace(namespace)
    say(f"{count(number, 'session')} of namespace {namespace!r} {_were(number)} deleted.")


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
    as_json: Json = False,
) -> None:
    """Delete the sessions that nobody has used for a time. Pinned ones stay."""
    age = _duration(older_than)
    with stored_memory(cache_dir=cache_dir) as memory:
        gone = memory.prune(age, namespace, dry_run=dry_run)
    if as_json:
        print_json(with_moments(gone, *_MOMENTS))
        return
    for info in gone:
        say(
            f"session {info.session_id!r} in namespace {info.namespace!r}, last used {_moment(info.last_use)}"
        )
    say(f"{count(len(gone), 'session')} {'would be' if dry_run else _were(len(gone))} deleted.")


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
    say(f"session {session!r} is {'no longer ' if off else ''}pinned.")


_MOMENTS = ("created", "last_use")


def _moment(seconds: float) -> str:
    return f"{moment(seconds)} ({ago(seconds)})"


def _were(number: int) -> str:
    return "was" if number == 1 else "were"
