"""How the commands print sizes, times, tables and JSON."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Collection, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import typer
from rich import box
from rich.table import Table

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def size(nbytes: float) -> str:
    """Bytes as a person reads them: "0 B", "880 B", "1.6 MiB", "20 GiB"."""
    unit = 0
    while abs(nbytes) >= 1024 and unit < len(_UNITS) - 1:
        nbytes, unit = nbytes / 1024, unit + 1
    return f"{nbytes:.0f} {_UNITS[unit]}" if unit == 0 or nbytes >= 100 else f"{nbytes:.3g} {_UNITS[unit]}"


def duration(seconds: float) -> str:
    """Seconds as a person reads them: "86 ms", "2.9 s", "75 s"."""
    return (
        f"{seconds * 1000:.0f} ms"
        if seconds < 1
        else f"{seconds:.1f} s"
        if seconds < 10
        else f"{seconds:.0f} s"
    )


def ago(then: float, now: float | None = None) -> str:
    """How long ago a moment was, both in seconds since the epoch; its day if that is more than two months."""
    age = (time.time() if now is None else now) - then
    if age < 60:
        return "just now"
    if age < 3600:
        return f"{age // 60:.0f} min ago"
    if age < 86400:
        return f"{age // 3600:.0f} h ago"
    return count(int(age // 86400), "day") + " ago" if age < 86400 * 60 else moment(then)[:10]


def moment(seconds: float) -> str:
    """A moment in seconds since the epoch, to the minute, in the machine's own time zone."""
    return datetime.fromtimestamp(seconds).isoformat(" ", "minutes")


def count(number: int, noun: str, plural: str = "") -> str:
    """A number of things: "1 session", "1,200 tokens"."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def table(*columns: str, right: Collection[str] = (), title: str | None = None) -> Table:
    """A table whose cells are folded where they are too wide for the terminal, and never cut."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title)
    for name in columns:
        made.add_column(name, justify="right" if name in right else "left", overflow="fold")
    return made


def print_json(value: Any) -> None:
    """Print a value as JSON: dataclasses as objects, moments in ISO 8601, bytes in hexadecimal."""
    # Not through the console, which breaks lines at the width of the terminal.
    typer.echo(json.dumps(value, indent=1, ensure_ascii=False, default=_plain))


def with_moments(items: Iterable[Any], *names: str) -> list[dict[str, Any]]:
    """Dataclasses as dictionaries, with the fields of these names, seconds since the epoch, as moments in UTC."""
    found = [dataclasses.asdict(item) for item in items]
    return [
        item | {name: datetime.fromtimestamp(item[name], UTC).isoformat(timespec="seconds") for name in names}
        for item in found
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, (tuple, set, frozenset)):
        return sorted(value, key=str)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return dict(value)
