"""The command `agent-memory`: what it has for commands, and what becomes of an error.

Settings come from the options named here, from ``AGENT_MEMORY_*`` variables and from the model's profile. A command
imports MLX only if it runs a model, so that help and the list of sessions come at once.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from agent_memory_core import AgentMemoryError
from agent_memory_core.cli import agents, cold, keys, manager, models, scale, service, sessions, store
from agent_memory_core.cli.bench import bench
from agent_memory_core.cli.chat import chat
from agent_memory_core.cli.connect import connect
from agent_memory_core.cli.doctor import doctor
from agent_memory_core.cli.options import err, out
from agent_memory_core.cli.serve import serve
from agent_memory_core.demos import pages, restart


def _print_version(wanted: bool) -> None:
    if wanted:
        out.print(f"agent-memory {version('agent-memory-mlx')}")
        raise typer.Exit


app = typer.Typer(
    no_args_is_help=True,
    help="Persistent KV-cache memory for LLM agents on MLX: conversations that continue after a restart.",
)


@app.callback()
def _root(
    show_it: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and stop."),
    ] = False,
) -> None:
    """What stands before a command."""


app.command()(chat)
app.command()(doctor)
app.command()(bench)
app.command()(serve)
app.command()(connect)
app.add_typer(keys.app, name="keys")
app.add_typer(service.app, name="service")
app.add_typer(sessions.app, name="sessions")
app.add_typer(agents.app, name="agents")
app.add_typer(models.app, name="models")
app.add_typer(manager.app, name="manager")
app.add_typer(cold.app, name="cold")
app.add_typer(scale.app, name="scale")
app.command()(store.check)
app.command()(store.stats)


@app.command()
def demo(
    picture: Annotated[Path, typer.Option(help="The file for the bar chart.")] = Path(
        "agent-memory-demo.png"
    ),
) -> None:
    """See three agents continue after their process was killed."""
    restart.run(out, picture)


@app.command()
def ui(
    port: Annotated[int, typer.Option(help="The port on this machine.")] = 8501,
) -> None:
    """Open pages in a browser: agents that talk, experts that remember, and what is stored."""
    pages.run(port)


def main() -> None:
    """Run the command line.

    It ends with 0 after success, 1 after an error, which is one sentence without a traceback, 2 where the command was
    misspelled, and 130 after Ctrl-C.
    """
    try:
        app(prog_name="agent-memory")
    except (AgentMemoryError, OSError) as error:
        err.print(f"error: {error}", style="red", soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
