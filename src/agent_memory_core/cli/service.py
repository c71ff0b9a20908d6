"""`agent-memory service`: the server as a service of the user's session, which launchd or systemd keeps running."""

from __future__ import annotations

import os
import plistlib
import sys
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from agent_memory_core.cli.options import out

app = typer.Typer(help="The server as a service.", no_args_is_help=True)

LABEL = "agent-memory"


class Manager(StrEnum):
    """Who keeps the service running."""

    LAUNCHD = "launchd"
    SYSTEMD = "systemd"


class Service(NamedTuple):
    """What is run, and where its file ``.env`` is."""

    command: list[str]
    folder: Path


@app.callback()
def _group() -> None:
    """Keeps `install` a command of its own while it is the only one."""


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def install(
    options: typer.Context,
    folder: Annotated[
        Path | None, typer.Option(help="The working directory, with the settings in .env [default: home].")
    ] = None,
    manager: Annotated[Manager | None, typer.Option(help="[default: the system's own]")] = None,
    show: Annotated[bool, typer.Option("--print", help="Show the file instead of writing it.")] = False,
) -> None:
    """Write the file of a service that runs `agent-memory serve`; all other options are those of that command."""
    manager = manager or (Manager.LAUNCHD if sys.platform == "darwin" else Manager.SYSTEMD)
    command = [sys.executable, "-m", "agent_memory_core", "serve", *options.args]
    text = _WRITERS[manager](Service(command, (folder or Path.home()).resolve()))
    if show:
        typer.echo(text.rstrip())
        return
    path = Path.home() / _PLACES[manager]
    path.parent.mkdir(parents=True, exist_ok=True)
    # It may hold a path or an option that is nobody else's business.
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    out.print(f"written: {path}\nstart it with: {_STARTS[manager].format(path=path)}", soft_wrap=True)


def _launchd(service: Service) -> str:
    logs = Path.home() / "Library" / "Logs" / f"{LABEL}.log"
    job = {
        "Label": LABEL,
        "ProgramArguments": service.command,
        "WorkingDirectory": str(service.folder),
        "RunAtLoad": True,
        # Not after it ended as it should.
        "KeepAlive": {"SuccessfulExit": False},
        "ExitTimeOut": STOP_SECONDS,
        "StandardErrorPath": str(logs),
    }
    return plistlib.dumps(job, sort_keys=False).decode()


def _systemd(service: Service) -> str:
    return (
        "[Unit]\nDescription=agent-memory: one memory for all clients of a local model\n\n"
        "[Service]\n"
        f"ExecStart={_words(service.command)}\n"
        "ExecReload=/bin/kill -HUP $MAINPID\n"
        f"WorkingDirectory={str(service.folder).replace('%', '%%')}\n"
        "Restart=on-failure\n"
        f"TimeoutStopSec={STOP_SECONDS}\n"
        "KillSignal=SIGTERM\n\n"
        "[Install]\nWantedBy=default.target\n"
    )


def _words(words: Sequence[str]) -> str:
    """A command as systemd reads it: in quotes, with its own signs doubled."""
    escaped = [word.replace("\\", "\\\\").replace('"', '\\"') for word in words]
    return " ".join('"' + word.replace("%", "%%").replace("$", "$$") + '"' for word in escaped)


STOP_SECONDS = 60
"""How long the server may take to end: turns in flight get 30 seconds by default."""

_WRITERS: dict[Manager, Callable[[Service], str]] = {Manager.LAUNCHD: _launchd, Manager.SYSTEMD: _systemd}
_PLACES = {
    Manager.LAUNCHD: f"Library/LaunchAgents/{LABEL}.plist",
    Manager.SYSTEMD: f".config/systemd/user/{LABEL}.service",
}
_STARTS = {
    Manager.LAUNCHD: "launchctl bootstrap gui/$UID '{path}'",
    Manager.SYSTEMD: f"systemctl --user daemon-reload && systemctl --user enable --now {LABEL}",
}
