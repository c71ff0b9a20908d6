"""A request becomes a turn: which branch it continues, and what can be expected to be known of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.engine_driver import RecordingSink, SteppedEngine

from agent_memory_core import ChatRequest, Message, SamplingParams, SessionKey
from agent_memory_core.engine.turn import Turn

pytestmark = pytest.mark.model

Open = Callable[..., SteppedEngine]
QUESTION = Message("user", "Tell me " + "1" * 100)


def request(*messages: Message) -> ChatRequest:
    return ChatRequest(messages, sampling=SamplingParams(max_tokens=4))


def turn_of(engine: SteppedEngine, asked: ChatRequest, key: SessionKey) -> Turn:
    return engine.intake.turn(99, asked, key, RecordingSink(), prewarm=False)


def answered(engine: SteppedEngine, asked: ChatRequest, key: SessionKey) -> RecordingSink:
    sink = RecordingSink()
    engine.submit(asked, key, sink)
    while engine.busy:
        engine.step()
    engine.flush()
    return sink


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_turn_continues_the_branch_that_it_shares_most_with(
    open_engine: Open, tmp_path: Path, on_disk: bool
) -> None:
    engine = open_engine(tmp_path / "store" if on_disk else None)
    key = SessionKey("s")
    new = turn_of(engine, request(QUESTION), key)
    assert (new.branch, new.expected.shared, new.expected.hint) == (None, 0, "new")
    first = answered(engine, request(QUESTION), key)
    more = turn_of(engine, request(QUESTION, Message("assistant", first.text), Message("user", "2")), key)
    (branch,) = engine.sessions.open(engine.intake.root("default"), ("default", "s")).branches
    assert more.branch is branch
    assert more.expected.shared == len(branch.token_ids)
    assert more.expected.hint == ""
    assert more.sequence.hashes[: len(branch.hashes)] == branch.hashes
    other = turn_of(engine, request(Message("user", "What else?")), key)
    assert (other.branch, other.expected.hint) == (None, ""), "another last message misses nothing"


def test_a_turn_that_owns_nothing_reads_what_there_is(open_engine: Open, tmp_path: Path) -> None:
    engine = open_engine(tmp_path / "store")
    answered(engine, request(QUESTION), SessionKey("s"))
    aside = turn_of(engine, request(QUESTION), SessionKey("s", ephemeral=True))
    assert (aside.session, aside.branch) == (None, None)
    assert aside.sequence.reads_tier
    anonymous = turn_of(engine, request(QUESTION), SessionKey())
    assert anonymous.session is None
    assert not anonymous.sequence.reads_tier, "what lies on disk belongs to sessions"


def test_namespaces_and_models_have_roots_of_their_own(open_engine: Open) -> None:
    one, other = open_engine(None), open_engine(None, "gemma3")
    roots = [engine.intake.root(name) for engine in (one, other) for name in ("a", "b")]
    assert len(set(roots)) == 4
    assert one.intake.root("a") == open_engine(None).intake.root("a")


def test_checkpoints_are_found_only_where_a_model_needs_them(open_engine: Open) -> None:
    brief = Message("system", "You are terse and kind. " * 20)
    plain = turn_of(open_engine(None), request(brief, QUESTION), SessionKey())
    assert plain.checkpoints == plain.sequence.stops == ()
    state = turn_of(open_engine(None, "mamba2"), request(brief, QUESTION), SessionKey())
    assert state.checkpoints
    assert state.sequence.stops == state.checkpoints
