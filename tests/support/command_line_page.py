"""Prints docs/command-line.md from the commands themselves, as their `--help` tells of them.

python tests/support/command_line_page.py > docs/command-line.md
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import typer

from agent_memory_core.cli.main import app

HEAD = """# Command line

`agent-memory COMMAND --help` says the same as this page, which is printed by `tests/support/command_line_page.py`.

Every command that lists or shows something prints JSON with `--json`. Settings that are no options come from
[`AGENT_MEMORY_*` variables](settings.md). `agent-memory --install-completion` teaches your shell the commands, their
options and the names of stored sessions.

| exit code | meaning |
| --- | --- |
| 0 | it was done, and nothing is wrong |
| 1 | an error, one sentence on the standard error stream; or `check`, `doctor` or `models verify` found something |
| 2 | the command was misspelled |
| 130 | it was stopped with Ctrl-C |
"""

Commands = Iterator[tuple[tuple[str, ...], Any]]


def commands(group: Any = None, path: tuple[str, ...] = ()) -> Commands:
    """Every command and every group of them, with the words that call it."""
    group = typer.main.get_command(app) if group is None else group
    for name, command in getattr(group, "commands", {}).items():
        yield (*path, name), command
        yield from commands(command, (*path, name))


def page() -> str:
    """The whole page."""
    return (
        "\n".join([HEAD, *(line for path, command in commands() for line in _section(path, command))]) + "\n"
    )


def _section(path: tuple[str, ...], command: Any) -> Iterator[str]:
    is_group = hasattr(command, "commands")
    yield f"{'##' if len(path) == 1 else '###'} agent-memory {' '.join(path)}\n"
    yield f"{' '.join((command.help or '').split())}\n"
    if is_group:
        return
    arguments = " ".join(_metavar(param) for param in command.params if _is_argument(param))
    yield f"```text\nagent-memory {' '.join(path)} {arguments}{' ' if arguments else ''}[OPTIONS]\n```\n"
    rows = [_row(param, command) for param in command.params]
    if rows:
        yield "\n".join(["| option | what it is | default |", "| --- | --- | --- |", *rows]) + "\n"


def _row(param: Any, command: Any) -> str:
    names = ", ".join(f"`{name}`" for name in (*param.opts, *param.secondary_opts))
    shown = f"`{_metavar(param)}`" if _is_argument(param) else names
    default = param.default
    is_shown = default not in (None, False, ()) and not callable(default) and not _is_argument(param)
    # Square brackets would be read as the beginning of a link.
    what = re.sub(r"\[(default: [^]]*)\]", r"(\1)", param.help or "")
    return f"| {shown} | {what} | {f'`{_plain(default)}`' if is_shown else ''} |"


def _plain(default: Any) -> str:
    return str(getattr(default, "value", default))


def _is_argument(param: Any) -> bool:
    return bool(param.param_type_name == "argument")


def _metavar(param: Any) -> str:
    return str(param.metavar or param.name.upper())


if __name__ == "__main__":
    print(page(), end="")
