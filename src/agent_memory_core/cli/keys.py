"""`agent-memory keys`: the file of the keys that `agent-memory serve --api-key-file` asks for."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import tomllib
from pathlib import Path
from typing import Annotated

import typer

from agent_memory_core import InvalidSetting
from agent_memory_core.cli.options import err

app = typer.Typer(help="The keys of a server.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keeps `add` a command of its own while it is the only one."""


@app.command()
def add(
    namespace: Annotated[str, typer.Argument(help="Whose key it is: what it stores belongs to this name.")],
    file: Annotated[Path, typer.Option(help="The TOML file, which is made if it is not there.")] = Path(
        "keys.toml"
    ),
) -> None:
    """Make a key and print it. The file gets its hash only, so it is not shown again."""
    if namespace in _namespaces(file):
        raise InvalidSetting(
            f"{file} has a key of {namespace!r} already: delete its table, or choose another name."
        )
    key = secrets.token_urlsafe(32)
    # JSON's strings are TOML's basic strings.
    table = f'[{json.dumps(namespace)}]\nsha256 = "{hashlib.sha256(key.encode()).hexdigest()}"\n'
    try:
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "w") as keys:
            keys.write(table)
    except OSError as error:
        raise InvalidSetting(f"{file} cannot be written: {error}.") from error
    err.print(f"its hash is in {file}; a server that runs reads it when SIGHUP comes", soft_wrap=True)
    # Without the console's markup and its breaks, because it is copied.
    typer.echo(key)


def _namespaces(file: Path) -> set[str]:
    """Those that have a key.

    Raises:
        InvalidSetting: the file cannot be read.
    """
    try:
        return set(tomllib.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return set()
    except (OSError, ValueError) as error:
        raise InvalidSetting(f"{file} cannot be read: {error}.") from error
