"""What the commands share: their options, where they print and read, and how they open a memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from agent_memory_core import AgentMemory, AgentMemoryError, InvalidSetting

out = Console(highlight=False, markup=False)
err = Console(highlight=False, markup=False, stderr=True)


def given(**options: Any) -> dict[str, Any]:
    """The options that the user gave; the others come from the environment, the profile and the defaults."""
    return {name: value for name, value in options.items() if value is not None}


def _known_sessions(context: typer.Context, incomplete: str) -> list[str]:
    """The ids that a shell proposes; none where the folder cannot be read."""
    namespace = context.params.get("namespace") or "default"
    try:
        with stored_memory(cache_dir=context.params.get("cache_dir")) as memory:
            found = [info.session_id for info in memory.sessions(namespace)]
    except AgentMemoryError:
        return []
    return [name for name in found if name.startswith(incomplete)]


Model = Annotated[
    str | None,
    typer.Option(help="The model: an embedded name, a folder or a Hugging Face hub id.", show_default=False),
]
CacheDir = Annotated[
    Path | None, typer.Option(help="The folder that stores the sessions.", show_default=False)
]
DiskBudget = Annotated[
    int | None,
    typer.Option(
        "--disk-budget-mb", help="The most MiB that all sessions may take on disk.", show_default=False
    ),
]
Namespace = Annotated[str, typer.Option(help="The namespace of the session. Namespaces share nothing.")]
SessionId = Annotated[
    str,
    typer.Argument(help="The id of the session.", show_default=False, autocompletion=_known_sessions),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def say(text: str) -> None:
    """Print a sentence, which the terminal itself wraps."""
    out.print(text, soft_wrap=True)


def fail(sentence: str) -> typer.Exit:
    """Print what went wrong; raise the result to end with exit code 1."""
    err.print(f"error: {sentence}", style="red", soft_wrap=True)
    return typer.Exit(1)


def read_line() -> str:
    """What the user says next; empty at the end of the input."""
    try:
        return out.input("[bold]> [/bold]", markup=True).strip()
    except EOFError:
        out.print()
        return ""


@contextmanager
def stored_memory(**options: Any) -> Iterator[AgentMemory]:
    """A memory with these options that has a folder on disk. Nothing is loaded before a command asks for it.

    Raises:
        InvalidSetting: an option is wrong, or there is no folder.
    """
    with AgentMemory(**given(**options)) as memory:
        if memory.config.cache_dir is None:
            raise InvalidSetting(
                "there is no folder for sessions: give --cache-dir, or set AGENT_MEMORY_CACHE_DIR to a folder."
            )
        yield memory
