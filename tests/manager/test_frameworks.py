"""The frameworks' models of a manager hold no weights: every call asks the manager, whatever happened meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from langchain_core.messages import HumanMessage
from llama_index.core.llms import ChatMessage

from agent_memory_core import AgentMemory, InvalidSetting
from agent_memory_core.manager import ManagerClosed, ModelManager, UnknownModel
from langchain_agent_memory import ChatMLXPersistent
from langchain_agent_memory.managed import ManagedChatModel
from llama_index_agent_memory import MLXPersistentLLM
from llama_index_agent_memory.managed import ManagedLLM

Make = Callable[..., ModelManager]


def test_a_chat_model_that_was_kept_over_an_eviction_reloads_through_the_manager(make: Make) -> None:
    manager = make(limit=15)
    llm = manager.get_chat_model("a", session_id="s")
    other = manager.get_chat_model("b", framework="llama_index")
    assert isinstance(llm, ChatMLXPersistent)
    assert isinstance(other, MLXPersistentLLM)
    assert manager.list_loaded_models() == [], "making them loads nothing"
    first = llm.invoke("Hello.")
    assert manager.list_loaded_models() == ["a"]
    other.chat([ChatMessage(content="Hello.")])
    assert manager.list_loaded_models() == ["b"]
    again = llm.invoke("Hello.")
    assert manager.list_loaded_models() == ["a"]
    assert again.content == first.content
    assert again.usage_metadata is not None
    assert again.usage_metadata["input_token_details"]["cache_read"] > 0
    assert manager.get_model_stats()["a"].load_count == 2


async def test_coroutines_and_streams_hold_leases_until_their_end(make: Make) -> None:
    manager = make(limit=15)
    llm = manager.get_chat_model("a", max_tokens=30)
    assert (await llm.ainvoke("Hello.")).content
    pieces = llm.stream("Hello.")
    next(pieces)
    assert manager.get_model_stats()["a"].leases == 1
    assert not manager.unload_model("a")
    list(pieces)
    assert manager.unload_model("a")
    async for _ in llm.astream("Hello."):
        pass
    assert llm.get_num_tokens("Hello.") > 0
    assert manager.get_model_stats()["a"].leases == 0


def test_the_configuration_is_the_chat_models_too(make: Make) -> None:
    manager = make(models={"a": {"context_length": 512, "parameters": {"temperature": 0.5, "stop": ["x"]}}})
    llm = manager.get_chat_model("a", top_p=0.5)
    assert (llm.temperature, llm.stop, llm.top_p, llm.context_length) == (0.5, ["x"], 0.5, 512)
    managed = AgentMemory.shared(**manager.settings_of(manager.get_model("a", load=False).config))
    assert llm.memory is managed
    assert manager.get_chat_model("a", "llama_index").memory is managed


def test_an_unknown_framework_or_model_is_refused(make: Make) -> None:
    manager = make()
    with pytest.raises(InvalidSetting, match="llama_index"):
        manager.get_chat_model("a", framework="llamaindex")
    with pytest.raises(UnknownModel):
        manager.get_chat_model("e")
    manager.shutdown()
    with pytest.raises(ManagerClosed):
        manager.get_chat_model("a")


def test_models_of_other_libraries_run_through_their_handle(make: Make) -> None:
    """On a handle of an engine, whose turns are the same: which library runs it is the handle's matter."""
    handle = make().get_model("a", load=False)
    llm, other = (
        ManagedChatModel(managed=handle, model=handle.name, temperature=0, max_tokens=8),
        ManagedLLM(managed=handle, model=handle.name, temperature=0, max_tokens=8),
    )
    expected = handle.chat("Hello.", temperature=0, max_tokens=8).text
    assert llm.invoke([HumanMessage("Hello.")]).content == expected
    assert "".join(str(piece.content) for piece in llm.stream("Hello.")) == expected
    assert other.complete("Hello.").text == expected
    assert list(other.stream_complete("Hello."))[-1].text == expected
    form: dict[str, Any] = {
        "title": "City",
        "type": "object",
        "properties": {"city": {"enum": ["Rome"]}},
        "required": ["city"],
    }
    assert llm.with_structured_output(form).invoke("Where?", max_tokens=40) == {"city": "Rome"}


async def test_models_of_other_libraries_run_in_coroutines(make: Make) -> None:
    handle = make().get_model("a", load=False)
    llm = ManagedChatModel(managed=handle, model=handle.name, temperature=0, max_tokens=8)
    expected = handle.chat("Hello.", temperature=0, max_tokens=8).text
    assert (await llm.ainvoke("Hello.")).content == expected
    assert "".join([str(piece.content) async for piece in llm.astream("Hello.")]) == expected
