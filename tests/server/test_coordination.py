"""Agents that talk, over HTTP: every topology takes turns, whispers are heard, votes count, nothing is read twice."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from support import http_server, keys
from support.http_server import Running, wait_until

from agent_memory_core import AgentMemory
from agent_memory_core.coordination import Step, TurnStart
from agent_memory_core.manager import ManagerConfig, ModelConfig, ModelManager
from agent_memory_core.server.coordination_stream import SIGN_OF_LIFE, StepStream

NAMES = ("ann", "bob", "cyd")
AGENTS = [{"agent_id": name, "system_prompt": f"You are called {name}."} for name in NAMES]
SPEC: dict[str, Any] = {"agents": AGENTS, "sampling": {"max_tokens": 24, "temperature": 0}, "reasons": False}
ROOT = "/v1/coordination/sessions"
CODE = "What is the code of the garage?"
HOT = {"max_tokens": 4000, "temperature": 5, "seed": 2}
"""So hot that the end of an answer is as likely as any other token: these are thousands of characters."""


@pytest.fixture
def client(server: Running) -> Iterator[httpx.Client]:
    with server.http() as http:
        yield http


def create(client: httpx.Client, **more: Any) -> str:
    answer = client.post(ROOT, json={**SPEC, **more})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["session_id"])


def post(client: httpx.Client, sid: str, path: str, **body: Any) -> dict[str, Any]:
    answer = client.post(f"{ROOT}/{sid}/{path}", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def streamed(client: httpx.Client, sid: str, path: str, **body: Any) -> list[tuple[str, dict[str, Any]]]:
    with client.stream("POST", f"{ROOT}/{sid}/{path}", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        text = "".join(answer.iter_text())
    events = [block.split("\n") for block in text.split("\n\n") if block and not block.startswith(":")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in events]


@pytest.mark.parametrize("topology", ["turn_by_turn", "round_robin", "broadcast", "whisper", "interrupt"])
def test_every_topology_takes_turns_and_rounds(client: httpx.Client, topology: str) -> None:
    sid = create(client, topology=topology)
    to = {"to": "bob"} if topology == "whisper" else {}
    one = post(client, sid, "turn", **to)
    said = {message["sender_id"] for message in one["messages"]}
    assert said == (set(NAMES) if topology == "broadcast" else {"ann"})
    assert one["message"] == one["messages"][-1]
    assert one["session_status"]["current_turn"] == len(said)
    whole = post(client, sid, "round")
    assert len(whole["messages"]) == (3 if topology == "broadcast" else 2)
    # Whispers are no public messages.
    public = client.get(f"{ROOT}/{sid}/messages").json()["messages"]
    assert len(public) == {"whisper": 0, "broadcast": 6}.get(topology, 3)
    states = client.get(f"{ROOT}/{sid}").json()["agent_states"]
    assert sum(state["message_count"] for state in states) == len(one["messages"] + whole["messages"])


@pytest.mark.parametrize("topology", ["turn_by_turn", "broadcast"])
def test_a_stream_says_what_a_whole_answer_says(client: httpx.Client, topology: str) -> None:
    sid, other = create(client, topology=topology), create(client, topology=topology)
    whole = post(client, other, "round")["messages"]
    events = streamed(client, sid, "round/stream")
    said = [body["message"] for name, body in events if name == "turn_complete"]
    assert [message["content"] for message in said] == [message["content"] for message in whole]
    for message in said:
        pieces = [
            body for name, body in events if name == "token" and body["agent_id"] == message["sender_id"]
        ]
        assert "".join(piece["text"] for piece in pieces).strip() == message["content"]
        assert pieces[-1]["accumulated"] == "".join(piece["text"] for piece in pieces)
    assert [name for name, _ in events].count("turn_start") == 3
    name, last = events[-1]
    assert (name, last["messages"]) == ("round_complete", said)
    assert last["session_status"] == client.get(f"{ROOT}/{sid}").json()
    names = [name for name, _ in streamed(client, sid, "turn/stream")]
    assert (names[0], names[-1]) == ("turn_start", "turn_complete")


def test_a_whisper_is_heard_by_the_two_who_know_of_it(client: httpx.Client) -> None:
    sid = create(client, topology="round_robin")
    words = "The code of the garage is 4821."
    told = post(client, sid, "whisper", **{"from": "ann", "to": "cyd", "content": words})
    assert told["message"]["channel_type"] == "whisper"
    known = {
        name: [m["content"] for m in client.get(f"{ROOT}/{sid}/messages?as_agent={name}").json()["messages"]]
        for name in NAMES
    }
    assert known == {"ann": [words], "bob": [], "cyd": [words]}
    assert client.get(f"{ROOT}/{sid}/messages").json()["messages"] == []
    other = create(client)
    post(client, other, "whisper", **{"from": "ann", "to": "cyd", "content": words})
    answers = {
        n: post(client, other, "turn", speaker=n, prompt=CODE)["message"]["content"] for n in ("bob", "cyd")
    }
    assert "4821" in answers["cyd"]
    assert "4821" not in answers["bob"]


@pytest.mark.parametrize("mode", ["majority_vote", "ranked_choice", "consensus", "coordinator_decides"])
def test_votes_count_in_every_mode(client: httpx.Client, mode: str) -> None:
    people = [{"agent_id": f"p{n}", "is_human": True} for n in range(3)]
    agents = [{"agent_id": "ann", "role": "coordinator"}, *people]
    sid = create(client, agents=agents, decision_mode=mode, max_rounds=1)
    question = {"question": "Where do we go?", "choices": ["sea", "hills"]}
    assert post(client, sid, "ask", **question)["choices"] == ["sea", "hills"]
    for person in people:
        body = {"agent_id": person["agent_id"], "question": question["question"]}
        body |= {"ranking": ["hills", "sea"]} if mode == "ranked_choice" else {"choice": "hills"}
        assert post(client, sid, "vote", **body)["question"] == question["question"]
    found = post(client, sid, "decide")
    ballots = {ballot["agent_id"]: ballot["choice"] for ballot in found["decision"]["ballots"]}
    assert {ballots[person["agent_id"]] for person in people} <= {"hills", "yes"}
    if mode in ("majority_vote", "ranked_choice"):
        assert found["decision"]["winner"] == "hills"
        assert found["decision"]["tally"]["hills"] >= 3
    assert found["session_status"]["question"] is None
    assert client.get(f"{ROOT}/{sid}/decisions").json()["decisions"][-1]["question"] == question["question"]


def test_who_cuts_in_ends_the_stream_of_who_speaks(client: httpx.Client, server: Running) -> None:
    sid = create(client, topology="interrupt", sampling=HOT)
    events: list[tuple[str, dict[str, Any]]] = []

    def listen() -> None:
        with server.http() as other:
            events.extend(streamed(other, sid, "turn/stream", speaker="ann"))

    reader = threading.Thread(target=listen)
    with server.http() as watching:
        reader.start()
        wait_until(lambda: server.memory.stats().running > 0)
        cut = post(watching, sid, "interrupt", agent_id="bob")
    reader.join()
    assert cut["message"]["sender_id"] == "bob"
    name, last = events[-1]
    assert (name, last["message"]["sender_id"], last["message"]["is_interrupted"]) == (
        "turn_complete",
        "ann",
        True,
    )
    messages = client.get(f"{ROOT}/{sid}/messages").json()["messages"]
    assert [message["sender_id"] for message in messages] == ["ann", "bob"]
    assert messages[0]["content"] == last["message"]["content"]


def test_a_turn_computes_what_was_heard_and_nothing_again_over_forty_messages(client: httpx.Client) -> None:
    sid = create(client, agents=AGENTS[:2], sampling={"max_tokens": 4, "temperature": 0})
    for _ in range(21):
        post(client, sid, "round")
    rows = client.get(f"{ROOT}/{sid}/stats").json()["turns"]
    assert len(rows) == 42
    later = rows[2:]
    assert max(row["new"] for row in later) <= 1.5 * min(row["new"] for row in later) + 8
    assert {row["miss_reason"] for row in later} == {""}
    # What is not new was all there in the same agent's turn before.
    for before, after in zip(rows, rows[2:], strict=False):
        assert after["cache_read"] >= before["prompt"] - 1


def test_what_cannot_be_done_has_a_status_and_a_sentence(client: httpx.Client) -> None:
    sid = create(client, max_turns=1)
    refused = [
        ("GET", f"{ROOT}/nobody", None, 404),
        ("POST", f"{ROOT}/nobody/turn", {}, 404),
        ("POST", f"{ROOT}/nobody/vote", {"agent_id": "ann", "choice": "sea"}, 404),
        ("DELETE", f"{ROOT}/nobody", None, 404),
        ("POST", ROOT, {**SPEC, "topologie": "broadcast"}, 400),
        ("POST", ROOT, {**SPEC, "agents": []}, 400),
        ("POST", f"{ROOT}/{sid}/turn", {"speeker": "ann"}, 400),
        ("POST", f"{ROOT}/{sid}/turn", {"speaker": "dan"}, 400),
        ("POST", f"{ROOT}/{sid}/turn/stream", {"speaker": "dan"}, 400),
        ("POST", f"{ROOT}/{sid}/decide", {"question": "Why?"}, 400),
        ("POST", f"{ROOT}/{sid}/interrupt", {"agent_id": "ann"}, 400),
        ("POST", f"{ROOT}/{sid}/vote", {"agent_id": "ann", "choice": "sea"}, 400),
        ("POST", f"{ROOT}/{sid}/vote", {"agent_id": "ann", "question": "Who?", "choice": "sea"}, 400),
    ]
    for method, path, body, status in refused:
        answer = client.request(method, path, json=body)
        assert answer.status_code == status, (path, answer.text)
        assert answer.json()["error"]["message"]
    post(client, sid, "turn")
    assert not client.get(f"{ROOT}/{sid}").json()["is_active"]
    assert client.post(f"{ROOT}/{sid}/turn").status_code == 400


def test_a_client_that_goes_away_takes_its_turn_back_and_frees_its_place(tmp_path: Path) -> None:
    memory = AgentMemory(cache_dir=tmp_path, memory_budget_mb=128, min_free_mb=0)
    with memory, http_server.serve(memory, max_in_flight=1) as running, running.http() as client:
        sid = create(client, sampling=HOT)
        with client.stream("POST", f"{ROOT}/{sid}/turn/stream", json={}) as answer:
            lines = answer.iter_lines()
            assert next(lines) == "event: turn_start"
            with running.http() as other:
                assert other.post(f"{ROOT}/{sid}/turn").status_code == 429
        wait_until(lambda: client.post(f"{ROOT}/{sid}/prime").status_code == 200)
        assert client.get(f"{ROOT}/{sid}").json()["current_turn"] == 0


@pytest.mark.parametrize("path", ["turn", "round", "turn/stream", "round/stream"])
def test_agents_that_talk_too_long_are_given_up_and_take_their_turn_back(
    client: httpx.Client, path: str
) -> None:
    sid = create(client)
    # No model says a word in so short a time.
    answer = client.post(f"{ROOT}/{sid}/{path}", headers={"X-Request-Timeout": "1e-5"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
    assert client.get(f"{ROOT}/{sid}").json()["current_turn"] == 0
    post(client, sid, "turn")


async def test_a_stream_of_agents_that_takes_too_long_ends_with_an_error() -> None:
    closed = []

    async def steps() -> AsyncGenerator[Step, None]:
        try:
            yield TurnStart("ann", 1)
            await asyncio.Event().wait()
        finally:
            closed.append(True)

    async def event(step: Step) -> tuple[str, dict[str, Any]]:
        return type(step).__name__, {}

    async def last() -> None:
        raise AssertionError("there is no last step")

    said = steps()
    stream = StepStream(said, await anext(said), ExitStack(), event, last, silence=0.01, limit=0.1)
    written = "".join([bytes(chunk).decode() async for chunk in stream.body_iterator])
    assert written.startswith("event: TurnStart")
    assert SIGN_OF_LIFE.decode() in written
    assert json.loads(written.rpartition("data: ")[2])["error"]["code"] == "timeout"
    assert closed


def test_sessions_are_their_keys_and_outlive_the_server(tmp_path: Path) -> None:
    def opened() -> AgentMemory:
        return AgentMemory(cache_dir=tmp_path, memory_budget_mb=128, min_free_mb=0)

    both = {"api_keys": ("anna", "bert")}
    stay = [{**agent, "lifecycle": "permanent"} for agent in AGENTS[:2]]
    anna, bert = {"x-api-key": "anna"}, {"x-api-key": "bert"}
    with opened() as memory, http_server.serve(memory, **both) as server, server.http(**anna) as client:
        sid = create(client, agents=stay, persistent_cache_prefix="trip")
        post(client, sid, "say", sender="guide", content="The code of the garage is 4821.")
        post(client, sid, "round")
        assert (
            client.post(ROOT, json={**SPEC, "agents": stay, "persistent_cache_prefix": "trip"}).status_code
            == 409
        )
    with opened() as memory, http_server.serve(memory, **both) as server, server.http(**anna) as client:
        assert client.get(ROOT, headers=bert).json()["total"] == 0
        assert client.get(f"{ROOT}/{sid}", headers=bert).status_code == 404
        answer = post(client, sid, "turn", speaker="bob", prompt=CODE)
        assert "4821" in answer["message"]["content"]
        assert client.get(f"{ROOT}/{sid}/stats").json()["turns"][-1]["hit_tier"] == "warm"
        assert post(client, sid, "close")["is_active"] is False
        again = create(client, agents=stay, persistent_cache_prefix="trip")
        assert "4821" in post(client, again, "turn", speaker="ann", prompt=CODE)["message"]["content"]
        assert client.delete(f"{ROOT}/{again}").status_code == 204
        assert client.delete("/v1/coordination/caches/trip", headers=bert).status_code == 204
        assert client.delete("/v1/coordination/caches/trip").status_code == 204
        fresh = create(client, agents=stay, persistent_cache_prefix="trip")
        post(client, fresh, "turn", speaker="ann", prompt=CODE)
        assert client.get(f"{ROOT}/{fresh}/stats").json()["turns"][0]["hit_tier"] != "warm"


def test_agents_may_have_any_model_that_is_served(tmp_path: Path) -> None:
    models = [
        ModelConfig(
            name=name,
            type="mlx",
            path="tiny-chat",
            context_length=context,
            parameters={"memory_budget_mb": 64},
        )
        for name, context in (("first", 8192), ("second", 2048))
    ]
    agents = [{"agent_id": "ann"}, {"agent_id": "bob", "model": "second"}]
    path = tmp_path / "sessions.db"
    with (
        ModelManager(ManagerConfig(models=models)) as manager,
        http_server.serve(manager, coordination_path=path) as running,
        running.http() as client,
    ):
        sid = create(client, agents=agents)
        assert len(post(client, sid, "round")["messages"]) == 2
        assert {name: stats.state for name, stats in manager.get_model_stats().items()} == {
            "first": "ready",
            "second": "ready",
        }
        wrong = client.post(ROOT, json={**SPEC, "agents": [{"agent_id": "ann", "model": "third"}]})
        assert (wrong.status_code, "'third'" in wrong.text) == (400, True)


def test_an_encrypted_store_wants_a_file_for_what_agents_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cryptography")
    keys.give(monkeypatch, keys.KEY)
    settings = {"cache_dir": tmp_path / "store", "memory_budget_mb": 128, "min_free_mb": 0}
    with AgentMemory(**settings, encryption="env") as memory:
        with http_server.serve(memory) as running, running.http() as client:
            assert "coordination_path" in client.post(ROOT, json=SPEC).json()["error"]["message"]
        path = tmp_path / "sessions.db"
        with http_server.serve(memory, coordination_path=path) as running, running.http() as client:
            create(client)
        assert path.is_file()
