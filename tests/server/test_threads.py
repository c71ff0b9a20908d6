"""Conversations that the server holds: by the id of an answer, as a conversation, and as Anthropic's threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from support import http_server
from support.http_server import Running

from agent_memory_core import AgentMemory

ADA = "My name is Ada."
NAME = "What is my name?"
OPTIONS: dict[str, Any] = {"model": "tiny-chat", "max_output_tokens": 24, "temperature": 0}
MESSAGE: dict[str, Any] = {"model": "tiny-chat", "max_tokens": 24, "extra_body": {"temperature": 0}}
WEATHER = {"name": "get_weather", "description": "The weather.", "input_schema": {"type": "object"}}


def respond(server: Running, given: Any, **options: Any) -> Any:
    return server.openai().responses.create(**OPTIONS | {"input": given} | options)


@contextmanager
def opened(folder: Path, **settings: Any) -> Iterator[Running]:
    """A server on a store of its own, whose memory ends with it."""
    memory = AgentMemory(cache_dir=folder, memory_budget_mb=128, min_free_mb=0, block_tokens=64, kv_bits=None)
    with memory, http_server.serve(memory, **settings) as running:
        yield running


def test_an_answer_is_gone_on_from_by_its_id_also_after_a_restart(tmp_path: Path) -> None:
    with opened(tmp_path) as server:
        first = respond(server, ADA)
        assert first.store
    with opened(tmp_path) as server:
        second = respond(server, NAME, previous_response_id=first.id)
        assert "Ada" in second.output_text
        assert second.previous_response_id == first.id
        assert second.usage.input_tokens_details.cached_tokens >= first.usage.total_tokens - 1
        # It is what the same conversation says when it is sent as a whole.
        turns = [{"role": "user", "content": ADA}, *(item.model_dump() for item in first.output)]
        whole = respond(server, [*turns, {"role": "user", "content": NAME}], store=False)
        assert whole.output_text == second.output_text
        assert whole.usage.input_tokens == second.usage.input_tokens
        # Any earlier answer can be gone on from, as often as one likes.
        other = respond(server, "Hello.", previous_response_id=first.id)
        assert other.usage.input_tokens_details.cached_tokens >= first.usage.total_tokens - 1


def test_a_kept_response_can_be_read_listed_and_deleted(server: Running) -> None:
    client: Any = server.openai()
    first = respond(server, ADA, metadata={"topic": "names"})
    with client.responses.stream(**OPTIONS, input=NAME, previous_response_id=first.id) as stream:
        second = stream.get_final_response()
    read = client.responses.retrieve(second.id)
    assert read.output_text == second.output_text
    assert client.responses.retrieve(first.id).metadata == {"topic": "names"}
    listed = client.responses.input_items.list(second.id, limit=2, order="asc")
    texts = [item.content[0].text for item in listed]
    assert texts == [ADA, first.output_text, NAME]
    assert [item.role for item in client.responses.input_items.list(second.id)] == [
        "user",
        "assistant",
        "user",
    ]
    counted = client.responses.input_tokens.count(
        model="tiny-chat", input=NAME, previous_response_id=first.id
    )
    assert counted.input_tokens == second.usage.input_tokens
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.delete(first.id)
    with pytest.raises(openai.BadRequestError, match="not found"):
        respond(server, NAME, previous_response_id=first.id)
    # What went on from it stays.
    assert respond(server, "And?", previous_response_id=second.id).output_text


def test_a_client_that_names_its_session_has_one_however_often_it_begins_anew(server: Running) -> None:
    said = [{"role": "user", "content": ADA}]
    for _ in range(2):
        answer = respond(server, said, prompt_cache_key="replays")
        said += [*(item.model_dump() for item in answer.output), {"role": "user", "content": NAME}]
    assert answer.store
    follow = respond(server, "Hello.", previous_response_id=answer.id)
    assert follow.usage.input_tokens_details.cached_tokens >= answer.usage.total_tokens - 1
    server.memory.flush()
    tokens = {info.session_id: info.tokens for info in server.memory.sessions("default")}
    assert tokens["replays"] >= follow.usage.total_tokens - 1


def test_an_item_of_a_kept_response_can_stand_for_itself_and_only_for_its_key(memory: AgentMemory) -> None:
    with http_server.serve(memory, api_keys=("first", "second")) as server:
        client: Any = server.openai("first")
        first = client.responses.create(**OPTIONS, input=ADA, store=True)
        (item,) = first.output
        spoken = [{"role": "user", "content": ADA}, item.model_dump(), {"role": "user", "content": NAME}]
        for reference in ({"type": "item_reference", "id": item.id}, {"id": item.id}):
            referring = [spoken[0], reference, spoken[2]]
            answer = client.responses.create(**OPTIONS, input=referring, store=False)
            assert answer.usage.input_tokens_details.cached_tokens >= first.usage.total_tokens - 1
            counted = client.responses.input_tokens.count(model="tiny-chat", input=referring)
            assert answer.usage.input_tokens == counted.input_tokens
        assert client.responses.create(**OPTIONS, input=spoken, store=False).output_text == answer.output_text
        for key, name in (("second", item.id), ("first", "msg_1"), ("first", f"{item.id}1")):
            with pytest.raises(openai.NotFoundError, match="is not held"):
                server.openai(key).responses.create(**OPTIONS, input=[{"type": "item_reference", "id": name}])


def test_what_is_not_stored_cannot_be_found(server: Running) -> None:
    said = respond(server, ADA, store=False)
    assert not said.store
    with pytest.raises(openai.NotFoundError):
        server.openai().responses.retrieve(said.id)
    with pytest.raises(openai.BadRequestError) as caught:
        respond(server, NAME, previous_response_id=said.id)
    assert caught.value.code == "previous_response_not_found"


def test_a_conversation_grows_with_its_responses(server: Running) -> None:
    client = server.openai()
    made = client.conversations.create(
        items=[{"type": "message", "role": "system", "content": "Be brief."}], metadata={"a": "b"}
    )
    assert client.conversations.retrieve(made.id).metadata == {"a": "b"}
    first = respond(server, ADA, conversation=made.id)
    second = respond(server, NAME, conversation={"id": made.id})
    assert second.conversation.id == made.id
    assert "Ada" in second.output_text
    assert second.usage.input_tokens_details.cached_tokens >= first.usage.total_tokens - 1
    client.conversations.items.create(made.id, items=[{"role": "user", "content": "One more."}])
    items = list(client.conversations.items.list(made.id, order="asc", limit=2))
    assert [item.role for item in items] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert client.conversations.update(made.id, metadata={"c": "d"}).metadata == {"c": "d"}
    assert client.conversations.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        respond(server, NAME, conversation=made.id)
    with pytest.raises(openai.BadRequestError, match="exclude"):
        respond(server, NAME, conversation="conv_1", previous_response_id="resp_1")


def test_one_key_never_goes_on_from_the_answer_of_another(memory: AgentMemory) -> None:
    with http_server.serve(memory, api_keys=("first", "second")) as server:
        said = server.openai("first").responses.create(**OPTIONS, input=ADA)
        other = server.openai("second")
        with pytest.raises(openai.NotFoundError):
            other.responses.retrieve(said.id)
        with pytest.raises(openai.NotFoundError):
            other.responses.delete(said.id)
        with pytest.raises(openai.BadRequestError, match="not found"):
            other.responses.create(**OPTIONS, input=NAME, previous_response_id=said.id)
        assert server.openai("first").responses.retrieve(said.id).id == said.id


def test_whoever_drops_a_namespace_drops_what_was_said_in_it(tmp_path: Path) -> None:
    with opened(tmp_path, admin_key="admin") as server:
        said = respond(server, "A canary sang.")
        with server.http(**{"X-Admin-Key": "admin"}) as http:
            server.memory.flush()
            dropped = http.request("DELETE", "/admin/caches", json={"scope": "all", "confirm": True})
            assert dropped.status_code == 200
        with pytest.raises(openai.NotFoundError):
            server.openai().responses.retrieve(said.id)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert (tmp_path / "server.db").stat().st_mode & 0o777 == 0o600
    assert not [file for file in files if b"canary" in file.read_bytes()]


def test_a_thread_holds_the_system_prompt_and_the_tools(server: Running) -> None:
    thread = server.anthropic().beta.messages.thread(**MESSAGE, system="Be brief.", tools=[WEATHER])
    first = thread.send({"role": "user", "content": ADA})
    second = thread.send({"role": "user", "content": NAME})
    whole = server.anthropic().messages.create(
        **MESSAGE,
        system="Be brief.",
        tools=[WEATHER],
        messages=[
            {"role": "user", "content": ADA},
            {"role": "assistant", "content": first.content},
            {"role": "user", "content": NAME},
        ],
    )
    assert [block.model_dump() for block in whole.content] == [
        block.model_dump(exclude={"parsed_output"}) for block in second.content
    ]
    used = second.usage
    assert used.cache_read_input_tokens > first.usage.input_tokens
    with thread.stream({"role": "user", "content": "And now?"}) as stream:
        third = stream.get_final_message()
    assert third.usage.cache_read_input_tokens > used.cache_read_input_tokens


def test_a_thread_that_is_lost_is_sent_again(server: Running) -> None:
    thread: dict[str, Any] = {"type": "continue", "previous_message_id": "msg_1"}
    message = {"role": "user", "content": ADA}
    with pytest.raises(anthropic.NotFoundError) as caught:
        server.anthropic().beta.messages.create(
            model="tiny-chat", max_tokens=4, messages=[message], thread=thread
        )
    body: Any = caught.value.body
    assert body["error"]["details"] == {"error_code": "thread_not_found"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"system": "Be wordy."}, "system_changed"),
        ({"tools": []}, "tools_changed"),
        ({"model": "default"}, "model_changed"),
        ({"messages": [{"role": "user", "content": "My name is Bob."}]}, "messages_changed"),
        ({"diagnostics": {"previous_message_id": "msg_1"}}, "previous_message_not_found"),
    ],
)
def test_a_client_is_told_what_changed_in_its_prompt(
    server: Running, change: dict[str, Any], reason: str | None
) -> None:
    ask = server.anthropic(**{"X-Session-ID": f"diagnosed-{reason}"}).messages.create
    turns = [{"role": "user", "content": ADA}]
    body = MESSAGE | {"system": "Be brief.", "tools": [WEATHER]}
    first = ask(**body, messages=turns, diagnostics={"previous_message_id": None})
    assert first.diagnostics is None
    turns += [{"role": "assistant", "content": first.content}, {"role": "user", "content": NAME}]
    again = body | {"messages": turns, "diagnostics": {"previous_message_id": first.id}} | change
    second = ask(**again)
    found = second.diagnostics and second.diagnostics.cache_miss_reason
    assert (found and found.type) == reason
    if reason in ("system_changed", "messages_changed"):
        assert found.cache_missed_input_tokens > 0


def test_openais_clients_are_told_the_same(server: Running) -> None:
    first = respond(server, ADA, instructions="Be brief.")
    for more, kind in (
        ({"previous_response_id": first.id, "instructions": "Be brief."}, "cache_hit"),
        ({"previous_response_id": first.id, "instructions": "Be very wordy indeed."}, "cache_miss"),
    ):
        options = {"prompt_cache_options": {"comparison_response_id": first.id}}
        said = respond(server, NAME, **more, **options)
        assert said.prompt_cache_diagnostics.type == kind
    options = {"prompt_cache_options": {"comparison_response_id": "resp_1"}}
    assert respond(server, ADA, **options).prompt_cache_diagnostics.type == "comparison_response_not_found"
    assert first.prompt_cache_diagnostics is None
