"""Chat completions, as OpenAI's own client reads them."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel, Field
from support import http_server
from support.http_server import Running, wait_until

from agent_memory_core import AgentMemory, ChatRequest, Delta, Message, SessionKey, ToolCallPiece
from agent_memory_core.server.openai_chat import ChatWriter
from agent_memory_core.server.sessions import Session
from agent_memory_core.server.turns import Call

ADA = {"role": "user", "content": "My name is Ada."}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


LARGE = {"type": "json_schema", "json_schema": {"name": "large", "schema": {"description": "x" * 300_000}}}


def ask(server: Running, *messages: Any, session: str | None = None, **options: Any) -> Any:
    headers = {"X-Session-ID": session} if session else {}
    said: dict[str, Any] = {"model": "tiny-chat", "messages": list(messages) or [ADA], "max_tokens": 24}
    return server.openai(**headers).chat.completions.create(**{**said, "temperature": 0, **options})


def whole(chunks: list[ChatCompletionChunk]) -> tuple[str, str | None]:
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    (finish,) = [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason]
    return text, finish


def test_a_stream_and_a_whole_answer_say_the_same_and_what_the_memory_says(server: Running) -> None:
    answer: ChatCompletion = ask(server, logprobs=True, top_logprobs=2)
    chunks = list(
        ask(server, stream=True, stream_options={"include_usage": True}, logprobs=True, top_logprobs=2)
    )
    said = server.memory.chat([ADA], max_tokens=24, temperature=0)
    assert answer.choices[0].message.content == said.text
    assert whole(chunks) == (said.text, "stop")
    assert [c.choices for c in chunks].index([]) == len(chunks) - 1, "the usage comes last"
    assert answer.usage is not None
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == answer.usage.total_tokens == said.report.usage.total_tokens
    assert answer.choices[0].logprobs is not None
    tokens = answer.choices[0].logprobs.content
    streamed = [t for c in chunks if c.choices and (p := c.choices[0].logprobs) for t in p.content or ()]
    assert tokens is not None
    assert len(tokens) == len(said.token_ids)
    assert [t.token for t in streamed] == [t.token for t in tokens]
    assert len(tokens[0].top_logprobs) == 2


def test_a_second_turn_computes_only_what_is_new(server: Running) -> None:
    first = ask(server, session="ada")
    history = [ADA, {"role": "assistant", "content": first.choices[0].message.content}]
    second = ask(server, *history, {"role": "user", "content": "What is my name?"}, session="ada")
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached >= first.usage.total_tokens - 1
    assert "Ada" in second.choices[0].message.content
    assert [info.session_id for info in server.memory.sessions("default")] == ["ada"]


def test_one_text_as_a_string_and_as_parts_is_one_prompt(server: Running) -> None:
    parts = [{"type": "text", "text": "My name is Ada."}]
    assert (
        ask(server, {"role": "user", "content": parts}).usage.prompt_tokens == ask(server).usage.prompt_tokens
    )


@pytest.mark.parametrize("stream", [False, True])
def test_a_forced_call_is_one_that_the_client_can_read(server: Running, stream: bool) -> None:
    options: dict[str, Any] = {"tools": [WEATHER], "tool_choice": "required", "max_tokens": 100}
    question = {"role": "user", "content": "What is the weather in Paris?"}
    if stream:
        chunks = [c.choices[0] for c in ask(server, question, stream=True, **options)]
        pieces = [call for choice in chunks for call in choice.delta.tool_calls or ()]
        assert {piece.index for piece in pieces} == {0}
        assert [bool(piece.id) for piece in pieces] == [True] + [False] * (len(pieces) - 1)
        name, finish = pieces[0].function.name, chunks[-1].finish_reason
        arguments = "".join(piece.function.arguments for piece in pieces)
    else:
        choice = ask(server, question, **options).choices[0]
        (call,) = choice.message.tool_calls
        assert call.id.startswith("call_")
        name, arguments, finish = call.function.name, call.function.arguments, choice.finish_reason
    assert (name, finish) == ("get_weather", "tool_calls")
    assert set(json.loads(arguments)) == {"city"}


def test_streamed_calls_have_an_index_each_and_their_text_is_no_content() -> None:
    request = ChatRequest((Message("user", "Hi."),))
    call = Call(request, "m", "m", True, Session(None, "none"), SessionKey(None), 0)
    writer = ChatWriter(call)
    pieces = [("c1", "a", "{"), ("c1", "a", "}"), ("c2", "b", "{}")]
    deltas = [Delta(call_pieces=(ToolCallPiece(*piece),)) for piece in pieces]
    chunks = [json.loads(chunk[6:]) for delta in deltas for chunk in writer.delta(delta)]
    told = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert [part["tool_calls"][0]["index"] for part in told] == [0, 0, 1]
    assert [part["tool_calls"][0].get("id") for part in told] == ["c1", None, "c2"]
    assert not any("content" in part for part in told)


def test_a_call_and_its_result_come_back_to_the_same_tokens(server: Running) -> None:
    options: dict[str, Any] = {"tools": [WEATHER], "max_tokens": 100, "session": "tools"}
    question = {"role": "user", "content": "What is the weather in Paris?"}
    first = ask(server, question, tool_choice="required", **options)
    message = first.choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "Rain."}
    second = ask(server, question, message.model_dump(exclude_none=True), result, **options)
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.total_tokens - 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_knows_functions_and_no_tools_gets_its_call_in_that_form(
    server: Running, stream: bool
) -> None:
    question = {"role": "user", "content": "What is the weather in Paris?"}
    options: dict[str, Any] = {"functions": [WEATHER["function"]], "max_tokens": 100}
    forced = options | {"function_call": {"name": "get_weather"}}
    if stream:
        choices = [c.choices[0] for c in ask(server, question, stream=True, **forced)]
        pieces = [choice.delta.function_call for choice in choices if choice.delta.function_call]
        assert [bool(piece.name) for piece in pieces] == [True] + [False] * (len(pieces) - 1)
        arguments = "".join(piece.arguments for piece in pieces)
        call, finish = {"name": pieces[0].name, "arguments": arguments}, choices[-1].finish_reason
    else:
        choice = ask(server, question, **forced).choices[0]
        assert choice.message.tool_calls is None
        call, finish = choice.message.function_call.model_dump(), choice.finish_reason
    assert (call["name"], finish, set(json.loads(call["arguments"]))) == (
        "get_weather",
        "function_call",
        {"city"},
    )
    as_tools = ask(server, question, tools=[WEATHER], tool_choice="required", max_tokens=100)
    said = {"role": "assistant", "content": None, "function_call": call}
    result = {"role": "function", "name": "get_weather", "content": "Rain."}
    second = ask(server, question, said, result, **options)
    assert second.usage.prompt_tokens_details.cached_tokens >= as_tools.usage.prompt_tokens


class Person(BaseModel):
    name: str = Field(max_length=40)
    age: int = Field(ge=0, le=150)


def test_an_answer_fits_its_schema(server: Running) -> None:
    parsed = server.openai().chat.completions.parse(
        model="tiny-chat",
        messages=[{"role": "user", "content": "Who?"}],
        response_format=Person,
        max_tokens=200,
        temperature=1,
        seed=1,
    )
    assert isinstance(parsed.choices[0].message.parsed, Person)


def test_a_stop_string_ends_an_answer(server: Running) -> None:
    answer = ask(server, stop=["you"]).choices[0]
    assert (answer.message.content, answer.finish_reason) == ("Nice to meet ", "stop")


@pytest.mark.parametrize(
    ("options", "error", "code", "says"),
    [
        ({"model": "gpt-5"}, openai.NotFoundError, "model_not_found", "'gpt-5'"),
        ({"n": 17}, openai.BadRequestError, None, "n: Input should be less than"),
        ({"temperature": -1}, openai.BadRequestError, None, "temperature=-1"),
        ({"temperature": "warm"}, openai.BadRequestError, None, "temperature"),
        (
            {"messages": [{"role": "cat", "content": ""}]},
            openai.BadRequestError,
            None,
            "messages.0.role='cat'",
        ),
        ({"tool_choice": "required"}, openai.BadRequestError, None, "tool_choice"),
        ({"modalities": ["audio"]}, openai.BadRequestError, "unsupported_value", "text only"),
        ({"presence_penalty": 1}, openai.BadRequestError, "unsupported_value", "presence_penalty=1.0"),
        ({"logit_bias": {"5": 1}}, openai.BadRequestError, "unsupported_value", "logit_bias={'5': 1.0}"),
        (
            {"extra_body": {"add_generation_prompt": False}},
            openai.BadRequestError,
            "unsupported_value",
            "continue_final_message",
        ),
        ({"extra_body": {"keep_alive": "soon"}}, openai.BadRequestError, None, "keep_alive='soon'"),
        ({"response_format": LARGE}, openai.BadRequestError, None, "256 KiB"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            openai.BadRequestError,
            "unsupported_value",
            "messages.0.content.0: images are not supported",
        ),
        (
            {"messages": [{"role": "user", "content": "long " * 9000}]},
            openai.BadRequestError,
            "context_length_exceeded",
            "maximum context length is 8192 tokens. However, your messages resulted in",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_answered_is_refused_before_a_stream_begins(
    server: Running,
    stream: bool,
    options: dict[str, Any],
    error: type[openai.APIStatusError],
    code: str | None,
    says: str,
) -> None:
    with pytest.raises(error) as refused:
        ask(server, stream=stream, **options)
    assert refused.value.code == code
    assert refused.value.type == "invalid_request_error"
    assert says in str(refused.value)


def test_what_is_no_json_is_refused(server: Running) -> None:
    with server.http() as client:
        answer = client.post("/v1/chat/completions", content="{not json")
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_json"


def test_paths_work_with_and_without_their_prefix(server: Running) -> None:
    body = {"messages": [ADA], "max_tokens": 2}
    with server.http() as client:
        texts = [
            client.post(path, json=body).json()["choices"][0]["message"]["content"]
            for path in ("/v1/chat/completions", "/chat/completions")
        ]
        assert texts[0] == texts[1] != ""
        missing = client.post("/v1/nothing", json=body)
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "not_found"


def test_models_are_listed_and_found(server: Running) -> None:
    client = server.openai()
    assert [model.id for model in client.models.list()] == ["tiny-chat"]
    assert client.models.retrieve("tiny-chat").object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("an/other")


LONG = {"type": "array", "items": {"enum": [1, 2]}, "minItems": 3000, "maxItems": 3000}
"""A schema whose answer takes longer than any client of these tests waits."""


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_withdraws_its_turn(server: Running, stream: bool) -> None:
    memory: AgentMemory = server.memory
    before = memory.stats().cancelled
    form = {"type": "json_schema", "json_schema": {"name": "long", "schema": LONG}}
    body = {"messages": [ADA], "max_tokens": 8000, "stream": stream, "response_format": form}
    with server.http() as client:
        if stream:
            with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                assert next(answer.iter_lines()).startswith("data: ")
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/chat/completions", json=body, timeout=0.3)
    wait_until(lambda: memory.stats().cancelled == before + 1)
    wait_until(lambda: memory.stats().running == 0)


def test_several_answers_to_one_prompt_compute_it_once_and_only_the_first_is_kept(server: Running) -> None:
    long = {"role": "user", "content": "Tell me what a boat is. " * 30}
    options: dict[str, Any] = {"n": 3, "temperature": 2, "seed": 5, "max_tokens": 8}
    before = server.memory.stats()
    answer: ChatCompletion = ask(server, long, session="three", **options)
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len(set(texts)) > 1, "each has a seed of its own"
    turns = server.memory.stats()
    assert turns.turns - before.turns == 3
    assert answer.usage is not None
    prompt = answer.usage.prompt_tokens
    computed = (turns.prompt_tokens - turns.cache_read) - (before.prompt_tokens - before.cache_read)
    # The others share whole blocks, and compute what of the prompt is left after the last one.
    assert computed == prompt + 2 * (prompt % server.memory.config.block_tokens)
    alone = [ask(server, long, **options | {"n": 1, "seed": 5 + i}) for i in range(3)]
    assert [one.choices[0].message.content for one in alone] == texts
    assert prompt == alone[0].usage.prompt_tokens
    assert answer.usage.completion_tokens == sum(one.usage.completion_tokens for one in alone)
    assert turns.running == turns.waiting == 0
    (kept,) = [info for info in server.memory.sessions("default") if info.session_id == "three"]
    assert kept.branches == 1


def test_several_answers_are_streamed_side_by_side(server: Running) -> None:
    options: dict[str, Any] = {"n": 2, "temperature": 1, "seed": 9, "max_tokens": 8}
    answer: ChatCompletion = ask(server, **options)
    chunks = list(ask(server, stream=True, stream_options={"include_usage": True}, **options))
    for index, choice in enumerate(answer.choices):
        own = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == index]
        assert "".join(c.delta.content or "" for c in own) == choice.message.content
        assert [c.finish_reason for c in own if c.finish_reason] == [choice.finish_reason]
    assert [c.choices for c in chunks].index([]) == len(chunks) - 1, "the usage comes last, and once"
    assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize("n", [0, 17, -1])
def test_more_answers_than_a_request_may_have_are_refused(server: Running, n: int) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(server, n=n)
    assert refused.value.param == "n"


def test_answers_for_which_there_is_no_room_are_all_withdrawn(memory: AgentMemory) -> None:
    with http_server.serve(memory, max_in_flight=2) as running:
        with pytest.raises(openai.RateLimitError):
            ask(running, n=3, max_tokens=400, temperature=1)
        assert ask(running).choices, "the places are free again"
