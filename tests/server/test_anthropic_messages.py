"""Messages, as Anthropic's own client reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import pytest
from anthropic.types import ModelInfo
from support import http_server, tiny_models
from support.http_server import Running

from agent_memory_core import AgentMemory

ADA = {"role": "user", "content": "My name is Ada."}
WEATHER = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


def asked(*messages: Any, **options: Any) -> dict[str, Any]:
    return {"model": "tiny-chat", "max_tokens": 24, "messages": list(messages) or [ADA], **options}


def ask(server: Running, *messages: Any, session: str | None = None, **options: Any) -> Any:
    headers = {"X-Session-ID": session} if session else {}
    return server.anthropic(**headers).messages.create(**asked(*messages, **options))


def events(server: Running, *messages: Any, **options: Any) -> list[tuple[str, dict[str, Any]]]:
    """The names and data of a stream, as they are sent."""
    body = asked(*messages, stream=True, **options)
    with server.http() as client:
        text = client.post("/v1/messages", json=body).text
    sent = []
    for event in text.strip().split("\n\n"):
        name, data = event.split("\n")
        sent.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return sent


def test_a_stream_and_a_whole_answer_say_the_same_and_what_the_memory_says(server: Running) -> None:
    answer = ask(server)
    with server.anthropic().messages.stream(**asked()) as stream:
        streamed = stream.get_final_message()
    said = server.memory.chat([ADA], max_tokens=24, temperature=0)
    assert [block.type for block in answer.content] == ["text"]
    assert answer.content[0].text == streamed.content[0].text == said.text
    assert answer.stop_reason == streamed.stop_reason == "end_turn"
    assert streamed.usage.output_tokens == answer.usage.output_tokens == said.report.usage.completion_tokens
    counted = answer.usage
    total = counted.input_tokens + counted.cache_read_input_tokens + counted.cache_creation_input_tokens
    assert total == said.report.usage.prompt_tokens
    assert answer.id != streamed.id


def test_the_events_of_a_stream_come_in_the_protocols_order(server: Running) -> None:
    sent = events(server)
    assert all(name == data["type"] for name, data in sent)
    names = [name for name, _ in sent]
    deltas = len(names) - 5
    assert deltas > 3
    assert names == [
        "message_start",
        "content_block_start",
        *["content_block_delta"] * deltas,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    start, end = sent[0][1]["message"], sent[-2][1]
    assert (start["content"], start["stop_reason"]) == ([], None)
    assert start["usage"]["cache_read_input_tokens"] == end["usage"]["cache_read_input_tokens"]


def test_a_second_turn_reads_what_the_first_one_created(server: Running) -> None:
    first = ask(server, session="ada")
    assert first.usage.input_tokens == 0, "what a session computes is in its cache"
    assert first.usage.cache_creation_input_tokens > 0
    history = [ADA, {"role": "assistant", "content": first.content}]
    marked = {"type": "text", "text": "What is my name?", "cache_control": {"type": "ephemeral"}}
    second = ask(server, *history, {"role": "user", "content": [marked]}, session="ada")
    assert "Ada" in second.content[0].text
    known = first.usage.cache_read_input_tokens + first.usage.cache_creation_input_tokens
    assert second.usage.cache_read_input_tokens >= known + first.usage.output_tokens - 1


def test_tokens_are_counted_as_a_turn_counts_them(server: Running) -> None:
    body = {"model": "tiny-chat", "messages": [ADA], "tools": [WEATHER], "system": "Be brief."}
    counted = server.anthropic().messages.count_tokens(**body)
    usage = ask(server, tools=[WEATHER], system="Be brief.").usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_a_forced_call_and_its_result(server: Running, stream: bool) -> None:
    question = {"role": "user", "content": "What is the weather in Paris?"}
    options: dict[str, Any] = {"tools": [WEATHER], "max_tokens": 100}
    forced = options | {"tool_choice": {"type": "tool", "name": "get_weather"}}
    if stream:
        with server.anthropic().messages.stream(**asked(question, **forced)) as told:
            answer = told.get_final_message()
    else:
        answer = ask(server, question, **forced)
    assert answer.stop_reason == "tool_use"
    (call,) = answer.content
    assert (call.type, call.name, set(call.input)) == ("tool_use", "get_weather", {"city"})
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "Rain."}]}
    after = [question, {"role": "assistant", "content": answer.content}]
    second = ask(server, *after, {"role": "user", "content": [result]}, **options)
    usage = answer.usage
    assert second.usage.cache_read_input_tokens >= usage.input_tokens + usage.cache_read_input_tokens


def test_results_stand_before_the_text_of_their_message_and_pictures_in_them_are_named(
    server: Running,
) -> None:
    call = {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Paris"}}
    picture = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [picture]}
    user = {"role": "user", "content": [{"type": "text", "text": "And now?"}, result]}
    turned = {"role": "user", "content": [result, {"type": "text", "text": "And now?"}]}
    first = [ADA, {"role": "assistant", "content": [call]}]
    client = server.anthropic()
    counts = {
        client.messages.count_tokens(model="", messages=[*first, m]).input_tokens for m in (user, turned)
    }
    assert len(counts) == 1


def test_a_system_message_amid_the_others_keeps_its_place(server: Running) -> None:
    late = {"role": "system", "content": "Available agents: none."}
    first = ask(server, ADA, late, session="late")
    more = [ADA, late, {"role": "assistant", "content": first.content}, {"role": "user", "content": "And?"}]
    second = ask(server, *more, session="late")
    assert second.usage.cache_read_input_tokens >= first.usage.cache_creation_input_tokens - 1


def test_what_is_meant_for_a_provider_is_no_part_of_the_prompt(server: Running) -> None:
    def count(*blocks: str) -> Any:
        system = [{"type": "text", "text": block} for block in blocks]
        return server.anthropic().messages.count_tokens(model="", messages=[ADA], system=system).input_tokens

    assert count("x-anthropic-billing-header: a=1;", "Be brief.") == count("Be brief.")


def test_the_stop_sequence_is_named(server: Running) -> None:
    answer = ask(server, stop_sequences=["zzz", "you"])
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", "you")
    assert answer.content[0].text == "Nice to meet "
    assert ask(server, max_tokens=3).stop_reason == "max_tokens"


def test_an_answer_that_was_begun_goes_on(server: Running) -> None:
    answer = ask(server, ADA, {"role": "assistant", "content": "Nice to meet"})
    assert answer.content[0].text == " you, Ada."


def test_an_answer_fits_its_schema(server: Running) -> None:
    schema = {"type": "object", "properties": {"title": {"enum": ["a", "b"]}}, "required": ["title"]}
    config = {"effort": "high", "format": {"type": "json_schema", "schema": schema}}
    answer = ask(server, max_tokens=100, output_config=config, tools=[])
    assert json.loads(answer.content[0].text)["title"] in ("a", "b")


@pytest.mark.parametrize(
    ("options", "error", "kind", "says"),
    [
        ({"model": "claude"}, anthropic.NotFoundError, "not_found_error", "'claude'"),
        ({"max_tokens": 0}, anthropic.BadRequestError, "invalid_request_error", "max_tokens=0"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            anthropic.BadRequestError,
            "invalid_request_error",
            "messages.0.content.0: images are not supported",
        ),
        (
            {"messages": [{"role": "user", "content": "long " * 9000}]},
            anthropic.BadRequestError,
            "invalid_request_error",
            "tokens > 8192 maximum",
        ),
        ({"tool_choice": {"type": "any"}}, anthropic.BadRequestError, "invalid_request_error", "tool_choice"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_answered_is_refused_before_a_stream_begins(
    server: Running,
    stream: bool,
    options: dict[str, Any],
    error: type[anthropic.APIStatusError],
    kind: str,
    says: str,
) -> None:
    with pytest.raises(error) as refused:
        server.anthropic().messages.create(**asked(stream=stream, **options))
    body: Any = refused.value.body
    assert body["type"] == "error"
    assert body["error"]["type"] == kind
    assert says in body["error"]["message"]
    assert body["request_id"] == refused.value.request_id


def test_models_are_listed(server: Running) -> None:
    client = server.anthropic()
    assert [model.id for model in client.models.list()] == ["tiny-chat"]
    assert client.models.retrieve("tiny-chat").type == "model"
    with server.http() as http:
        entry = http.get("/v1/models/tiny-chat").json()
    read = ModelInfo.model_validate(entry)
    assert read.capabilities is not None
    assert read.capabilities.structured_outputs.supported
    assert not read.capabilities.thinking.supported
    assert (read.lifecycle, entry["loaded"]) == ("active", True)


# A model that thinks


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder: Path = tmp_path_factory.mktemp("models") / "thinking"
    model = tiny_models.thinking_chat(folder)
    memory = AgentMemory(model=model, cache_dir=None, memory_budget_mb=128)
    with memory, http_server.serve(memory, any_model=True) as running:
        yield running


WHO = {"role": "user", "content": "What is my name?"}


def test_thoughts_are_blocks_of_their_own_and_can_come_back(thinker: Running) -> None:
    with thinker.anthropic().messages.stream(**asked(WHO, thinking={"type": "adaptive"})) as told:
        streamed = told.get_final_message()
    answer = ask(thinker, WHO)
    thought, text = answer.content
    assert (thought.type, text.type) == ("thinking", "text")
    assert thought.thinking
    assert thought.signature
    assert [block.model_dump() for block in streamed.content] == [
        block.model_dump() for block in answer.content
    ]
    again = ask(thinker, WHO, {"role": "assistant", "content": answer.content}, ADA)
    assert again.usage.cache_read_input_tokens > 0


def test_thoughts_have_a_field_of_their_own_in_chat_completions(thinker: Running) -> None:
    options: Any = {"model": "tiny-chat", "messages": [WHO], "max_tokens": 24, "temperature": 0}
    answer = thinker.openai().chat.completions.create(**options)
    message = answer.choices[0].message.model_dump()
    chunks = [
        c.choices[0].delta.model_dump()
        for c in thinker.openai().chat.completions.create(**options, stream=True)
    ]
    assert message["reasoning_content"]
    assert "".join(c.get("reasoning_content") or "" for c in chunks) == message["reasoning_content"]
    assert "".join(c["content"] or "" for c in chunks) == message["content"]

    assert answer.usage.completion_tokens_details.reasoning_tokens
