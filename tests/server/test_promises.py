"""What servers that keep a cache between requests get wrong, and this one must not."""

from __future__ import annotations

import itertools
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import httpx
import pytest
from support import http_server, made_tokenizers, tiny_models
from support.http_server import Running, wait_until

from agent_memory_core import AgentMemory, TurnProgress
from agent_memory_core.engine.model_runner import ModelRunner
from agent_memory_core.server.ids import new_id

CHAT = "/v1/chat/completions"
QUESTIONS = ["My name is Ada.", "What is my name?", "Hello.", "And what is my name?", "Who am I?", "Thanks."]
LONG = {"type": "array", "items": {"enum": [1, 2]}, "minItems": 3000, "maxItems": 3000}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def asked(client: httpx.Client, messages: list[dict[str, Any]], **more: Any) -> tuple[str, dict[str, Any]]:
    """The text of a greedy answer, and what it says of its tokens."""
    body = {"messages": messages, "max_tokens": 24, "temperature": 0, **more}
    answer = client.post(CHAT, json=body)
    assert answer.status_code == 200, answer.text
    said = answer.json()
    return said["choices"][0]["message"]["content"], said["usage"]


def cached(usage: dict[str, Any]) -> int:
    tokens: int = usage["prompt_tokens_details"]["cached_tokens"]
    return tokens


def test_more_sessions_than_memory_holds_are_all_answered_and_all_come_back(tmp_path: Path) -> None:
    memory = AgentMemory(cache_dir=tmp_path, memory_budget_mb=4, min_free_mb=0, block_tokens=64, kv_bits=None)
    texts = [f"I am number {index}. " * 30 for index in range(10)]
    with memory, http_server.serve(memory) as server, server.http() as client:
        for index, text in enumerate(texts):
            asked(client, [user(text)], session_id=f"s{index}", max_tokens=2)
        assert memory.stats().memory.block_bytes <= 4 * 2**20
        for index, text in enumerate(texts):
            _, usage = asked(client, [user(text)], session_id=f"s{index}", max_tokens=2)
            assert cached(usage) == usage["prompt_tokens"] - 1


def test_a_long_conversation_says_what_a_stranger_with_the_same_words_is_told(memory: AgentMemory) -> None:
    with http_server.serve(memory, api_keys=("one", "two")) as server:
        with server.http(**{"x-api-key": "one"}) as client:
            turns: list[dict[str, Any]] = []
            answers = []
            for question in QUESTIONS:
                turns.append(user(question))
                text, usage = asked(client, turns, session_id="long")
                # The same request again has the same answer, and nothing is computed for it.
                again, twice = asked(client, turns, session_id="long")
                assert (again, cached(twice)) == (text, usage["prompt_tokens"] - 1)
                answers.append((text, usage["prompt_tokens"]))
                turns.append({"role": "assistant", "content": text})
        with server.http(**{"x-api-key": "two"}) as stranger:
            for index, (text, prompt) in enumerate(answers):
                told, usage = asked(stranger, turns[: 2 * index + 1])
                assert (told, usage["prompt_tokens"]) == (text, prompt)


@pytest.mark.parametrize("kv_bits", [None, 8, "6/4"])
def test_a_session_goes_on_after_a_restart_in_every_precision(tmp_path: Path, kv_bits: Any) -> None:
    turns = [user(QUESTIONS[0])]
    said = []
    for _ in range(2):
        memory = AgentMemory(
            cache_dir=tmp_path, memory_budget_mb=64, min_free_mb=0, block_tokens=64, kv_bits=kv_bits
        )
        with memory, http_server.serve(memory) as server, server.http() as client:
            for _ in range(2):
                said.append(asked(client, turns, session_id="precise"))
    texts, usages = zip(*said, strict=True)
    assert len(set(texts)) == 1
    assert [cached(usage) for usage in usages] == [0, *[usages[0]["prompt_tokens"] - 1] * 3]


def opened(folder: Path) -> AgentMemory:
    return AgentMemory(cache_dir=folder, memory_budget_mb=64, min_free_mb=0, block_tokens=64, kv_bits=None)


