"""A server whose turns cannot be saved says so, answers them all the same, and notices when that is over."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from support import http_server
from support.http_server import wait_until

from agent_memory_core import AgentMemory
from agent_memory_core.engine.block_io import MAX_PENDING, BlockWriter
from agent_memory_core.engine.disk_watch import DiskWatch
from agent_memory_core.engine.model_runner import ModelRunner
from agent_memory_core.server import health
from agent_memory_core.storage.record_files import RecordFiles

CHAT = "/v1/chat/completions"


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[AgentMemory]:
    with AgentMemory(cache_dir=tmp_path, memory_budget_mb=128, min_free_mb=0) as opened:
        yield opened


@pytest.fixture
def client(memory: AgentMemory) -> Iterator[httpx.Client]:
    with http_server.serve(memory) as server, server.http() as http:
        yield http


def ask(client: httpx.Client, session: str) -> None:
    """A turn that is answered, whatever its disk says."""
    body: dict[str, Any] = {"messages": [{"role": "user", "content": f"I am {session}. " * 40}]}
    answer = client.post(CHAT, json=body | {"max_tokens": 2, "session_id": session})
    assert answer.status_code == 200, answer.text


def reason(client: httpx.Client) -> str:
    answer = client.get("/health/ready")
    return "" if answer.status_code == 200 else str(answer.json()["reason"])


def break_disk(patch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    patch.setattr(RecordFiles, "_write_tmp", refuse)


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EIO])
def test_a_disk_that_takes_nothing_makes_a_server_unready_until_a_turn_is_saved(
    client: httpx.Client, memory: AgentMemory, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    ask(client, "before")
    assert (reason(client), memory.save_error) == ("", None)
    with monkeypatch.context() as patch:
        break_disk(patch, number)
        ask(client, "lost")
        assert (reason(client), memory.save_error is None) == ("store_unwritable", False)
        ask(client, "lost as well")
        assert reason(client) == "store_unwritable"
        assert client.get("/health/live").status_code == 200
    ask(client, "after")
    assert (reason(client), memory.save_error) == ("", None)


def test_a_disk_that_does_not_answer_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, is_asked, write = threading.Event(), threading.Event(), RecordFiles._write_tmp

    def hang(files: RecordFiles, views: Any) -> Path:
        is_asked.set()
        answers.wait(60)
        return write(files, views)

    monkeypatch.setattr(RecordFiles, "_write_tmp", hang)
    monkeypatch.setattr(BlockWriter.__init__, "__defaults__", (MAX_PENDING, 0.05))
    memory = AgentMemory(cache_dir=tmp_path, memory_budget_mb=128, min_free_mb=0)
    with memory, http_server.serve(memory) as server, server.http() as client:
        ask(client, "unsaved")
        assert is_asked.is_set()
        wait_until(lambda: reason(client) == "store_unwritable")
        answers.set()
        wait_until(lambda: reason(client) == "")


def test_it_is_ready_again_although_no_turn_comes_any_more(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DiskWatch, "FIRST", 0.01)
    monkeypatch.setattr(DiskWatch, "LONGEST", 0.01)
    with monkeypatch.context() as patch:
        break_disk(patch, errno.EROFS)
        ask(client, "lost")
        assert reason(client) == "store_unwritable"
    wait_until(lambda: reason(client) == "")


def test_a_budget_without_room_and_no_store_at_all_are_what_was_asked_for(tmp_path: Path) -> None:
    small = AgentMemory(cache_dir=tmp_path / "small", disk_budget_mb=1, memory_budget_mb=128, min_free_mb=0)
    with small, http_server.serve(small) as server, server.http() as client:
        for number in range(100):
            ask(client, f"s{number}")
            if small.stats().unsaved_turns:
                break
            small.pin(f"s{number}")
        assert small.stats().unsaved_turns == 1
        assert reason(client) == ""
    without = AgentMemory(cache_dir=None, memory_budget_mb=128)
    with without, http_server.serve(without) as server, server.http() as client:
        ask(client, "nowhere")
        assert (reason(client), without.save_error) == ("", None)


def test_an_engine_that_is_stuck_is_told_without_it(
    client: httpx.Client, memory: AgentMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on, decode = threading.Event(), ModelRunner.decode

    def stuck(*given: Any) -> Any:
        goes_on.wait(60)
        return decode(*given)

    monkeypatch.setattr(health, "STALLED", 0.05)
    monkeypatch.setattr(ModelRunner, "decode", stuck)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, client, "waits")
        wait_until(lambda: reason(client) == "engine_stalled")
        goes_on.set()
        asked.result()
    wait_until(lambda: reason(client) == "")
