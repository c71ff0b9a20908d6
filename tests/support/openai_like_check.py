"""LlamaIndex's client of servers in OpenAI's dialect against the server at the address given: a chat, a stream, a call.

It runs in an environment of its own, because LlamaIndex's clients need an older release of OpenAI's.
"""

from __future__ import annotations

import sys
from typing import Any

from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel


class Person(BaseModel):
    """Somebody."""

    name: str


def get_weather(city: str) -> str:
    """The weather of a city."""
    return f"Rain in {city}."


def check(url: str) -> None:
    """Raises AssertionError where the client reads something else than was meant."""
    options: dict[str, Any] = {"is_chat_model": True, "is_function_calling_model": True, "max_retries": 0}
    options |= {
        "context_window": 8192,
        "temperature": 0,
        "max_tokens": 48,
        "should_use_structured_outputs": True,
    }
    llm = OpenAILike(model="tiny-chat", api_base=f"{url}/v1", api_key="any", **options)
    ada = ChatMessage(role="user", content="My name is Ada.")
    first = llm.chat([ada])
    streamed = list(llm.stream_chat([ada]))
    assert streamed[-1].message.content == first.message.content
    assert len(streamed) > 2
    second = llm.chat([ada, first.message, ChatMessage(role="user", content="What is my name?")])
    assert "Ada" in str(second.message.content)
    cached = second.raw.usage.prompt_tokens_details.cached_tokens
    assert cached >= first.raw.usage.total_tokens - 1
    tool = FunctionTool.from_defaults(fn=get_weather)
    asked = llm.chat_with_tools([tool], user_msg="What is the weather in Paris?", tool_required=True)
    (call,) = llm.get_tool_calls_from_response(asked)
    assert call.tool_name == "get_weather"
    assert set(call.tool_kwargs) == {"city"}
    assert isinstance(llm.as_structured_llm(Person).complete("Who are you?").raw, Person)


if __name__ == "__main__":
    check(sys.argv[1])
    print("all is as it should be")
