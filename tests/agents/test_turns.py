"""Streams and coroutines: a turn is written down when it has ended, and its agent is free when nobody reads it."""

from __future__ import annotations

import asyncio
import gc

import pytest
from agents.conftest import PROMPT, OpenManager

from agent_memory_core import Delta, Message
from agent_memory_core.agents import AgentNotFound, PersistentAgentManager

TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}


@pytest.fixture
def manager(open_manager: OpenManager) -> PersistentAgentManager:
    manager = open_manager(timeout=5.0)
    manager.create_agent("ada", "technical", PROMPT)
    return manager


def said(manager: PersistentAgentManager) -> list[str]:
    return [message["content"] for message in manager.agents["ada"].conversation_history]


def test_a_stream_gives_the_answer_and_then_its_report(manager: PersistentAgentManager) -> None:
    with manager.stream("ada", "Hello.", 6) as stream:
        text = "".join(delta.text for delta in stream)
    assert stream.report is not None
    assert stream.report == manager.agents["ada"].last_report
    assert said(manager) == ["Hello.", text]


def test_a_stream_that_nobody_holds_any_more_frees_its_agent(manager: PersistentAgentManager) -> None:
    stream = manager.stream("ada", "Hello.", 500)
    next(stream)
    del stream
    gc.collect()
    manager.generate("ada", "Again.", 2)
    assert said(manager)[0] == "Again."


def test_what_a_tool_found_is_said_as_a_message(manager: PersistentAgentManager) -> None:
    manager.generate("ada", "Look for it.", 4, tools=[TOOL])
    manager.generate("ada", Message("tool", "It is in the cellar.", "find", tool_call_id="c1"), 4)
    assert [message["role"] for message in manager.agents["ada"].conversation_history][2] == "tool"


async def test_coroutines_take_turns_too(manager: PersistentAgentManager) -> None:
    answers = await asyncio.gather(*(manager.agenerate("ada", f"Question {n}.", 4) for n in range(4)))
    history = manager.agents["ada"].conversation_history
    assert [message["role"] for message in history] == ["user", "assistant"] * 4
    assert sorted(answers) == sorted(message["content"] for message in history[1::2])
    assert (await manager.asave_agent("ada")).persisted
    with pytest.raises(AgentNotFound):
        await manager.agenerate("nobody", "Hello.")


async def test_a_coroutine_that_is_cancelled_frees_its_agent(manager: PersistentAgentManager) -> None:
    async with await manager.astream("ada", "Hello.", 500) as stream:
        await anext(stream)
        waiting = asyncio.create_task(manager.agenerate("ada", "Waits.", 2))
        await asyncio.sleep(0.05)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    await manager.agenerate("ada", "Again.", 2)
    assert said(manager)[0] == "Again."


async def test_whoever_runs_the_request_himself_tells_what_is_answered(
    manager: PersistentAgentManager,
) -> None:
    turn = await manager.abegin_turn("ada", "Hello.", max_tokens=4)
    answer = manager.memory.chat(turn.request, turn.key)
    assert said(manager) == []
    assert turn.add(Delta(text=answer.text, report=answer.report)) is answer.report
    await turn.afinish(answer.report)
    assert said(manager) == ["Hello.", answer.text]
    given_up = manager.begin_turn("ada", "And now?")
    given_up.give_up()
    assert len(said(manager)) == 2
    assert manager.generate("ada", "Again.", 4)
