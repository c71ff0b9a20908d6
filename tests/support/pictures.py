"""Makes the pictures of the pages that the documentation shows: ``make pictures``, or this module with their names."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support import http_server
from support.browser import DESKTOP, PHONE, Tab, browser

from agent_memory_core import AgentMemory

DOCS = Path(__file__).parents[2] / "docs" / "pictures"

BRIEF = "You are a librarian. You know where every book stands, and you say it in few words. " * 4
BOOKS = ("Emma", "Hamlet", "Ulysses", "Dracula", "Persuasion", "Macbeth")
ENDLESS = {"type": "array", "items": {"enum": [1, 2]}, "minItems": 3000, "maxItems": 3000}


def server_page(opened: Any, folder: Path) -> None:
    """The page at /ui of a server that has answered some sessions, twice, and answers one more."""
    memory = AgentMemory(cache_dir=folder, memory_budget_mb=256, min_free_mb=0)
    serving = http_server.serve(memory, admin_key="root")
    with memory, serving as running, running.http() as client:
        _talk(memory, client)
        body = _chat("Dracula", "Count!") | {
            "max_tokens": 7000,
            "stream": True,
            "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": ENDLESS}},
        }
        with client.stream("POST", "/v1/chat/completions", json=body) as stream:
            # The stream is closed when nobody holds its lines any more.
            lines = stream.iter_lines()
            next(lines)
            for name, size in (("server", DESKTOP), ("server-phone", PHONE)):
                tab = Tab(opened, size)
                tab.page.goto(f"{running.url}/ui")
                tab.page.fill("#key", "root")
                tab.page.click("text=Open")
                tab.page.wait_for_selector("#requests tbody tr")
                tab.page.wait_for_selector("#plot canvas")
                tab.page.wait_for_timeout(500)
                tab.picture(DOCS / f"{name}.png")
                tab.page.close()


def _chat(session: str, words: str) -> dict[str, Any]:
    messages = [{"role": "system", "content": BRIEF}, {"role": "user", "content": words}]
    return {"messages": messages, "session_id": session, "max_tokens": 12, "temperature": 0}


def _talk(memory: AgentMemory, client: Any) -> None:
    for book in BOOKS:
        client.post("/v1/chat/completions", json=_chat(book, f"Where is {book}?"))
    memory.flush()
    for session in BOOKS:
        memory.release(session)
    memory.pin("Emma")
    for book in (*BOOKS, *BOOKS, "Hamlet", "Emma"):
        client.post("/v1/chat/completions", json=_chat(book, f"Where is {book}?"))
    changed = _chat("Persuasion", "Who wrote it, and when?")
    changed["messages"][0]["content"] = "You sell books. " + BRIEF
    client.post("/v1/chat/completions", json=changed)


PAGES: dict[str, Callable[[Any, Path], None]] = {"server": server_page}


def main(names: list[str]) -> None:
    """Make the pictures of these pages, or of all."""
    with browser() as opened:
        for name in names or PAGES:
            with tempfile.TemporaryDirectory(prefix="agent-memory-pictures-") as folder:
                PAGES[name](opened, Path(folder))
            print(name)


if __name__ == "__main__":
    main(sys.argv[1:])
