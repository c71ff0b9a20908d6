"""Responses, as OpenAI's own client reads them."""

from __future__ import annotations

import itertools
import json
from typing import Any

import openai
import pytest
from pydantic import BaseModel
from support.http_server import Running

ADA = "My name is Ada."
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "name": "get_weather", "description": "The weather.", "parameters": PARAMETERS}
QUESTION = "What is the weather in Paris?"


def ask(server: Running, given: Any = ADA, session: str | None = None, **options: Any) -> Any:
    headers = {"Session-Id": session} if session else {}
    said: dict[str, Any] = {"model": "tiny-chat", "input": given, "max_output_tokens": 24, "temperature": 0}
    return server.openai(**headers).responses.create(**said | options)


def stream(server: Running, given: Any = ADA, **options: Any) -> tuple[list[Any], Any]:
    """The events of a stream, and the response at its end."""
    said: dict[str, Any] = {"model": "tiny-chat", "input": given, "max_output_tokens": 24, "temperature": 0}
    with server.openai().responses.stream(**said | options) as events:
        sent = list(events)
    return sent, sent[-1].response


def without_ids(response: Any) -> list[dict[str, Any]]:
    items = [item.model_dump(exclude={"id", "call_id", "parsed_arguments"}) for item in response.output]
    for item in items:
        for part in item.get("content") or ():
            part.pop("parsed", None)
    return items


def test_a_stream_and_a_whole_answer_say_the_same_and_what_the_memory_says(server: Running) -> None:
    answer = ask(server)
    sent, streamed = stream(server)
    said = server.memory.chat([{"role": "user", "content": ADA}], max_tokens=24, temperature=0)
    assert answer.output_text == streamed.output_text == said.text
    assert without_ids(answer) == without_ids(streamed)
    assert answer.status == streamed.status == "completed"
    assert answer.usage.input_tokens == said.report.usage.prompt_tokens
    assert answer.usage.output_tokens == said.report.usage.completion_tokens
    assert "".join(e.delta for e in sent if e.type == "response.output_text.delta") == said.text


def test_the_events_of_a_stream_come_in_the_protocols_order(server: Running) -> None:
    sent, _ = stream(server)
    assert [event.sequence_number for event in sent] == list(range(len(sent)))
    names = [name for name, _ in itertools.groupby(event.type for event in sent)]
    assert names == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]


def test_a_second_turn_computes_only_what_is_new(server: Running) -> None:
    first = ask(server, session="ada")
    given = [{"role": "user", "content": ADA}, *first.output, {"role": "user", "content": "What is my name?"}]
    second = ask(server, [g if isinstance(g, dict) else g.model_dump() for g in given], session="ada")
    assert second.usage.input_tokens_details.cached_tokens >= first.usage.total_tokens - 1
    assert "Ada" in second.output_text


@pytest.mark.parametrize("tools", [[WEATHER], [{"type": "namespace", "name": "sky", "tools": [WEATHER]}]])
def test_a_forced_call_and_its_result(server: Running, tools: list[dict[str, Any]]) -> None:
    options = {"tools": [*tools, {"type": "web_search"}], "max_output_tokens": 100}
    forced = ask(server, QUESTION, tool_choice="required", **options)
    _, streamed = stream(server, QUESTION, tool_choice="required", **options)
    assert without_ids(forced) == without_ids(streamed)
    (call,) = forced.output
    assert (call.type, call.name) == ("function_call", "get_weather")
    assert call.namespace == ("sky" if tools[0]["type"] == "namespace" else None)
    assert set(json.loads(call.arguments)) == {"city"}
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "Rain."}
    history = [{"role": "user", "content": QUESTION}, call.model_dump(), result]
    second = ask(server, history, **options)
    assert second.usage.input_tokens_details.cached_tokens >= forced.usage.input_tokens


def test_a_custom_tool_is_called_with_plain_text(server: Running) -> None:
    options = {
        "tools": [{"type": "custom", "name": "note"}],
        "tool_choice": "required",
        "max_output_tokens": 200,
    }
    sent, streamed = stream(server, "Write it down.", **options)
    (call,) = streamed.output
    assert (call.type, call.name) == ("custom_tool_call", "note")
    (done,) = [event for event in sent if event.type == "response.custom_tool_call_input.done"]
    assert done.input == call.input
    result = {"type": "custom_tool_call_output", "call_id": call.call_id, "output": "Done."}
    again = ask(server, [{"role": "user", "content": "Write it down."}, call.model_dump(), result], **options)
    assert again.usage.input_tokens_details.cached_tokens >= streamed.usage.input_tokens


class Person(BaseModel):
    name: str


def test_an_answer_fits_its_schema(server: Running) -> None:
    options: Any = {"model": "tiny-chat", "input": "Who?", "max_output_tokens": 100}
    parsed = server.openai().responses.parse(text_format=Person, **options)
    assert isinstance(parsed.output_parsed, Person)


def test_what_an_agent_sends_before_its_user_speaks_is_read(server: Running) -> None:
    given = [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": ADA}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "A name."}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Hello."}]},
        {"type": "message", "role": "user", "content": "What is my name?"},
    ]
    more = {"include": ["reasoning.encrypted_content"], "store": False, "prompt_cache_key": "codex"}
    answer = ask(server, given, **more, user="ada")
    assert "Ada" in answer.output_text
    assert (answer.prompt_cache_key, answer.user) == ("codex", "ada")
    assert "codex" in {info.session_id for info in server.memory.sessions("default")}


def test_what_is_repeated_need_not_be_valid_unicode(server: Running) -> None:
    body = {"input": ADA, "max_output_tokens": 4, "metadata": {"a": "\ud800"}}
    with server.http() as client:
        for stream in (False, True):
            text = json.dumps(body | {"stream": stream})
            assert client.post("/v1/responses", content=text).status_code == 200


def test_an_answer_that_was_cut_is_incomplete(server: Running) -> None:
    sent, streamed = stream(server, max_output_tokens=2)
    assert streamed.status == ask(server, max_output_tokens=2).status == "incomplete"
    assert streamed.incomplete_details.reason == "max_output_tokens"
    assert sent[-1].type == "response.incomplete"


def test_the_tokens_of_an_input_are_counted(server: Running) -> None:
    counted = server.openai().responses.input_tokens.count(model="tiny-chat", input=ADA)
    assert counted.input_tokens == ask(server).usage.input_tokens


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_not_found", "resp_1"),
        ({"background": True}, "unsupported_value", "background"),
        ({"prompt": {"id": "pmpt_1"}}, "unsupported_value", "prompt"),
        ({"input": "long " * 9000}, "context_length_exceeded", "maximum context length is 8192"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "unsupported_value", "images"),
    ],
)
@pytest.mark.parametrize("streams", [False, True])
def test_what_cannot_be_answered_is_refused_before_a_stream_begins(
    server: Running, streams: bool, options: dict[str, Any], code: str, says: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=says) as refused:
        ask(server, stream=streams, **options)
    assert refused.value.code == code
