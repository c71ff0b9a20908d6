"""LangChain's own chat models as clients: what they read of an answer, of a stream, of calls and of errors."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_anthropic import ChatAnthropic
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel
from support.http_server import Running

ADA = HumanMessage("My name is Ada.")
NAME = HumanMessage("What is my name?")


@tool
def get_weather(city: str) -> str:
    """The weather of a city."""
    return f"Rain in {city}."


class Person(BaseModel):
    """Somebody."""

    name: str


def chat(server: Running) -> BaseChatModel:
    return ChatOpenAI(**_openai(server))


def responses(server: Running) -> BaseChatModel:
    return ChatOpenAI(**_openai(server), use_responses_api=True)


def held_responses(server: Running) -> BaseChatModel:
    return ChatOpenAI(**_openai(server), use_responses_api=True, use_previous_response_id=True)


def messages(server: Running) -> BaseChatModel:
    options: dict[str, Any] = {"base_url": server.url, "api_key": "any", "model": "tiny-chat"}
    options |= {"max_tokens": 64, "max_retries": 0, "model_kwargs": {"extra_body": {"temperature": 0}}}
    return ChatAnthropic(**options)


def _openai(server: Running) -> dict[str, Any]:
    options: dict[str, Any] = {"base_url": f"{server.url}/v1", "api_key": "any", "model": "tiny-chat"}
    return options | {"temperature": 0, "max_tokens": 64, "max_retries": 0, "stream_usage": True}


pytestmark = pytest.mark.parametrize("model_of", [chat, responses, held_responses, messages])


def test_a_conversation_whole_and_streamed(server: Running, model_of: Any) -> None:
    model: Any = model_of(server)
    first = model.invoke([ADA])
    chunks = list(model.stream([ADA]))
    streamed: Any = chunks[0]
    for chunk in chunks[1:]:
        streamed += chunk
    assert type(streamed) is AIMessageChunk
    assert streamed.text == first.text
    assert len(chunks) > 2
    usage: Any = streamed.usage_metadata
    assert usage["total_tokens"] == first.usage_metadata["total_tokens"]
    second = model.invoke([ADA, first, NAME])
    assert "Ada" in second.text
    used = second.usage_metadata
    assert used["input_token_details"]["cache_read"] >= first.usage_metadata["total_tokens"] - 1


def test_a_call_of_a_tool_and_its_result(server: Running, model_of: Any) -> None:
    model = model_of(server).bind_tools([get_weather], tool_choice="get_weather")
    question = HumanMessage("What is the weather in Paris?")
    called = model.invoke([question])
    (call,) = called.tool_calls
    assert call["name"] == "get_weather"
    assert set(call["args"]) == {"city"}
    result = get_weather.invoke(call)
    assert isinstance(result, ToolMessage)
    answer = model_of(server).bind_tools([get_weather]).invoke([question, called, result])
    assert (
        answer.usage_metadata["input_token_details"]["cache_read"]
        >= called.usage_metadata["input_tokens"] - 1
    )


def test_an_answer_in_a_form(server: Running, model_of: Any) -> None:
    person = model_of(server).with_structured_output(Person, method="json_schema").invoke("Who are you?")
    assert isinstance(person, Person)


def test_an_error_is_an_error(server: Running, model_of: Any) -> None:
    with pytest.raises(Exception, match=r"\d+ tokens > 8192 maximum|context length is 8192 tokens"):
        model_of(server).invoke([HumanMessage("word " * 20_000)])
