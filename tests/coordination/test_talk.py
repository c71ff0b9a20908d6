"""Agents on the real engine, in every topology: what is heard, what is computed, and what is left behind."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from support import keys
from support.people import FRAME, people, tokens_heard

from agent_memory_core import AgentMemory, InvalidRequest, InvalidSetting, SessionNotFound
from agent_memory_core.coordination import (
    AgentBusy,
    CoordinationService,
    InvalidTurn,
    Token,
    TurnComplete,
    TurnStart,
    begin,
)
from agent_memory_core.coordination.spec import SessionSpec
from agent_memory_core.coordination.turns import SILENCE, ask

TALK: dict[str, Any] = {
    "agents": people("ann", "bob", "cyd"),
    "initial_prompt": "Three friends plan a trip. They talk about where to go and what to bring.",
    "sampling": {"max_tokens": 24},
}


@pytest.mark.parametrize("topology", ["turn_by_turn", "round_robin", "broadcast", "whisper", "interrupt"])
def test_every_topology_takes_turns(service: CoordinationService, topology: str) -> None:
    sid = service.create_session({**TALK, "topology": topology}).session_id
    to = "bob" if topology == "whisper" else None
    event = service.turn(sid, to=to)
    assert event.content
    assert event.kind == ("whisper" if to else "public")
    assert {each.sender_id for each in service.round(sid)} <= {"ann", "bob", "cyd"}
    status = service.get(sid)
    assert status.turn == (6 if topology == "broadcast" else 3)
    assert status.is_active


def test_a_turn_computes_what_was_heard_and_the_cue(
    memory: AgentMemory, service: CoordinationService
) -> None:
    """Over eight rounds of two agents; their first turns compute the system message too."""
    sid = service.create_session(
        {**TALK, "agents": people("ann", "bob"), "topology": "round_robin"}
    ).session_id
    for _ in range(8):
        service.round(sid)
    rows = service.stats(sid)
    assert len(rows) == 16
    heard = tokens_heard(memory, service._stored(sid).book)
    assert all(row.new <= tokens + FRAME for row, tokens in list(zip(rows, heard, strict=True))[2:])
    by_round = [rows[i].new + rows[i + 1].new for i in range(2, 16, 2)]
    assert max(by_round) <= 1.5 * min(by_round)
    assert {row.miss_reason for row in rows[2:]} == {""}
    # The second agent begins with what the first one has read.
    assert rows[1].cache_read > 0


def test_answers_of_a_broadcast_are_those_of_the_agents_alone(
    memory: AgentMemory, service: CoordinationService
) -> None:
    spec = SessionSpec.of(
        {**TALK, "topology": "broadcast", "seed": 3, "sampling": {"max_tokens": 12, "temperature": 0.8}}
    )
    sid = service.create_session(spec).session_id
    answers = [event.content for event in service.round(sid)]
    alone = []
    for number, agent in enumerate(spec.agents):
        asked = ask(begin(spec), agent, place=number)
        result = memory.chat(asked.messages, max_tokens=12, temperature=0.8, seed=3 + number, stop=asked.stop)
        alone.append(result.text.strip() or SILENCE)
    assert answers == alone
    assert [event.sender_id for event in service.round(sid)] == ["ann", "bob", "cyd"]


def test_a_seed_makes_a_session_repeatable() -> None:
    """On memories that know the same: what was stored is rounded, so that a sampled answer may differ after it."""
    spec = {**TALK, "seed": 7, "sampling": {"max_tokens": 12, "temperature": 1.5}}
    transcripts = []
    for _ in range(2):
        with (
            AgentMemory(cache_dir=None, memory_budget_mb=64) as memory,
            CoordinationService(memory) as service,
        ):
            sid = service.create_session(spec).session_id
            transcripts.append([event.content for _ in range(2) for event in service.round(sid)])
    assert transcripts[0] == transcripts[1]
    assert len(set(transcripts[0])) > 1


def test_a_whisper_is_known_to_two_in_any_topology(service: CoordinationService) -> None:
    sid = service.create_session({**TALK, "topology": "round_robin"}).session_id
    service.whisper(sid, "ann", "cyd", "The code of the safe is 4821.")
    known = {name: "4821" in str(service.messages(sid, as_agent=name)) for name in ("ann", "bob", "cyd")}
    assert known == {"ann": True, "bob": False, "cyd": True}
    assert "4821" not in str(service.messages(sid))


def test_a_person_takes_part(service: CoordinationService) -> None:
    agents = [*people("ann"), {"agent_id": "me", "display_name": "Ada", "is_human": True}]
    sid = service.create_session({"agents": agents, "sampling": {"max_tokens": 24}}).session_id
    service.say(sid, "me", "The code of the garage is 4821.")
    service.turn(sid)
    service.say(sid, "a stranger", "Good evening.")
    assert [event.sender_id for event in service.messages(sid)] == ["me", "ann", "a stranger"]
    with pytest.raises(InvalidTurn, match="is a person"):
        service.turn(sid, speaker="me")
    with pytest.raises(InvalidRequest, match="takes no part"):
        service.whisper(sid, "a stranger", "ann", "Psst.")


def test_a_stream_tells_who_begins_each_piece_and_the_end(service: CoordinationService) -> None:
    sid = service.create_session(TALK).session_id
    steps = list(service.stream_round(sid))
    assert [step.agent_id for step in steps if isinstance(step, TurnStart)] == ["ann", "bob", "cyd"]
    said = {step.agent_id: step.accumulated for step in steps if isinstance(step, Token)}
    ended = [step.event for step in steps if isinstance(step, TurnComplete)]
    assert {event.sender_id: event.content for event in ended} == {
        a: text.strip() for a, text in said.items()
    }


def test_a_stream_that_is_closed_takes_its_turn_back(random_service: CoordinationService) -> None:
    sid = random_service.create_session({"agents": people("ann"), "sampling": {"max_tokens": 400}}).session_id
    stream = random_service.stream_turn(sid)
    next(stream), next(stream)
    stream.close()
    assert random_service.messages(sid) == []
    assert random_service.get(sid).turn == 0


def test_who_cuts_in_speaks_next_and_what_was_said_stays(random_service: CoordinationService) -> None:
    spec = {"agents": people("ann", "bob"), "topology": "interrupt", "sampling": {"max_tokens": 500}}
    sid = random_service.create_session({**spec, "initial_prompt": "They argue. " * 20}).session_id
    random_service.prime(sid)
    stream, said = random_service.stream_turn(sid), ""
    for step in stream:
        if isinstance(step, Token):
            said = step.accumulated
        if len(said) > 20:
            break
    other = random_service.interrupt(sid, "bob")
    rest = list(stream)
    assert rest == [TurnComplete(random_service.messages(sid)[0])]
    first, second = random_service.messages(sid)
    assert (first.sender_id, first.interrupted, first.content) == ("ann", True, said.strip())
    assert second == other
    assert (second.sender_id, second.interrupted) == ("bob", False)
    # The one that was cut off goes on, and remembers what it had said.
    random_service.turn(sid)
    view = random_service._stored(sid).book
    assert view.spoken[0].said == said
    assert view.spoken[2].agent_id == "ann"
    last = random_service.stats(sid)[-1]
    assert last.cache_read > 50
    assert last.miss_reason == ""


def test_the_others_are_asked_whether_they_cut_in(random_service: CoordinationService) -> None:
    spec = {
        "agents": people("ann", "bob"),
        "topology": "interrupt",
        "interrupt_every": 4,
        "sampling": {"max_tokens": 16},
    }
    sid = random_service.create_session(spec).session_id
    events = random_service.round(sid)
    assert {event.sender_id for event in events} == {"ann", "bob"}
    assert len(events) <= 4
    for event, after in itertools.pairwise(events):
        if event.interrupted:
            assert after.sender_id != event.sender_id
    assert len(random_service.stats(sid, "ballot")) >= 1


def test_nobody_cuts_in_elsewhere(service: CoordinationService) -> None:
    with pytest.raises(InvalidTurn, match="nobody can cut in"):
        service.interrupt(service.create_session(TALK).session_id, "bob")


def test_a_session_ends_after_its_turns(service: CoordinationService) -> None:
    sid = service.create_session({**TALK, "max_turns": 2}).session_id
    assert len(service.round(sid)) == 2
    assert not service.get(sid).is_active
    with pytest.raises(InvalidTurn, match="is over"):
        service.turn(sid)


def test_a_view_for_all_has_one_memory(memory: AgentMemory, service: CoordinationService) -> None:
    sid = service.create_session({**TALK, "view": "shared"}).session_id
    for _ in range(3):
        service.round(sid)
    assert [info.session_id for info in memory.sessions() if sid in info.session_id] == [f"coord/{sid}"]
    assert all(row.cache_read > 0 for row in service.stats(sid)[1:])
    with pytest.raises(InvalidTurn, match="one view"):
        service.say(sid, "ann", "Psst.", to=["bob"])


def test_a_view_that_is_too_long_is_made_shorter_once() -> None:
    words = "The garden is green and the kitchen is blue. " * 6
    spec = {"agents": people("ann"), "sampling": {"max_tokens": 60}}
    with AgentMemory(cache_dir=None, context_length=384) as memory, CoordinationService(memory) as service:
        sid = service.create_session(spec).session_id
        for number in range(8):
            service.say(sid, "guide", f"{number}. {words}")
            service.turn(sid)
        made_shorter = [row.compacted for row in service.stats(sid)]
    assert made_shorter.count(True) > 1
    assert (True, True) not in set(pairwise(made_shorter))


# Memory and lifecycle


def test_ephemeral_agents_are_forgotten_and_permanent_ones_go_on(
    memory: AgentMemory, service: CoordinationService
) -> None:
    agents = [{"agent_id": "ann", "lifecycle": "permanent"}, {"agent_id": "bob"}]
    spec = {"agents": agents, "persistent_cache_prefix": "trip", "sampling": {"max_tokens": 24}}
    first = service.create_session({**spec, "initial_prompt": "A trip."}).session_id
    service.say(first, "guide", "The code of the garage is 4821.", to=["ann"])
    service.round(first)
    with pytest.raises(AgentBusy, match="'ann' of 'trip'"):
        service.create_session(spec)
    service.close_session(first)
    assert kept(memory, ["persist", first]) == {"persist/trip/ann"}
    second = service.create_session({**spec, "initial_prompt": "The yard."}).session_id
    service.delete(first)
    service.round(second)
    ann, bob = service.stats(second)
    assert ann.cache_read > bob.prompt - bob.new
    assert ann.miss_reason == ""
    service.delete(second)
    third = service.create_session(spec).session_id
    answer = service.turn(third, speaker="ann", prompt="What is the code of the garage?")
    assert service.stats(third)[0].cache_read > ann.cache_read
    assert answer.content
    service.delete(third)
    assert service.delete_persistent("trip") == 1
    assert kept(memory) == set()
    assert service.delete_persistent("trip") == 0


def kept(memory: AgentMemory, ids: Sequence[str] = ("persist",)) -> set[str]:
    return {info.session_id for info in memory.sessions() if any(part in info.session_id for part in ids)}


def test_eight_sessions_go_on_beside_each_other_and_one_is_deleted_in_a_turn(
    random_memory: AgentMemory, random_service: CoordinationService
) -> None:
    spec = {"agents": people("ann", "bob", "cyd"), "sampling": {"max_tokens": 24}}
    ids = [random_service.create_session(spec).session_id for _ in range(8)]
    doomed = random_service.create_session({**spec, "sampling": {"max_tokens": 500}}).session_id
    stream = random_service.stream_turn(doomed)
    next(stream), next(stream)
    with ThreadPoolExecutor(8) as pool:
        rounds = [pool.submit(random_service.round, sid) for sid in ids]
        random_service.delete(doomed)
        assert all(len(found.result()) == 3 for found in rounds)
    with pytest.raises(SessionNotFound):
        list(stream)
    assert len(kept(random_memory, ids)) == 24
    for sid in ids:
        random_service.delete(sid)
    assert kept(random_memory, [*ids, doomed]) == set()
    assert random_service.list() == []


def test_calls_of_one_session_come_one_after_another(random_service: CoordinationService) -> None:
    sid = random_service.create_session(
        {"agents": people("ann", "bob"), "sampling": {"max_tokens": 8}}
    ).session_id
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda _: random_service.turn(sid), range(6)))
    assert [event.sender_id for event in random_service.messages(sid)] == ["ann", "bob"] * 3
    assert [event.turn for event in random_service.messages(sid)] == list(range(6))


async def test_coroutines_have_twins(random_service: CoordinationService) -> None:
    spec = {"agents": people("ann", "bob"), "sampling": {"max_tokens": 8}}
    statuses = await asyncio.gather(*(random_service.acreate_session(spec) for _ in range(3)))
    rounds = await asyncio.gather(*(random_service.around(status.session_id) for status in statuses))
    assert [len(found) for found in rounds] == [2, 2, 2]
    steps = [step async for step in random_service.astream_turn(statuses[0].session_id)]
    assert isinstance(steps[-1], TurnComplete)
    with pytest.raises(SessionNotFound):
        await random_service.aturn("nobody")
    async for _ in (stream := random_service.astream_turn(statuses[1].session_id)):
        await stream.aclose()
        break
    assert (await random_service.aget(statuses[1].session_id)).turn == 2


def test_an_agent_may_have_a_model_of_its_own(
    memory: AgentMemory, random_memory: AgentMemory, tmp_path: Path
) -> None:
    agents = [{"agent_id": "ann"}, {"agent_id": "bob", "model": "random"}]
    with CoordinationService(memory, tmp_path / "talk.db", models={"random": random_memory}) as service:
        sid = service.create_session({"agents": agents, "sampling": {"max_tokens": 8}}).session_id
        assert len(service.round(sid)) == 2
        with pytest.raises(InvalidRequest, match="'nothing'"):
            service.create_session({"agents": [{"agent_id": "ann", "model": "nothing"}]})


def test_an_agent_is_primed_before_its_first_word(service: CoordinationService) -> None:
    prior = [
        {"role": "user", "content": "My name is Ada. " + "We sail from port to port. " * 20},
        {"role": "assistant", "content": "Nice to meet you, Ada!"},
    ]
    agents = [{"agent_id": "ann", "prior_messages": prior}]
    sid = service.create_session({"agents": agents, "sampling": {"max_tokens": 24}}).session_id
    service.prime(sid)
    assert "Ada" in service.turn(sid, prompt="What is my name?").content
    row = service.stats(sid)[0]
    assert row.cache_read >= 0.8 * row.prompt


def test_the_file_of_an_encrypted_store_is_not_written_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys.give(monkeypatch, keys.KEY)
    with (
        AgentMemory(cache_dir=tmp_path / "caches", min_free_mb=0, encryption="env") as memory,
        pytest.raises(InvalidSetting, match="encrypted"),
    ):
        CoordinationService(memory)


def test_a_session_is_there_for_another_service_and_a_damaged_name_is_not_found(
    memory: AgentMemory, tmp_path: Path
) -> None:
    path = tmp_path / "sessions.db"
    with CoordinationService(memory, path) as service:
        sid = service.create_session(TALK).session_id
        events = service.round(sid)
    assert path.stat().st_mode & 0o777 == 0o600
    with CoordinationService(memory, path) as service:
        assert service.messages(sid) == events
        assert service.get(sid).next_speaker == "ann"
        service.turn(sid)
    with CoordinationService(memory, path, namespace="other") as service:
        assert service.list() == []
        with pytest.raises(SessionNotFound):
            service.get(sid)
