"""LangChain's own tests for chat models, on the model that ships with the package."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

import agent_memory_core
from langchain_agent_memory import ChatMLXPersistent

# The same model by another name: the folder it lies in.
FOLDER = str(Path(agent_memory_core.__file__).parent / "tiny_chat")

pytestmark = [
    pytest.mark.filterwarnings("ignore::langchain_core._api.LangChainBetaWarning"),
    # These tests hand every model an api_key, of which it is warned here that it has no effect.
    pytest.mark.filterwarnings("ignore::agent_memory_core.UnknownSetting"),
]


@pytest.fixture(scope="module", autouse=True)
def _engines() -> Iterator[None]:
    yield
    for model in ("tiny-chat", FOLDER):
        ChatMLXPersistent(model=model, cache_dir=None).memory.close()


class TestChatMLXPersistentUnit(ChatModelUnitTests):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatMLXPersistent

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "tiny-chat", "cache_dir": None}


class TestChatMLXPersistentIntegration(ChatModelIntegrationTests):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatMLXPersistent

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "tiny-chat", "cache_dir": None, "max_tokens": 100}

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_anthropic_inputs(self) -> bool:
        return True

    @property
    def supports_model_override(self) -> bool:
        return True

    @property
    def model_override_value(self) -> str | None:
        return FOLDER

    @property
    def supported_usage_metadata_details(
        self,
    ) -> dict[
        Literal["invoke", "stream"],
        list[
            Literal[
                "audio_input", "audio_output", "reasoning_output", "cache_read_input", "cache_creation_input"
            ]
        ],
    ]:
        return {
            "invoke": ["cache_read_input", "cache_creation_input"],
            "stream": ["cache_read_input", "cache_creation_input"],
        }

    def invoke_with_cache_read_input(self, *, stream: bool = False) -> AIMessage:
        model = ChatMLXPersistent(**self.chat_model_params)
        question = [HumanMessage("My name is Ada. " * 60 + "What is my name?")]
        model.invoke(question, session_id="standard")
        answer = _answer(model, question, stream=stream)
        assert answer.usage_metadata is not None
        assert answer.usage_metadata["input_token_details"]["cache_read"] > 0
        return answer

    def invoke_with_cache_creation_input(self, *, stream: bool = False) -> AIMessage:
        return _answer(ChatMLXPersistent(**self.chat_model_params), [HumanMessage("Hello")], stream=stream)


def _answer(model: ChatMLXPersistent, messages: list[Any], *, stream: bool) -> AIMessage:
    if not stream:
        return model.invoke(messages, session_id="standard")
    chunks = list(model.stream(messages, session_id="standard"))
    whole = sum(chunks[1:], chunks[0])
    assert isinstance(whole, AIMessageChunk)
    return whole