@pytest.mark.parametrize("share", [0.7, 1.0], ids=["changed", "cut"])
def test_a_damaged_file_costs_time_and_never_an_answer(tmp_path: Path, share: float) -> None:
    turns = [user("Some words that are worth keeping. " * 20)]
    with opened(tmp_path) as memory, http_server.serve(memory) as server, server.http() as client:
        text, whole = asked(client, turns, session_id="harmed")
    files = list(tmp_path.rglob("*.safetensors"))
    assert files
    for file in files:
        raw = bytearray(file.read_bytes())
        at = int(len(raw) * share)
        file.write_bytes(raw[: len(raw) // 2] if share == 1 else raw[:at] + b"\xff" * 8 + raw[at + 8 :])
    with opened(tmp_path) as memory, http_server.serve(memory) as server, server.http() as client:
        again, usage = asked(client, turns, session_id="harmed")
        assert (again, cached(usage)) == (text, 0)
        assert usage["prompt_tokens"] == whole["prompt_tokens"]


def test_a_turn_that_is_lost_leaves_its_session_as_it_was(tmp_path: Path) -> None:
    turns = [user("Some words that are worth keeping. " * 20)]
    form = {"type": "json_schema", "json_schema": {"name": "long", "schema": LONG}}
    long = {"session_id": "safe", "max_tokens": 8000, "response_format": form, "stream": True}
    with opened(tmp_path) as memory, http_server.serve(memory) as server, server.http() as client:
        text, usage = asked(client, turns, session_id="safe")
        more = [*turns, {"role": "assistant", "content": text}, user("Go on.")]
        with client.stream("POST", CHAT, json=long | {"messages": more}) as stream:
            next(stream.iter_lines())
        wait_until(lambda: memory.stats().cancelled == 1)
    with opened(tmp_path) as memory, http_server.serve(memory) as server, server.http() as client:
        again, warm = asked(client, turns, session_id="safe")
        assert (again, cached(warm)) == (text, usage["prompt_tokens"] - 1)


def test_a_server_whose_turns_all_fail_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        AgentMemory(cache_dir=None, memory_budget_mb=64) as memory,
        http_server.serve(memory) as server,
        server.http() as client,
    ):
        form = {"type": "json_schema", "json_schema": {"name": "long", "schema": LONG}}
        body = {"messages": [user("Count.")], "max_tokens": 500, "response_format": form}
        with monkeypatch.context() as broken:
            with client.stream("POST", CHAT, json=body | {"n": 4, "stream": True}) as stream:
                wait_until(lambda: memory.stats().running == 4)
                broken.setattr(ModelRunner, "decode", fail)
                assert '"error"' in [line for line in stream.iter_lines() if line][-1]
            wait_until(lambda: memory.stats().failed == 4)
            assert client.get("/health/ready").status_code == 200, "it was one fault"
            assert [client.post(CHAT, json=body).status_code for _ in range(2)] == [500, 500]
            wait_until(lambda: client.get("/health/ready").json().get("reason") == "turns_fail")
        asked(client, [user("Hi.")])
        wait_until(lambda: client.get("/health/ready").status_code == 200)


def fail(*_: object) -> None:
    raise RuntimeError("a fault")


def test_what_names_no_session_is_kept_if_the_server_is_told_to(tmp_path: Path) -> None:
    turns = [user(QUESTIONS[0])]
    with opened(tmp_path) as memory, http_server.serve(memory, keep_anonymous=True) as server:
        with server.http() as client:
            text, usage = asked(client, turns)
            answer = client.post("/v1/completions", json={"prompt": "As it stands.", "max_tokens": 2})
            assert answer.headers["x-agent-memory-session-source"] == "none"
            more = [*turns, {"role": "assistant", "content": text}, user(QUESTIONS[1])]
            answer = client.post(CHAT, json={"messages": more, "max_tokens": 2})
            assert answer.headers["x-agent-memory-session-source"] == "content"
            name = answer.headers["x-session-id"]
        memory.flush()
        assert [info.session_id for info in memory.sessions("default")] == [name]
    with opened(tmp_path) as memory, http_server.serve(memory, keep_anonymous=True) as server:
        with server.http() as client:
            _, usage = asked(client, more, max_tokens=2)
        assert cached(usage) == usage["prompt_tokens"] - 1


def test_another_model_of_the_same_shape_reuses_nothing(tmp_path: Path) -> None:
    config = tiny_models.LLAMA | {"max_position_embeddings": 2048}
    models = [tiny_models.write(tmp_path / str(seed), config, seed) for seed in (1, 2)]
    turns = [user("A beginning that both are told. " * 20)]
    said = []
    for model in (*models, models[0]):
        memory = AgentMemory(
            model=model, cache_dir=tmp_path / "store", memory_budget_mb=64, min_free_mb=0, kv_bits=None
        )
        with memory, http_server.serve(memory) as server, server.http() as client:
            said.append(asked(client, turns, session_id="both"))
    first, other, again = said
    assert cached(first[1]) == cached(other[1]) == 0
    assert (again[0], cached(again[1])) == (first[0], first[1]["prompt_tokens"] - 1)


def test_a_short_question_does_not_wait_for_a_long_answer(server: Running) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "long", "schema": LONG}}
    body = {"messages": [user("Count.")], "max_tokens": 8000, "stream": True, "response_format": form}
    with server.http() as client, client.stream("POST", CHAT, json=body) as long:
        lines = long.iter_lines()
        next(lines)
        for question in QUESTIONS:
            asked(client, [user(question)])
        assert server.memory.stats().running == 1
        assert next(line for line in lines if line).startswith("data: ")


