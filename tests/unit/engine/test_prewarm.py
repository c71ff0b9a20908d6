"""Background work says what to start and what to withdraw, and forgets nothing that was withdrawn."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from support import made_tokenizers as made

from agent_memory_core import ChatRequest, Delta, Message, SamplingParams, SessionKey
from agent_memory_core.blocks.block import root_hash
from agent_memory_core.blocks.block_pool import BlockPool
from agent_memory_core.blocks.branch import Branch
from agent_memory_core.engine.prewarm import BackgroundPrewarm, lasting_prefix
from agent_memory_core.engine.session_book import MemorySessionBook
from agent_memory_core.text.chat_template import ChatTemplate

ROOT = root_hash({"a": "b"})
REWRITES = made.CHATML.replace("assistant\\n'", "assistant\\n<think>\\n\\n</think>\\n\\n'")
"""A prompt for an answer holds an empty think block, which history does not."""


@dataclass
class FakeSequence:
    max_tokens: int = 8
    root: bytes = ROOT


@dataclass
class EndedTurn:
    """As much of a turn as is looked at when it has ended."""

    request: ChatRequest
    key: SessionKey
    answer_deltas: list[Delta]
    sequence: FakeSequence = field(default_factory=FakeSequence)


@pytest.fixture
def template() -> ChatTemplate:
    return ChatTemplate(
        made.byte_level(REWRITES, made.special("<|im_start|>", "<|im_end|>"), eos_token="<|im_end|>")
    )


@pytest.fixture
def sessions() -> MemorySessionBook:
    return MemorySessionBook(BlockPool(2**20))


def end_turn(
    background: BackgroundPrewarm,
    template: ChatTemplate,
    sessions: MemorySessionBook,
    session: str,
    **more: Any,
) -> EndedTurn:
    """A turn of a session ends, and its branch holds the answer as it was generated."""
    request = ChatRequest((Message("user", f"Who is {session}?"),), sampling=SamplingParams(max_tokens=8))
    turn = EndedTurn(request, SessionKey(session), [Delta("Ada.")], FakeSequence(**more))
    prompt = template.encode(request)
    tokens = (*prompt.token_ids, *template.tokenizer.tokenize("Ada."))
    branch = Branch(tokens, template.tokenizer.text_of(tokens), len(prompt.token_ids), [], None)
    sessions.open(ROOT, ("default", session)).branches.append(branch)
    background.ended(turn, branch)
    return turn


def test_the_latest_turn_comes_first_and_one_that_was_withdrawn_comes_again(
    template: ChatTemplate, sessions: MemorySessionBook
) -> None:
    background = BackgroundPrewarm(template, sessions, enabled=True)
    turns = [end_turn(background, template, sessions, name) for name in ("a", "b")]
    work = background.next()
    assert work is not None
    assert work.turn.key == SessionKey("b")
    assert work.prompt.token_ids == lasting_prefix(template, turns[1].request, Message("assistant", "Ada."))
    background.started(7, work)
    assert background.withdraw() == 7
    assert background.withdraw() is None, "it is told once"
    again = background.next()
    assert again is not None
    assert again.turn.key == SessionKey("b")
    background.started(8, again)
    background.closed()
    assert background.withdraw() is None, "it is done"
    last = background.next()
    assert last is not None
    assert last.turn.key == SessionKey("a")
    assert background.next() is None


def test_a_forgotten_session_is_worked_for_no_more(
    template: ChatTemplate, sessions: MemorySessionBook
) -> None:
    background = BackgroundPrewarm(template, sessions, enabled=True)
    for name in ("a", "b", "a"):
        end_turn(background, template, sessions, name)
    work = background.next()
    assert work is not None
    background.started(3, work)
    assert background.forget(("default", "b")) is None
    assert background.forget(("default", "a")) == 3
    assert background.withdraw() is None
    assert background.next() is None


def test_a_branch_that_went_on_meanwhile_needs_nothing(
    template: ChatTemplate, sessions: MemorySessionBook
) -> None:
    background = BackgroundPrewarm(template, sessions, enabled=True)
    end_turn(background, template, sessions, "a")
    (branch,) = sessions.open(ROOT, ("default", "a")).branches
    branch.token_ids = (*branch.token_ids, 5)
    assert background.next() is None


def test_where_it_is_off_or_nothing_was_answered_there_is_nothing_to_do(
    template: ChatTemplate, sessions: MemorySessionBook
) -> None:
    off = BackgroundPrewarm(template, sessions, enabled=False)
    end_turn(off, template, sessions, "a")
    assert off.next() is None
    on = BackgroundPrewarm(template, sessions, enabled=True)
    end_turn(on, template, sessions, "b", max_tokens=0)
    assert on.next() is None
