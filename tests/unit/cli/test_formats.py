"""Sizes, times and tables as a person reads them."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, strategies as st
from rich.console import Console

from agent_memory_core.cli import formats


@pytest.mark.parametrize(
    ("nbytes", "said"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (1.61 * 2**20, "1.61 MiB"),
        (300 * 2**20, "300 MiB"),
        (20 * 2**30, "20 GiB"),
        (5 * 2**50, "5120 TiB"),
    ],
)
def test_sizes(nbytes: float, said: str) -> None:
    assert formats.size(nbytes) == said


@given(st.floats(0, 2**60))
def test_a_size_is_short_and_near_the_bytes(nbytes: float) -> None:
    number, unit = formats.size(nbytes).split()
    assert len(formats.size(nbytes)) <= 12
    assert float(number) * 1024 ** formats._UNITS.index(unit) == pytest.approx(nbytes, rel=0.006, abs=0.5)


@pytest.mark.parametrize(
    ("age", "said"),
    [
        (-5, "just now"),
        (0, "just now"),
        (61, "1 min ago"),
        (7300, "2 h ago"),
        (86400, "1 day ago"),
        (86400 * 59, "59 days ago"),
    ],
)
def test_ages(age: float, said: str) -> None:
    assert formats.ago(1_000_000_000 - age, 1_000_000_000) == said


def test_what_is_long_ago_has_a_date() -> None:
    assert formats.ago(1_000_000_000, 1_100_000_000) == formats.moment(1_000_000_000)[:10]


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.0861, "86 ms"), (0.9, "900 ms"), (2.94, "2.9 s"), (75.2, "75 s")]
)
def test_durations(seconds: float, said: str) -> None:
    assert formats.duration(seconds) == said


def test_a_table_of_long_names_fits_eighty_columns_and_loses_nothing() -> None:
    name, model = "a-session-of-a-user-" * 5, "mlx-community/" + "Llama-3.1-70B-Instruct-" * 3
    rows = formats.table("session", "namespace", "model", "last use", "tokens", "size", right=("size",))
    rows.add_row(name, "default", model, "59 days ago", "131,072", "999 MiB")
    text = io.StringIO()
    Console(file=text, width=80).print(rows)
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in text.getvalue()
    letters = [sum(map(text.getvalue().count, letter)) for letter in "abcdefghijklmnopqrstuvwxyz"]
    said = "sessionnamespacemodellast usetokenssize" + name + "default" + model + "days ago" + "MiB"
    assert letters == [said.count(letter) for letter in "abcdefghijklmnopqrstuvwxyz"]


@dataclass
class Thing:
    path: Path
    created: float
    key: bytes


def test_json_has_moments_paths_and_keys(capsys: pytest.CaptureFixture[str]) -> None:
    thing = Thing(Path("/a"), 0.0, b"\x0f")
    formats.print_json(formats.with_moments([thing], "created"))
    found = json.loads(capsys.readouterr().out)
    assert found == [{"path": "/a", "created": "1970-01-01T00:00:00+00:00", "key": "0f"}]
