"""Times to the first token that others published, which `agent-memory bench` sets beside one's own.

They come from the paper of the forerunner, were taken on other hardware with other code, and are measured nowhere here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from agent_memory_core.cli.formats import duration, table

SOURCE = "arXiv 2603.04428"
HARDWARE = "Mac with an M4 Pro"

MILLISECONDS: Mapping[str, Mapping[int, tuple[int, int, int]]] = {
    "Gemma 3 12B": {1024: (3964, 475, 683), 4096: (15736, 577, 719), 16384: (74219, 795, 934)},
    "Llama 3.1 8B": {1024: (2500, 260, 412), 4096: (10235, 290, 429), 16384: (47629, 431, 526)},
    "DeepSeek-Coder-V2-Lite": {1024: (1043, 234, 345), 4096: (3970, 271, 366), 16384: (19396, 434, 490)},
}
"""Cold, resumed from disk and hot, by the tokens of the prompt."""


def published_rows() -> list[dict[str, Any]]:
    """A row for each model and length, in seconds, named as the rows of one's own."""
    return [
        {
            "model": model,
            "tokens": tokens,
            "cold": cold / 1000,
            "hot": hot / 1000,
            "resumed": resumed / 1000,
            "cold / resumed": cold / resumed,
        }
        for model, lengths in MILLISECONDS.items()
        for tokens, (cold, resumed, hot) in lengths.items()
    ]


def published() -> dict[str, Any]:
    """The figures for programs, with where they come from."""
    return {"measured_here": False, "source": SOURCE, "hardware": HARDWARE, "seconds": published_rows()}


def published_table() -> Table:
    """The figures for people. Its title says that they are somebody else's."""
    columns = ("tokens", "cold", "hot", "resumed", "cold / resumed")
    made = table("model", *columns, right=columns)
    for row in published_rows():
        times = (duration(row[name]) for name in ("cold", "hot", "resumed"))
        made.add_row(row["model"], f"{row['tokens']:,}", *times, f"{row['cold / resumed']:.1f}")
    return made


NOTICE = (
    f"Published figures, not measured here: the forerunner of this project on a {HARDWARE} ({SOURCE}). "
    "Models, machine and code are others, so compare how the times grow with the length, not the times themselves."
)
