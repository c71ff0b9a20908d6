"""The command line: demo, chat, sessions, models, check, stats.

Settings come from ``AGENT_MEMORY_*`` variables and the options named here. Only `chat`,
`demo` and some of `models` load one.
"""

from __future__ import annotations

import datetime
import itertools
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from agent_memory_core.cli import models as cli_models
from agent_memory_core.cli.transcript import Transcript
from agent_memory_core.demos import restart as demonstration
from agent_memory_core.errors import AgentMemoryError, InvalidSetting
from agent_memory_core.memory import AgentMemory, ChatStream
from agent_memory_core.messages import SessionKey, TurnReport
from agent_memory_core.models.profile import settings_for
from agent_memory_core.storage.block_store import BlockStore

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Persistent KV-cache memory for LLM agents on MLX."
)
sessions_app = typer.Typer(no_args_is_help=True, help="What is remembered, and for whom.")
app.add_typer(sessions_app, name="sessions")
app.add_typer(cli_models.app, name="models")

out = Console()
err = Console(stderr=True)

Model = Annotated[str | None, typer.Option(help="An embedded name, a folder or a hub id.")]
CacheDir = Annotated[Path | None, typer.Option(help="Where sessions live on disk.")]
Namespace = Annotated[str, typer.Option(help="Nothing is shared across namespaces.")]
SessionId = Annotated[str, typer.Argument(help="The session's id.")]


@app.command()
def demo(
    picture: Annotated[Path, typer.Option(help="Where to save the bar chart.")] = Path(
        "agent-memory-demo.png"
    ),
) -> None:
    """Three agents share a brief, are killed, and resume where they were."""
    demonstration.run(out, picture)


@app.command()
def chat(
    session: Annotated[str, typer.Option(help="The conversation to begin or to go on with.")] = "chat",
    model: Model = None,
    cache_dir: CacheDir = None,
    namespace: Namespace = "default",
    max_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 256,
) -> None:
    """Talk to a model; the conversation goes on after a restart. An empty line ends it."""
    with AgentMemory(**_settings(model=model, cache_dir=cache_dir)) as memory:
        assert memory.config.cache_dir is not None
        transcript = Transcript(memory.config.cache_dir, namespace, session)
        history = transcript.read()
        with err.status(f"loading {memory.model_name}"):
            memory.load()
        if history:
            err.print(f"going on with {len(history)} messages of session {session!r}.")
        while text := _read_line():
            history.append({"role": "user", "content": text})
            key = SessionKey(session, namespace=namespace)
            answer = _answer(memory.chat(history, session=key, stream=True, max_tokens=max_tokens))
            history.append({"role": "assistant", "content": answer})
            transcript.write(history)


def _read_line() -> str:
    try:
        return out.input("[bold]> [/bold]").strip()
    except EOFError:
        return ""


def _answer(stream: ChatStream) -> str:
    text = ""
    with stream:
        with err.status("reading"):
            first = next(stream)
        for delta in itertools.chain([first], stream):
            text += delta.text
            out.print(delta.text, end="", markup=False, highlight=False)
    out.print()
    if stream.report is not None:
        err.print(_summary(stream.report), style="dim")
    return text


def _summary(report: TurnReport) -> str:
    usage = report.usage
    why = f", {report.miss_reason}" if report.miss_reason else ""
    return (
        f"{usage.cache_read} of {usage.prompt_tokens} prompt tokens reused ({report.hit_tier}{why}), "
        f"first token after {report.time_to_first_token * 1000:.0f} ms"
    )


@sessions_app.command("list")
def list_sessions(
    cache_dir: CacheDir = None,
    namespace: Annotated[str | None, typer.Option(help="Only this namespace.")] = None,
) -> None:
    """All sessions on disk, the most recently used first."""
    table = Table()
    for name in ("session", "namespace", "model", "pinned", "last use"):
        table.add_column(name)
    for name in ("branches", "tokens", "MiB"):
        table.add_column(name, justify="right")
    for info in _store(cache_dir).sessions(namespace):
        when = datetime.datetime.fromtimestamp(info.last_use).isoformat(" ", "seconds")
        table.add_row(
            info.session_id,
            info.namespace,
            info.model,
            "yes" if info.pinned else "",
            when,
            str(info.branches),
            str(info.tokens),
            f"{info.nbytes / 2**20:.2f}",
        )
    out.print(table)


@sessions_app.command()
def show(session: SessionId, cache_dir: CacheDir = None, namespace: Namespace = "default") -> None:
    """One session and its branches."""
    store = _store(cache_dir)
    for info in [i for i in store.sessions(namespace) if i.session_id == session]:
        out.print(info)
    for branch in store.session_branches(namespace, session):
        out.print(
            f"branch {branch.branch_id}: {branch.tokens} tokens, last answer from token {branch.prompt_tokens}, "
            f"lane {branch.lane!r}, generation {branch.generation}",
            highlight=False,
        )


@sessions_app.command()
def forget(session: SessionId, cache_dir: CacheDir = None, namespace: Namespace = "default") -> None:
    """Delete a session; what others share stays."""
    store = _store(cache_dir)
    found = store.forget(namespace, session)
    Transcript(_folder(cache_dir), namespace, session).delete()
    out.print(f"session {session!r} was forgotten." if found else f"there was no session {session!r}.")


@sessions_app.command()
def pin(
    session: SessionId,
    cache_dir: CacheDir = None,
    namespace: Namespace = "default",
    off: Annotated[bool, typer.Option("--off", help="Let it be evicted again.")] = False,
) -> None:
    """Keep a session on disk whatever the budget."""
    _store(cache_dir).pin(namespace, session, not off)
    out.print(f"session {session!r} is {'no longer ' if off else ''}pinned.")


@app.command()
def check(
    cache_dir: CacheDir = None,
    fix: Annotated[bool, typer.Option("--fix", help="Mend what can be mended.")] = False,
) -> None:
    """Audit the store: every file against the catalog, every checksum."""
    with err.status("reading every block"):
        report = _store(cache_dir).check(fix=fix)
    out.print(report)
    if not report.clean and not fix:
        raise typer.Exit(1)


@app.command()
def stats(cache_dir: CacheDir = None) -> None:
    """What the store holds, in plain numbers."""
    out.print_json(json.dumps(_store(cache_dir).stats()))


def _settings(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _folder(cache_dir: Path | None) -> Path:
    folder = settings_for(_settings(cache_dir=cache_dir)).cache_dir
    if folder is None:
        raise InvalidSetting("there is no cache directory: give --cache-dir or set AGENT_MEMORY_CACHE_DIR.")
    return folder


def _store(cache_dir: Path | None) -> BlockStore:
    return BlockStore(_folder(cache_dir))


def main() -> None:
    """Run the command line; an error of ours is one sentence, not a traceback."""
    try:
        app()
    except AgentMemoryError as error:
        err.print(f"error: {error}", style="red", highlight=False, markup=False)
        sys.exit(1)


if __name__ == "__main__":
    main()
