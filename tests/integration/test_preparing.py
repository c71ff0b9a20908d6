"""Long requests are prepared beside the turns in flight: nobody waits for another's text. The tokens are the same."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent_memory_core import (
    AgentMemory,
    ChatRequest,
    ChatStream,
    EngineStopped,
    InvalidRequest,
    Message,
    PromptTooLong,
    TurnReport,
)
from agent_memory_core.engine import preparing
from agent_memory_core.engine.preparing import Preparation, size

SHORT = "Tell me of Tom."
TALK = "Ada has 12 boxes, and Tom has 7. " * 36


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[AgentMemory]:
    """One for which a text of 1,000 characters is long."""
    monkeypatch.setattr(preparing, "LONG", 1000)
    with AgentMemory(cache_dir=tmp_path / "store", min_free_mb=0, block_tokens=64) as memory:
        yield memory


class Gate:
    """Holds up everything that is prepared apart, until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()
        prepare = Preparation.prepare

        def held(preparation: Preparation, request: ChatRequest, *known: Any, **how: Any) -> Any:
            if size(request) >= preparing.LONG:
                self.entered.set()
                assert self.opened.wait(60)
            return prepare(preparation, request, *known, **how)

        monkeypatch.setattr(Preparation, "prepare", held)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


def last(stream: ChatStream) -> TurnReport:
    (report,) = [delta.report for delta in stream if delta.report is not None]
    return report


def wait_until_idle(memory: AgentMemory) -> None:
    deadline = time.monotonic() + 60
    while (stats := memory.stats()).running + stats.waiting and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (stats.running, stats.waiting, stats.memory.reserved_bytes) == (0, 0, 0)


def test_a_conversation_of_long_turns_is_the_same_as_one_of_short_turns(tmp_path: Path) -> None:
    """The same tokens, reused as far, and the same answers."""
    seen: list[list[tuple[Any, ...]]] = []
    for number, long in enumerate((10, 10**9)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(preparing, "LONG", long)
            with AgentMemory(cache_dir=tmp_path / str(number), min_free_mb=0, block_tokens=64) as memory:
                messages: list[Message] = []
                turns: list[tuple[Any, ...]] = []
                for text in (TALK, SHORT, TALK):
                    messages.append(Message("user", text))
                    result = memory.chat(messages, "s", max_tokens=6, temperature=0)
                    usage = result.report.usage
                    turns.append(
                        (result.token_ids, usage.prompt_tokens, usage.cache_read, result.report.miss_reason)
                    )
                    messages.append(Message("assistant", result.text))
                seen.append(turns)
    assert seen[0] == seen[1]
    assert all(turn[2] > 0 for turn in seen[0][1:])


def test_others_are_answered_while_a_long_text_is_prepared(memory: AgentMemory, gate: Gate) -> None:
    memory.chat(SHORT, max_tokens=2)
    stream = memory.chat(TALK, "long", stream=True, max_tokens=2)
    assert gate.entered.wait(60)
    assert memory.chat(SHORT, "short", max_tokens=2).report.persisted
    assert memory.stats().waiting == 1
    gate.opened.set()
    assert last(stream).persisted


def test_a_long_turn_is_withdrawn_while_it_is_prepared(memory: AgentMemory, gate: Gate) -> None:
    memory.load()
    stream = memory.chat(TALK, "long", stream=True, max_tokens=2)
    assert gate.entered.wait(60)
    stream.close()
    wait_until_idle(memory)
    gate.opened.set()
    assert memory.chat(SHORT, "long", max_tokens=2).report.persisted
    assert memory.stats().cancelled == 1


def test_closing_ends_a_turn_that_is_prepared(memory: AgentMemory, gate: Gate) -> None:
    memory.load()
    stream = memory.chat(TALK, stream=True, max_tokens=2)
    assert gate.entered.wait(60)
    closing = threading.Thread(target=memory.close)
    closing.start()
    with pytest.raises(EngineStopped):
        last(stream)
    gate.opened.set()
    closing.join(60)
    assert not closing.is_alive()


def test_what_is_wrong_with_a_long_request_is_told_to_its_own_caller(memory: AgentMemory) -> None:
    with pytest.raises(InvalidRequest, match="not valid Unicode"):
        memory.chat(TALK + "\ud800")
    limit = memory.context_length
    with pytest.raises(PromptTooLong, match=rf"has \d+ tokens and the model's context holds {limit}"):
        memory.chat("a b c " * limit)
    wait_until_idle(memory)
    assert memory.chat(TALK, max_tokens=1).token_ids


def test_a_text_that_can_hardly_fit_is_refused_by_its_beginning(
    memory: AgentMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokenising all of it would take seconds, and the answer would be the same."""
    limit, tokenized = memory.context_length, []
    template = memory._thread.call(lambda engine: engine.preparer.own.template).result()
    tokenize = type(template.tokenizer).tokenize

    def noted(self: Any, text: str) -> list[int]:
        tokenized.append(len(text))
        return tokenize(self, text)

    monkeypatch.setattr(type(template.tokenizer), "tokenize", noted)
    with pytest.raises(PromptTooLong, match=rf"more than \d+ tokens .* context holds {limit}"):
        memory.chat("a b c d e f g h " * 10 * limit)
    assert max(tokenized) == 8 * limit


def test_counting_tokens_does_not_wait_for_the_engine(memory: AgentMemory) -> None:
    expected = memory.count_tokens(TALK)
    assert expected == memory.chat(TALK, max_tokens=1).report.usage.prompt_tokens
    ids = memory.encode(TALK)
    busy = threading.Event()
    blocked = memory._thread.call(lambda engine: busy.wait(60))
    try:
        assert memory.count_tokens(TALK) == expected
        assert memory.encode(TALK) == ids
        assert not blocked.done()
    finally:
        busy.set()
    assert blocked.result()


def test_a_tokenizer_that_cannot_be_copied_does_its_work_in_the_engine(
    memory: AgentMemory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = memory.chat(TALK, max_tokens=4, temperature=0).token_ids
    memory.close()

    def refuses(thing: Any, *more: Any) -> Any:
        raise TypeError("cannot pickle 'builtins.CoreBPE' object")

    with AgentMemory(cache_dir=None) as other:
        other.load()
        monkeypatch.setattr(copy, "deepcopy", refuses)
        assert other.chat(TALK, max_tokens=4, temperature=0).token_ids == expected
        assert other.count_tokens(SHORT) > 0
    assert sum("cannot be copied" in text for text in caplog.messages) == 1
