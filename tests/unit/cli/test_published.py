"""The figures of others that `agent-memory bench` shows: complete, narrow, and marked as not measured here."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from agent_memory_core.cli.published import MILLISECONDS, NOTICE, published, published_rows, published_table


def test_each_row_is_in_seconds_and_named_as_those_of_the_own_machine() -> None:
    rows = {(row["model"], row["tokens"]): row for row in published_rows()}
    assert len(rows) == sum(len(lengths) for lengths in MILLISECONDS.values()) == 9
    row = rows["Gemma 3 12B", 4096]
    assert (row["cold"], row["resumed"], row["hot"]) == (15.736, 0.577, 0.719)
    assert row["cold / resumed"] == pytest.approx(27.3, abs=0.05)


def test_the_table_fits_a_terminal_of_80_columns() -> None:
    text = io.StringIO()
    Console(file=text, width=80).print(published_table())
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert any("DeepSeek-Coder-V2-Lite" in line and "16,384" in line for line in lines)


def test_nobody_takes_them_for_measured() -> None:
    assert "not measured here" in NOTICE
    told = published()
    assert told["measured_here"] is False
    assert "M4 Pro" in told["hardware"]
    assert told["source"] in NOTICE
