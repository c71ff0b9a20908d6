"""What the commands share: their options, where they print, and how they open a memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from agent_memory_core import AgentMemory, InvalidSetting

out = Console(highlight=False, markup=False)
err = Console(highlight=False, markup=False, stderr=True)

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
SessionId = Annotated[str, typer.Argument(help="The id of the session.", show_default=False)]


def given(**options: Any) -> dict[str, Any]:
    """The options that the user gave; the others come from the environment, the profile and the defaults."""
    return {name: value for name, value in options.items() if value is not None}


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