def test_clients_without_a_session_do_not_mix(server: Running) -> None:
    opening = "The same beginning for all of us, which is quite long. " * 20
    names = ["Ada", "Bob", "Cleo", "Dan"]
    with server.http() as client:

        def told(name: str) -> str:
            turns = [{"role": "system", "content": opening}, user(f"My name is {name}. What is my name?")]
            return asked(client, turns)[0]

        alone = [told(name) for name in names]
        with ThreadPoolExecutor(4) as threads:
            assert list(threads.map(told, names)) == alone


def test_tools_reach_the_model_with_and_without_a_system_prompt(server: Running) -> None:
    with server.http() as client:
        for turns in ([user("Hi.")], [{"role": "system", "content": "Be brief."}, user("Hi.")]):
            _, plain = asked(client, turns)
            _, armed = asked(client, turns, tools=[TOOL], tool_choice="none")
            assert armed["prompt_tokens"] > plain["prompt_tokens"] + 10


@pytest.mark.parametrize("stream", [False, True])
def test_no_blank_of_an_answer_is_lost(server: Running, stream: bool) -> None:
    text = "def f(x):\n\tif x:\n        return  [x,   x]   \n\n\n<|x|> "
    form = {"type": "json_schema", "json_schema": {"name": "code", "schema": {"const": text}}}
    body = {"messages": [user("Code.")], "max_tokens": 400, "response_format": form, "stream": stream}
    with server.http() as client:
        answer = client.post(CHAT, json=body)
    if stream:
        events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        said = "".join(e["choices"][0]["delta"].get("content") or "" for e in events if e["choices"])
    else:
        said = answer.json()["choices"][0]["message"]["content"]
    assert json.loads(said) == text


def test_prompts_are_written_by_the_models_own_template_and_by_nothing_in_its_place(server: Running) -> None:
    turns = [{"role": "system", "content": "Be brief."}, user("Hi.")]
    written = made_tokenizers.tiny_chat().apply_chat_template(
        turns, tokenize=False, add_generation_prompt=True
    )
    with server.http() as client:
        assert client.post("/apply-template", json={"messages": turns}).json()["prompt"] == written
    # Without it the library that renders templates would refuse them.
    needed = [one for one in requires("agent-memory-mlx") or () if "extra ==" not in one]
    assert any(one.startswith("jinja2") for one in needed)


def test_no_more_is_said_to_be_cached_than_the_prompts_have_in_common(server: Running) -> None:
    with server.http() as client:
        asked(client, [user("The first subject is the sea. " * 20)], session_id="subjects")
        _, usage = asked(client, [user("Mountains are another one. " * 20)], session_id="subjects")
        # What the template writes before the words of a user.
        assert cached(usage) < 64


def test_what_two_agents_have_in_common_is_computed_once(server: Running) -> None:
    system = {"role": "system", "content": "A long system prompt that two agents have in common. " * 20}
    with server.http() as client:
        _, first = asked(client, [system, user("I am the first.")], session_id="common-1")
        _, second = asked(client, [system, user("And I the second one.")], session_id="common-2")
    assert cached(first) == 0
    assert cached(second) > 0.8 * second["prompt_tokens"]


def test_a_session_that_cannot_be_named_so_is_refused_before_anything_is_computed(server: Running) -> None:
    before = server.memory.stats().steps
    with server.http() as client:
        for name in ("a\u0000b", "x" * 600):
            body = {"messages": [user("Hi.")], "max_tokens": 4, "session_id": name}
            assert client.post(CHAT, json=body).status_code == 400
        assert server.memory.stats().steps == before
        asked(client, [user("Hi.")], session_id="user:1/../x y")


def test_a_retry_goes_on_with_what_its_first_try_had_computed(server: Running) -> None:
    body: dict[str, Any] = {
        "messages": [user("Some words that are new to everybody here. " * 70)],
        "session_id": "retry",
    }
    body |= {"max_tokens": 4, "stream": True}
    cancelled, events = server.memory.stats().cancelled, list[Any]()
    stop = server.memory.observe(events.append)
    with server.http() as client:
        with client.stream("POST", CHAT, json=body) as answer:
            assert answer.status_code == 200
            wait_until(lambda: any(isinstance(event, TurnProgress) for event in list(events)))
        stop()
        wait_until(lambda: server.memory.stats().cancelled > cancelled)
        _, usage = asked(client, body["messages"], session_id="retry", max_tokens=4)
    assert cached(usage) > 0


