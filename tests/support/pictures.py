"""Makes the pictures of the pages that the documentation shows: ``make pictures``, or this module with their names."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from support import http_server
from support.browser import DESKTOP, PHONE, Tab, browser
from support.http_server import wait_until

from agent_memory_core import AgentMemory
from agent_memory_core.demos import pages

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


# The pages of Streamlit


def dilemma_page(opened: Any, folder: Path) -> None:
    """The dilemma after all phases, the engine killed after the second one."""

    def act(tab: Tab) -> None:
        _press(tab, "Run Room A")
        _press(tab, "Run Room B")
        _press(tab, "Kill the engine")
        _press(tab, "Run all")
        tab.page.get_by_text("What each gets").wait_for(timeout=LONG)

    _streamlit(opened, folder, "dilemma", act)


def experts_page(opened: Any, folder: Path) -> None:
    """The experts after two questions, a kill and a third one."""

    def act(tab: Tab) -> None:
        tab.page.get_by_role("combobox", name="Who answers").click()
        tab.page.get_by_role("option", name="tides").click()
        _press(tab, "Ask")
        _press(tab, "Ask")
        _press(tab, "Kill the engine")
        _press(tab, "Ask")
        tab.page.get_by_text("after a kill, median of 1").wait_for(timeout=LONG)

    _streamlit(opened, folder, "experts", act)


def talk_page(opened: Any, folder: Path) -> None:
    """A session with words, a whisper and a vote."""

    def act(tab: Tab) -> None:
        _press(tab, "Begin")
        tab.page.get_by_label("Your words, which all hear").fill("My name is Ada.")
        _press(tab, "Say it")
        _press(tab, "A round")
        tab.page.get_by_label("Words that only these two know of").fill("The code of the garage is 4821.")
        _press(tab, "Whisper")
        _press(tab, "A round")
        tab.page.get_by_label("Your vote, if you have one").fill("sea")
        _press(tab, "Vote")

    _streamlit(opened, folder, "talk", act)


def models_page(opened: Any, folder: Path) -> None:
    """The models after each was asked once: the third one had to make room."""

    def act(tab: Tab) -> None:
        for name in ("planner", "writer", "critic"):
            tab.page.get_by_role("combobox", name="Model").click()
            tab.page.get_by_role("option", name=name).click()
            _press(tab, "Ask")

    _streamlit(opened, folder, "models", act)


def stored_page(opened: Any, folder: Path) -> None:
    """What is stored after a phase of the dilemma."""

    def act(tab: Tab) -> None:
        tab.page.get_by_role("link", name="Prisoner's dilemma").click()
        _settle(tab)
        _press(tab, "Run Room A")
        _press(tab, "Run Room B")
        tab.page.get_by_role("link", name="What is stored").click()
        tab.page.get_by_text("The largest ones").wait_for(timeout=LONG)
        _press(tab, "Pin")

    _streamlit(opened, folder, "stored", act)


LONG = 120_000
"""Milliseconds that a page may take."""


def _press(tab: Tab, label: str) -> None:
    """Press a button and wait until the page has done what it does."""
    tab.page.get_by_role("button", name=label, exact=True).first.click(timeout=LONG)
    _settle(tab)


def _settle(tab: Tab) -> None:
    tab.page.wait_for_timeout(400)
    tab.page.locator("[data-testid=stApp][data-test-script-state=notRunning]").wait_for(timeout=LONG)
    tab.page.wait_for_timeout(400)


def _streamlit(opened: Any, folder: Path, name: str, act: Callable[[Tab], None]) -> None:
    port = free_port()
    environ = {
        **os.environ,
        "AGENT_MEMORY_CACHE_DIR": str(folder / "caches"),
        "AGENT_MEMORY_MIN_FREE_MB": "0",
    }
    with subprocess.Popen(pages.command(port), stdout=subprocess.DEVNULL, env=environ) as server:
        try:
            tab = Tab(opened)
            wait_until(lambda: answers(port))
            # The dilemma is where the pages begin.
            tab.page.goto(f"http://127.0.0.1:{port}/{name.replace('dilemma', '')}")
            _settle(tab)
            act(tab)
            tab.page.mouse.move(0, 0)
            for suffix, size in (("", DESKTOP), ("-phone", PHONE)):
                _whole(tab, size, DOCS / f"{name}{suffix}.png")
            assert tab.complaints == [], tab.complaints
        finally:
            server.terminate()


def _whole(tab: Tab, size: tuple[int, int], path: Path) -> None:
    """A picture of all that can be scrolled: Streamlit scrolls a part of the page, and not the page."""
    tab.page.set_viewport_size({"width": size[0], "height": size[1]})
    tab.page.wait_for_timeout(800)
    height = tab.page.evaluate("document.querySelector('[data-testid=stMain]').scrollHeight")
    tab.page.set_viewport_size({"width": size[0], "height": max(size[1], height)})
    tab.page.wait_for_timeout(800)
    tab.picture(path)


def free_port() -> int:
    """A port on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


def answers(port: int) -> bool:
    """Whether the pages are served at a port."""
    try:
        return httpx.get(f"http://127.0.0.1:{port}/_stcore/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


PAGES: dict[str, Callable[[Any, Path], None]] = {
    "server": server_page,
    "dilemma": dilemma_page,
    "experts": experts_page,
    "talk": talk_page,
    "models": models_page,
    "stored": stored_page,
}


def main(names: list[str]) -> None:
    """Make the pictures of these pages, or of all."""
    with browser() as opened:
        for name in names or PAGES:
            with tempfile.TemporaryDirectory(prefix="agent-memory-pictures-") as folder:
                PAGES[name](opened, Path(folder))
            print(name)


if __name__ == "__main__":
    main(sys.argv[1:])
