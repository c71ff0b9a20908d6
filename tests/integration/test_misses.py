"""Why a turn was cold: only where something that was there before had to be computed again, and where it differs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from support.json_schemas import SCHEMAS, tool

from agent_memory_core import AgentMemory, ChatRequest, Message, SamplingParams, SessionKey, TurnReport

SYSTEM = Message("system", "You are careful and remember what people say. " * 8)
ADA, TOM = (Message("user", f"My name is {name}. Who am I?") for name in ("Ada", "Tom"))
TOOLS = (tool("add", SCHEMAS["array"]), tool("find", SCHEMAS["string"]))
Ask = Callable[..., TurnReport]


@pytest.fixture(scope="module")
def memory() -> Iterator[AgentMemory]:
    with AgentMemory(cache_dir=None, memory_budget_mb=64) as opened:
        yield opened


@pytest.fixture
def ask(memory: AgentMemory, request: pytest.FixtureRequest) -> Ask:
    """Asks in a session of this test."""

    def asked(*messages: Message, lane: str = "", **more: Any) -> TurnReport:
        wanted = ChatRequest(messages, sampling=SamplingParams(max_tokens=6, temperature=0), **more)
        return memory.chat(wanted, SessionKey(request.node.name, lane=lane)).report

    return asked


def answer(memory: AgentMemory, session: str, *messages: Message, **more: Any) -> Message:
    wanted = ChatRequest(messages, sampling=SamplingParams(max_tokens=6, temperature=0), **more)
    return Message("assistant", memory.chat(wanted, SessionKey(session)).text)


def test_what_was_all_reused_misses_nothing(memory: AgentMemory, ask: Ask, request: Any) -> None:
    assert ask(SYSTEM, ADA).miss_reason == "new"
    said = answer(memory, request.node.name, SYSTEM, ADA)
    turns: dict[str, Sequence[Message]] = {
        "the same again": (SYSTEM, ADA),
        "another question": (SYSTEM, TOM),
        "the next turn": (SYSTEM, ADA, said, TOM),
        "the next turn again": (SYSTEM, ADA, said, TOM),
        "an edit of the last message": (SYSTEM, ADA, said, ADA),
        "back to the first": (SYSTEM, ADA),
        "one message less": (SYSTEM,),
    }
    for name, messages in turns.items():
        report = ask(*messages)
        assert (report.miss_reason, report.miss) == ("", None), name
        assert report.usage.cache_read > 0, name
    first = ask(Message("system", "I have a prompt of my own."), ADA, lane="another")
    assert (first.miss_reason, first.lane) == ("", "another")
    assert set(memory.stats().misses) == {"new"}


DIFFERENCES: dict[str, tuple[Sequence[Message], dict[str, Any], str, int | None, str, str]] = {
    "the system prompt": (
        (Message("system", "It is 12:01. " + SYSTEM.content), ADA, Message("assistant", "Ada."), TOM),
        {},
        "system",
        0,
        "You are",
        "It is",
    ),
    "an earlier message": (
        (SYSTEM, Message("user", "My name is Eva. Who am I?"), Message("assistant", "Ada."), TOM),
        {},
        "messages",
        1,
        "Ada. Who",
        "Eva. Who",
    ),
    "a message that is gone": (
        (SYSTEM, Message("assistant", "Ada."), TOM),
        {},
        "messages",
        1,
        "",
        "",
    ),
    "the tools": (
        (SYSTEM, ADA, Message("assistant", "Ada."), TOM),
        {"tools": TOOLS[::-1]},
        "tools",
        None,
        "",
        "",
    ),
}


@pytest.mark.parametrize("what", DIFFERENCES)
def test_the_first_difference_is_named(memory: AgentMemory, ask: Ask, request: Any, what: str) -> None:
    messages, more, part, index, before, now = DIFFERENCES[what]
    known = {"tools": TOOLS} if more else {}
    ask(SYSTEM, ADA, **known)
    report = ask(*messages, **more)
    assert report.miss_reason == "diverged"
    assert report.miss is not None
    assert report.miss.part == part
    if part != "tools":
        assert report.miss.message == index
    assert report.miss.before.startswith(before)
    assert report.miss.now.startswith(now)
    assert report.miss.before[:1] != report.miss.now[:1]
    assert "Ada" not in repr(report), "the conversation is not in what programs log"


def test_an_answer_in_other_words_is_the_templates(memory: AgentMemory, ask: Ask, request: Any) -> None:
    said = answer(memory, request.node.name, SYSTEM, ADA)
    other = Message("assistant", f"No. {said.content}")
    report = ask(SYSTEM, ADA, other, TOM)
    assert report.miss_reason == "template"
    assert report.miss is not None
    assert (report.miss.part, report.miss.message) == ("messages", 2)


def test_a_lane_that_is_cold_twice_is_warned_of_once_and_without_its_text(
    ask: Ask, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "agent_memory"):
        for minute in range(10, 14):
            ask(Message("system", f"12:{minute} is the time. {SYSTEM.content}"), ADA)
    (record,) = [r for r in caplog.records if "computed anew" in r.message]
    assert "system, message 0" in record.message
    assert "clock" in record.message
    assert not [word for word in ("12", "careful", "Ada") if word in record.message]
