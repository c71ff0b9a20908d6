"""`agent-memory agents`: the agents on disk, listed, shown, talked to, deleted, exported and imported."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from agent_memory_core import InvalidSetting
from agent_memory_core.agents import AgentContext, AgentNotFound, PersistentAgentManager
from agent_memory_core.cli.formats import ago, count, moment, print_json, size, table
from agent_memory_core.cli.options import (
    CacheDir,
    Json,
    Model,
    Namespace,
    err,
    fail,
    given,
    out,
    read_line,
    say,
)

app = typer.Typer(no_args_is_help=True, help="List, show, talk to, delete, export and import agents.")

AgentId = Annotated[str, typer.Argument(help="The id of the agent.", show_default=False)]


@app.command("list")
def list_agents(cache_dir: CacheDir = None, namespace: Namespace = "default", as_json: Json = False) -> None:
    """List all agents, the one used last first."""
    with _manager(namespace, cache_dir=cache_dir) as manager:
        nbytes = dict(manager.get_disk_usage()["per_agent"])
        found = manager.list_agents()
    if as_json:
        print_json([dataclasses.asdict(info) | {"nbytes": nbytes[info.agent_id]} for info in found])
        return
    if not found:
        say("there is no agent yet: agent-memory agents chat NAME --type technical makes one.")
        return
    rows = table("agent", "type", "model", "last use", "messages", "size", right=("messages", "size"))
    for info in found:
        used = ago(info.last_access.timestamp())
        rows.add_row(
            info.agent_id, info.agent_type, info.model, used, str(info.messages), size(nbytes[info.agent_id])
        )
    out.print(rows)


@app.command()
def show(
    agent: AgentId, cache_dir: CacheDir = None, namespace: Namespace = "default", as_json: Json = False
) -> None:
    """Show an agent and what was said."""
    with _manager(namespace, cache_dir=cache_dir) as manager:
        context = manager.load_agent(agent)
    if as_json:
        print_json(dataclasses.asdict(context))
        return
    say(
        f"agent {context.agent_id!r} of the type {context.agent_type!r}, made {moment(context.created.timestamp())}: "
        f"{count(context.cache_tokens, 'token')} {'is' if context.cache_tokens == 1 else 'are'} kept"
    )
    for name, value in sorted(context.metadata.items()):
        say(f"{name} = {value}")
    say(f"\nsystem: {context.system_prompt}")
    for message in context.conversation_history:
        say(f"{message['role']}: {message['content']}")


@app.command()
def chat(
    agent: AgentId,
    agent_type: Annotated[
        str | None,
        typer.Option("--type", help="What a new agent is; the name of a template.", show_default=False),
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="The system prompt of a new agent.", show_default=False)
    ] = None,
    model: Model = None,
    cache_dir: CacheDir = None,
    namespace: Namespace = "default",
    max_tokens: Annotated[int, typer.Option(help="The most tokens of one answer.")] = 300,
) -> None:
    """Talk to an agent, which --type makes if there is none. An empty line ends the command."""
    with _manager(namespace, model_name=model, cache_dir=cache_dir) as manager:
        with err.status(f"loading {manager.memory.model_name}"):
            context = _opened(manager, agent, agent_type, system)
        if context.conversation_history:
            err.print(f"continuing agent {agent!r} after {len(context.conversation_history)} messages.")
        while text := read_line():
            with manager.stream(agent, text, max_tokens) as stream:
                for delta in stream:
                    out.print(delta.text, end="")
            out.print()
            if stream.report is not None:
                usage = stream.report.usage
                err.print(f"{usage.cache_read} of {usage.prompt_tokens} prompt tokens reused", style="dim")


@app.command()
def delete(agent: AgentId, cache_dir: CacheDir = None, namespace: Namespace = "default") -> None:
    """Delete an agent, what was said and what is stored of it."""
    with _manager(namespace, cache_dir=cache_dir) as manager:
        found = manager.delete_agent(agent)
    if not found:
        raise fail(f"there is no agent {agent!r} in namespace {namespace!r}.")
    say(f"agent {agent!r} was deleted.")


@app.command("export")
def export_agent(
    agent: AgentId,
    path: Annotated[Path, typer.Argument(help="The file to write.", show_default=False)],
    cache_dir: CacheDir = None,
    namespace: Namespace = "default",
) -> None:
    """Write an agent to a file for another machine. Nothing in it is encrypted."""
    with _manager(namespace, cache_dir=cache_dir) as manager:
        manager.export_agent(agent, path)
    say(f"agent {agent!r} was written to {path}, {size(path.stat().st_size)}.")


@app.command("import")
def import_agent(
    path: Annotated[
        Path,
        typer.Argument(
            help="An exported agent, a prompt cache of mlx-lm, or a folder of these.", show_default=False
        ),
    ],
    new_id: Annotated[
        str | None,
        typer.Option("--as", help="Another id for the agent of an exported file.", show_default=False),
    ] = None,
    model: Model = None,
    cache_dir: CacheDir = None,
    namespace: Namespace = "default",
) -> None:
    """Make agents from a file or a folder."""
    with _manager(namespace, model_name=model, cache_dir=cache_dir) as manager:
        if path.is_dir() or path.suffix == ".safetensors":
            imported = manager.import_poc(path)
        else:
            imported = [manager.import_agent(path, new_id)]
    for context in imported:
        say(
            f"agent {context.agent_id!r} was imported with {len(context.conversation_history)} messages and "
            f"{context.cache_tokens} tokens."
        )


@contextmanager
def _manager(namespace: str, **options: Any) -> Iterator[PersistentAgentManager]:
    """A manager with a folder on disk. Nothing is loaded before a command asks for it."""
    with PersistentAgentManager(namespace=namespace, **given(**options)) as manager:
        if manager.memory.config.cache_dir is None:
            raise InvalidSetting(
                "there is no folder for agents: give --cache-dir, or set AGENT_MEMORY_CACHE_DIR to a folder."
            )
        yield manager


def _opened(
    manager: PersistentAgentManager, agent: str, agent_type: str | None, system: str | None
) -> AgentContext:
    if manager.agent_exists(agent):
        context = manager.load_agent(agent)
    elif agent_type is None and system is None:
        known = ", ".join(manager.templates)
        raise AgentNotFound(
            f"there is no agent {agent!r}: --type makes one ({known}), and so does --system with a text."
        )
    else:
        context = manager.create_agent(agent, agent_type or "chat", system)
    manager.memory.load()
    return context
