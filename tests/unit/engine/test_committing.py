"""What outlasts a turn: its branch in the book at once, on disk when the writer has answered, and in one order."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.engine_driver import RecordingSink, SteppedEngine

from agent_memory_core import ChatRequest, Message, SamplingParams, SessionKey
from agent_memory_core.engine.session_book import LiveSession
from agent_memory_core.errors import StoreFull
from agent_memory_core.storage.block_store import BlockStore

pytestmark = pytest.mark.model

Open = Callable[..., SteppedEngine]
KEY = SessionKey("s")


def request(*texts: str) -> ChatRequest:
    roles = ("user", "assistant")
    messages = tuple(Message(roles[i % 2], text) for i, text in enumerate(texts))
    return ChatRequest(messages, sampling=SamplingParams(max_tokens=4))


def begun(engine: SteppedEngine, asked: ChatRequest, key: SessionKey = KEY) -> RecordingSink:
    """A turn whose answer is complete; its commit may be on its way."""
    sink = RecordingSink()
    engine.submit(asked, key, sink)
    while engine.busy:
        engine.step()
    return sink


def session(engine: SteppedEngine) -> LiveSession:
    return engine.sessions.open(engine.intake.root("default"), ("default", "s"))


def test_the_last_delta_waits_for_the_writer_and_the_next_turn_does_not(
    open_engine: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, go, commit = open_engine(tmp_path / "store"), threading.Event(), BlockStore.commit

    def slow(store: BlockStore, *arguments: Any) -> Any:
        assert go.wait(60)
        return commit(store, *arguments)

    monkeypatch.setattr(BlockStore, "commit", slow)
    first = begun(engine, request("1" * 100))
    assert not first.deltas or first.deltas[-1].report is None
    (branch,) = session(engine).branches
    assert (branch.branch_id, branch.generation) == (None, 0), "only the engine's thread may write this"
    second = begun(engine, request("1" * 100, first.text, "2"))
    assert not second.deltas or second.deltas[-1].report is None
    assert session(engine).branches == [branch], "the second goes on from the first, as it is in the book"
    go.set()
    engine.flush()
    assert first.report.persisted
    assert second.report.persisted
    assert first.report.branch_id == second.report.branch_id == branch.branch_id
    assert branch.generation == 2
    assert session(engine).pending == []
    assert session(engine).branches == [branch]


def test_a_turn_that_could_not_be_saved_says_so_and_the_next_one_is(
    open_engine: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(tmp_path / "store")

    def full(*_: Any) -> Any:
        raise StoreFull("no room")

    with monkeypatch.context() as patch:
        patch.setattr(BlockStore, "commit", full)
        lost = begun(engine, request("1" * 100))
        engine.flush()
    assert not lost.report.persisted
    assert engine.stats().unsaved_turns == 1
    saved = begun(engine, request("1" * 100, lost.text, "2"))
    engine.flush()
    assert saved.report.persisted


def test_without_a_disk_a_turn_ends_with_its_last_delta(open_engine: Open) -> None:
    engine = open_engine(None)
    sink = begun(engine, request("1" * 100))
    assert sink.report is not None
    assert not sink.report.persisted
    (branch,) = session(engine).branches
    assert branch.prompt_tokens == sink.report.usage.prompt_tokens
    assert session(engine).pending == []


def test_a_turn_of_a_session_that_was_forgotten_meanwhile_leaves_nothing(
    open_engine: Open, tmp_path: Path
) -> None:
    engine, sink = open_engine(tmp_path / "store"), RecordingSink()
    engine.submit(request("1" * 100), KEY, sink)
    engine.step()
    engine.forget(("default", "s"))
    while engine.busy:
        engine.step()
    engine.flush()
    assert sink.report is not None
    assert not sink.report.persisted
    assert session(engine).branches == []