def test_ready_is_answered_while_a_long_prompt_is_computed(memory: AgentMemory) -> None:
    with http_server.serve(memory) as server, server.http() as client:
        assert client.get("/health/startup").json() == {"status": "started"}
        turns = [user("Words that nobody has ever said before in this place. " * 60)]
        ready = []
        with server.http() as other, ThreadPoolExecutor(1) as thread:
            answer = thread.submit(asked, other, turns, max_tokens=1)
            wait_until(lambda: memory.stats().running == 1 or answer.done())
            while not answer.done():
                ready.append(client.get("/health/ready").status_code)
                assert client.get("/metrics").status_code == 200
                # Asking without a pause would take more of the processor than the prompt does.
                time.sleep(0.02)
            answer.result()
    assert set(ready) == {200}
    assert len(ready) > 5


def test_what_an_agent_asks_beside_its_conversation_is_read_and_not_kept(server: Running) -> None:
    tool = {"name": "look", "input_schema": {"type": "object", "properties": {}}}
    turn = {"messages": [user("Look around. " * 20)], "max_tokens": 4, "tools": [tool]}
    title = {"messages": [user("Look around. " * 20)], "max_tokens": 4, "system": "Name this conversation."}
    with server.http(**{"X-Session-ID": "beside"}) as client:

        def used(body: dict[str, Any]) -> tuple[int, int]:
            usage = client.post("/v1/messages", json=body).json()["usage"]
            return usage["cache_creation_input_tokens"], usage["input_tokens"]

        assert used(turn)[0] > 0
        kept = tokens_of(server, "beside")
        assert (used(title)[0], used(title)[1] > 0) == (0, True)
        server.memory.flush()
        assert tokens_of(server, "beside") == kept
        # A plain chat begins in the same way, and is kept.
        with server.http(**{"X-Session-ID": "plain"}) as other:
            assert other.post("/v1/messages", json=title).json()["usage"]["cache_creation_input_tokens"] > 0


def tokens_of(server: Running, session: str) -> int:
    """The tokens of all branches of a session."""
    server.memory.flush()
    (info,) = [info for info in server.memory.sessions() if info.session_id == session]
    return info.tokens


def test_an_answer_says_in_its_headers_what_was_reused_and_what_was_ignored(server: Running) -> None:
    body = {
        "messages": [user("Headers.")],
        "max_tokens": 2,
        "tools": [{"type": "web_search_20260101", "name": "w"}],
    }
    with server.http() as client:
        for _ in range(2):
            answer = client.post("/v1/messages", json=body, headers={"X-Session-ID": "headers"})
            said = dict(part.split("=") for part in answer.headers["x-agent-memory"].split("; "))
            usage = answer.json()["usage"]
            assert int(said["cached"]) == usage["cache_read_input_tokens"]
            assert int(said["computed"]) == usage["cache_creation_input_tokens"]
            assert answer.headers["x-agent-memory-ignored"] == "web_search_20260101"
        response = {"input": "Hi.", "max_output_tokens": 2, "tools": [{"type": "web\r\nsearch"}]}
        ignored = client.post("/v1/responses", json=response).headers["x-agent-memory-ignored"]
        assert ignored == "web__search"
        assert client.post("/api/event_logging/batch", json={"events": []}).status_code == 204


def test_a_client_says_how_long_it_waits(server: Running) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "long", "schema": LONG}}
    body = {"messages": [user("Count.")], "max_tokens": 8000, "response_format": form}
    with server.http() as client:
        answer = client.post(CHAT, json=body, headers={"X-Request-Timeout": "0.3"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
        for wrong in ("soon", "-1", "nan", "inf"):
            refused = client.post(CHAT, json=body, headers={"X-Request-Timeout": wrong})
            assert (refused.status_code, wrong in refused.text) == (400, True)


def test_a_full_server_is_not_ready(memory: AgentMemory) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "long", "schema": LONG}}
    body = {"messages": [user("Count.")], "max_tokens": 8000, "stream": True, "response_format": form}
    with http_server.serve(memory, max_in_flight=1) as server, server.http() as client:
        with client.stream("POST", CHAT, json=body) as long:
            lines = long.iter_lines()
            next(lines)
            assert client.get("/health/ready").json()["reason"] == "queue_full"
        wait_until(lambda: client.get("/health/ready").status_code == 200)


