"""The page at /ui in a real Chromium, against a real server."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support import browser, http_server
from support.browser import PHONE, Tab
from support.http_server import Running, wait_until

from agent_memory_core import AgentMemory
from agent_memory_core.server.ui import FOLDER, HEADERS

ADA = {"role": "user", "content": "My name is Ada."}
CHAT: dict[str, Any] = {"messages": [ADA], "max_tokens": 4, "temperature": 0}
LIST = {"type": "array", "items": {"enum": [1, 2]}, "minItems": 3000, "maxItems": 3000}
FORM = {"type": "json_schema", "json_schema": {"name": "long", "schema": LIST}}
LONG = CHAT | {"max_tokens": 8000, "stream": True, "response_format": FORM, "session_id": "busy"}


@pytest.fixture(scope="module")
def run(memory: AgentMemory) -> Iterator[Running]:
    with http_server.serve(memory, admin_key="root") as running:
        yield running


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser.browser() as opened:
        yield opened


@pytest.fixture
def tab(chromium: Any, run: Running) -> Iterator[Tab]:
    opened = Tab(chromium)
    enter(opened, run)
    yield opened
    opened.page.close()
    assert opened.complaints == []
    assert opened.asked == {run.url.split("/")[2]}


def enter(tab: Tab, run: Running) -> None:
    tab.page.goto(f"{run.url}/ui")
    tab.page.fill("#key", "root")
    tab.page.click("text=Open")
    tab.page.wait_for_selector(".tile .value")


def ask(client: httpx.Client, session: str, *messages: dict[str, str]) -> None:
    answer = client.post("/v1/chat/completions", json=CHAT | {"messages": [*messages], "session_id": session})
    assert answer.status_code == 200


def row(tab: Tab, session: str) -> Any:
    return tab.page.locator("#sessions tbody tr", has=tab.page.get_by_text(session, exact=True))


def test_every_file_comes_with_a_policy_and_nothing_is_inline(server: Running) -> None:
    with server.http() as client:
        assert client.get("/ui").headers["location"] == "ui/"
        for path in ("", *(str(file.relative_to(FOLDER)) for file in FOLDER.rglob("*.*"))):
            answer = client.get(f"/ui/{path}")
            assert answer.status_code == 200, path
            assert {name: answer.headers[name] for name in HEADERS} == HEADERS, path
        assert client.get("/ui/../../gate.py").status_code == 404
        assert client.get("/ui/%2e%2e/gate.py").status_code == 404
    text = (FOLDER / "index.html").read_text()
    assert "<script>" not in text
    assert "style=" not in text
    assert "//" not in text


def test_the_page_needs_no_key_of_clients_and_shows_nothing_without_the_admins(
    memory: AgentMemory, chromium: Any
) -> None:
    with http_server.serve(memory, admin_key="root", api_keys=("user",)) as running:
        tab = Tab(chromium)
        tab.page.goto(f"{running.url}/ui")
        tab.page.fill("#key", "user")
        tab.page.click("text=Open")
        tab.page.wait_for_selector(".error:visible")
        assert "X-Admin-Key" in tab.page.locator(".error:visible").inner_text()
        assert not tab.page.locator("main").is_visible()
        tab.page.close()
        assert tab.complaints == []


def test_what_the_page_shows_is_what_the_server_counts(tab: Tab, run: Running) -> None:
    with run.http(**{"X-Admin-Key": "root"}) as client:
        ask(client, "ada", ADA)
        ask(
            client,
            "ada",
            ADA,
            {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": "My name?"},
        )
        row(tab, "ada").wait_for()
        tab.page.locator("#plot .u-legend .u-series").nth(3).wait_for()
        run.memory.flush()
        stats = client.get("/admin/stats").json()
        (session,) = (s for s in client.get("/admin/caches").json()["sessions"] if s["session_id"] == "ada")
        last = client.get("/admin/turns").json()["turns"][-1]
    assert session["last_turn"] == last
    assert (last["session_id"], last["hit_tier"]) == ("ada", "hot")
    note = f"{stats['cache_read']:,} of {stats['prompt_tokens']:,} prompt tokens"
    tab.page.get_by_text(note, exact=True).wait_for()
    tab.page.reload()
    tab.page.wait_for_selector(".tile .value")
    cells = row(tab, "ada").locator("td").all_inner_texts()
    assert cells[1] == f"{session['tokens']:,}"
    assert cells[3] == "hot"
    assert cells[4] == (last["miss_reason"] or "\u2013")


def test_a_session_is_pinned_forked_and_forgotten_at_the_second_press(tab: Tab, run: Running) -> None:
    def named() -> dict[str, bool]:
        return {info.session_id: info.pinned for info in run.memory.sessions()}

    with run.http() as client:
        ask(client, "bert", ADA)
    row(tab, "bert").get_by_text("Pin", exact=True).click()
    row(tab, "bert").get_by_text("Unpin", exact=True).wait_for()
    assert named()["bert"]
    row(tab, "bert").get_by_text("Unpin", exact=True).click()
    row(tab, "bert").get_by_text("Pin", exact=True).wait_for()
    assert not named()["bert"]
    row(tab, "bert").get_by_text("Fork", exact=True).click()
    row(tab, "bert-2").wait_for()
    row(tab, "bert").get_by_text("Forget", exact=True).click()
    assert "bert" in named()
    row(tab, "bert").get_by_text("Really?", exact=True).click()
    row(tab, "bert").wait_for(state="detached")
    assert {"bert", "bert-2"} & named().keys() == {"bert-2"}


def test_a_request_in_flight_is_shown_and_cancelled(tab: Tab, run: Running) -> None:
    ended: list[str] = []

    def read() -> None:
        with run.http() as client, client.stream("POST", "/v1/chat/completions", json=LONG) as stream:
            ended.extend(line for line in stream.iter_lines() if line)

    reader = threading.Thread(target=read)
    reader.start()
    live = tab.page.locator("#requests tbody tr")
    live.get_by_text("answer").wait_for()
    assert live.locator("td").nth(1).inner_text() == "busy"
    assert live.locator("progress").get_attribute("value") == "1"
    live.get_by_text("Cancel").click()
    live.wait_for(state="detached")
    reader.join()
    assert '"error"' in ended[-1]


def test_sessions_are_found_by_a_part_of_their_name(tab: Tab, run: Running) -> None:
    with run.http() as client:
        ask(client, "find-me", ADA)
        ask(client, "other", ADA)
    row(tab, "other").wait_for()
    tab.page.fill("input[type=search]", "FIND")
    row(tab, "other").wait_for(state="detached")
    assert row(tab, "find-me").is_visible()


def test_the_page_fits_a_phone_and_says_when_the_server_is_gone(chromium: Any, tmp_path: Path) -> None:
    memory = AgentMemory(cache_dir=tmp_path, memory_budget_mb=128, min_free_mb=0)
    tab = Tab(chromium, PHONE)
    with memory, http_server.serve(memory, admin_key="root") as running:
        with running.http() as client:
            ask(client, "a-session-with-a-name-as-long-as-those-that-clients-make-up-0123456789", ADA)
        enter(tab, running)
        wait_until(lambda: tab.page.locator("#sessions tbody tr").count() == 1)
        assert tab.fits()
    tab.page.locator("main").get_by_text("The server does not answer.").wait_for()
    tab.page.close()