def test_before_the_model_is_there_the_server_has_not_started(tmp_path: Path) -> None:
    memory = AgentMemory(model=str(tmp_path / "nothing"), cache_dir=None)
    with memory, http_server.serve(memory, ready=False) as server, server.http() as client:
        assert client.get("/health/startup").status_code == 503
        assert client.get("/health/live").status_code == 200


CANARY = "canary-7f3a"


def leave_a_canary(client: httpx.Client) -> list[str]:
    """Say the word wherever a client can say one, and return the ids of what is kept."""
    text = f"The word is {CANARY}. " * 10
    asked(client, [user(text)], session_id=f"session-{CANARY}")
    message = {"messages": [user(text)], "max_tokens": 4, "thread": {"type": "create"}}
    message["diagnostics"] = {"previous_message_id": None}
    kept = [client.post("/v1/messages", json=message).json()["id"]]
    response = {"input": text, "max_output_tokens": 4, "metadata": {"word": CANARY}}
    kept.append(client.post("/v1/responses", json=response).json()["id"])
    begun = {"items": [user(text)], "metadata": {"word": CANARY}}
    kept.append(client.post("/v1/conversations", json=begun).json()["id"])
    agent = {"agent_id": f"agent-{CANARY}", "system_prompt": text}
    assert client.post("/v1/agents", json=agent).status_code == 201
    return kept


def test_a_word_of_one_key_is_never_read_by_another(tmp_path: Path) -> None:
    memory = AgentMemory(
        cache_dir=tmp_path, memory_budget_mb=128, min_free_mb=0, block_tokens=64, kv_bits=None
    )
    with memory, http_server.serve(memory, api_keys=("owner", "other")) as server:
        with server.http(**{"x-api-key": "owner"}) as owner:
            kept = leave_a_canary(owner)
        with server.http(**{"x-api-key": "other"}) as other:
            paths = other.get("/openapi.json").json()["paths"]
            names = [*kept, f"agent-{CANARY}", f"session-{CANARY}"]
            for path, name in itertools.product((p for p, ways in paths.items() if "get" in ways), names):
                filled = path
                for part in ("response_id", "conversation_id", "agent_id", "name", "session_id"):
                    filled = filled.replace(f"{{{part}}}", name)
                text = other.get(filled).text
                # An error may repeat the name that was asked for.
                assert CANARY not in text.replace(name, ""), path
            thread = {"type": "continue", "previous_message_id": kept[0]}
            said = {"messages": [user("What is the word?")], "max_tokens": 4, "thread": thread}
            assert other.post("/v1/messages", json=said).status_code == 404
            for more in ({"previous_response_id": kept[1]}, {"conversation": kept[2]}):
                asked_on = {"input": "What is the word?", "max_output_tokens": 4, **more}
                assert other.post("/v1/responses", json=asked_on).status_code in (400, 404)
            compared = {"messages": [user("Hi.")], "max_tokens": 4}
            compared["diagnostics"] = {"previous_message_id": kept[0]}
            found = other.post("/v1/messages", json=compared).json()["diagnostics"]
            assert found["cache_miss_reason"]["type"] == "previous_message_not_found"
            _, usage = asked(other, [user(f"The word is {CANARY}. " * 10)], session_id=f"session-{CANARY}")
            assert cached(usage) == 0


def test_no_id_comes_twice() -> None:
    ids = [new_id(prefix) for prefix in ("msg_", "resp_", "chatcmpl-", "fc_") for _ in range(10_000)]
    # Also without what they begin with: clients take some of them for others.
    assert len({name[-32:] for name in ids}) == len(ids)


def test_every_answer_and_everything_in_it_has_an_id_of_its_own(server: Running) -> None:
    ids: list[str] = []
    bodies: dict[str, dict[str, Any]] = {
        CHAT: {"messages": [user("Hi.")], "max_tokens": 2},
        "/v1/messages": {"messages": [user("Hi.")], "max_tokens": 2},
        "/v1/responses": {"input": "Hi.", "max_output_tokens": 2},
        "/v1/completions": {"prompt": "Hi.", "max_tokens": 2},
    }
    with server.http() as client:
        for path, body in bodies.items():
            for stream in (False, True):
                for _ in range(3):
                    answer = client.post(path, json=body | {"stream": stream})
                    # Of a stream, whose events repeat theirs.
                    found = re.findall(r'"id": ?"([a-z]+[-_][^"]+)"', answer.text)
                    ids += [*dict.fromkeys(found), answer.headers["x-request-id"]]
    assert len(ids) == len(set(ids)) >= 4 * 2 * 3 * 2
