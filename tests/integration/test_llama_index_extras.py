"""Structured answers, prefilled documents and counters of MLXPersistentLLM on the real engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from llama_index.core import Document
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.llms.loading import RECOGNIZED_LLMS, load_llm
from llama_index.core.program import FunctionCallingProgram
from llama_index.core.program.function_program import get_function_tool
from llama_index.core.prompts import PromptTemplate
from llama_index.core.schema import NodeWithScore
from llama_index.core.storage.chat_store import SimpleChatStore
from llama_index.core.tools import FunctionTool
from llama_index.core.types import PydanticProgramMode
from pydantic import BaseModel, Field, RootModel
from support.conversations import RULES

from llama_index_agent_memory import (
    DOCUMENTS_PROMPT,
    CachedTokenCounter,
    InOrderOfId,
    MLXPersistentLLM,
    register_llm,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20"),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("llama_index") / "caches"


@pytest.fixture(scope="module")
def llm(store: Path) -> Iterator[MLXPersistentLLM]:
    model = MLXPersistentLLM(cache_dir=store, temperature=0, max_tokens=80)
    yield model
    model.memory.close()


def cached(raw: Any) -> int:
    return int(raw["usage"]["prompt_tokens_details"]["cached_tokens"])


# Structured answers


class Name(BaseModel):
    """A name."""

    name: str = Field(max_length=6)


class Tree(BaseModel):
    """A tree."""

    leaf: Literal["a", "b"]
    below: list[Tree] = Field(default=[], max_length=1)


class Cat(BaseModel):
    kind: Literal["cat"]


class Dog(BaseModel):
    kind: Literal["dog"]
    age: int = Field(ge=0, le=20)


class Pet(BaseModel):
    """A pet."""

    pet: Annotated[Cat | Dog, Field(discriminator="kind")]


Marks = RootModel[Annotated[list[Literal["a", "b"]], Field(min_length=1, max_length=3)]]
ASK = PromptTemplate("Fill in the form for {who}.")


@pytest.mark.parametrize("form", [Name, Tree, Pet, Marks])
async def test_every_class_is_answered_with_its_object(llm: MLXPersistentLLM, form: type[BaseModel]) -> None:
    whole = llm.structured_predict(form, ASK, who="Ada")
    assert isinstance(whole, form)
    assert await llm.astructured_predict(form, ASK, who="Ada") == whole
    assert list(llm.stream_structured_predict(form, ASK, who="Ada"))[-1] == whole
    pieces = [piece async for piece in await llm.astream_structured_predict(form, ASK, who="Ada")]
    assert pieces[-1] == whole


def test_a_form_leaves_the_prompt_as_it_was(llm: MLXPersistentLLM) -> None:
    template = PromptTemplate(RULES + "{who}")
    plain = llm.chat([ChatMessage(RULES + "Ada")], max_tokens=1, session_id="form").raw
    assert isinstance(plain, dict)
    counter = CachedTokenCounter(tokenizer=llm.tokenizer)
    counted = llm.model_copy(update={"callback_manager": CallbackManager([counter])})
    counted.structured_predict(Name, template, {"session_id": "form"}, who="Ada")
    assert counter.prompt_llm_token_count == plain["usage"]["prompt_tokens"], "no tool stands in the prompt"
    assert counter.cached_llm_token_count == counter.prompt_llm_token_count - 1


class Long(BaseModel):
    """Too long for a short answer."""

    text: str = Field(min_length=90)


CUTS: dict[str, Callable[[MLXPersistentLLM], Any]] = {
    "predict": lambda m: m.structured_predict(Long, ASK, who="Ada"),
    "apredict": lambda m: asyncio.run(m.astructured_predict(Long, ASK, who="Ada")),
    "stream": lambda m: list(m.stream_structured_predict(Long, ASK, who="Ada")),
    "chat": lambda m: m.as_structured_llm(Long).complete("Ada"),
    "program": lambda m: FunctionCallingProgram.from_defaults(Long, "Ada", llm=m, tool_required=True)(),
    "program's stream": lambda m: list(program_of(m).stream_call()),
    "program's async stream": lambda m: asyncio.run(drained(program_of(m).astream_call())),
    "by a tool": lambda m: list(by_tool(m).stream_structured_predict(Long, ASK, who="Ada")),
    "forced stream": lambda m: list(
        m.stream_chat_with_tools([get_function_tool(Long)], "Ada", tool_required=True)
    ),
    "forced async stream": lambda m: asyncio.run(
        drained(m.astream_chat_with_tools([get_function_tool(Long)], "Ada", tool_required=True))
    ),
}


def program_of(llm: MLXPersistentLLM) -> FunctionCallingProgram[Long]:
    return FunctionCallingProgram.from_defaults(Long, "Ada", llm=llm, tool_choice="Long")


def by_tool(llm: MLXPersistentLLM) -> MLXPersistentLLM:
    return llm.model_copy(update={"pydantic_program_mode": PydanticProgramMode.FUNCTION})


async def drained(stream: Awaitable[AsyncIterator[Any]]) -> list[Any]:
    return [piece async for piece in await stream]


@pytest.mark.parametrize("route", CUTS)
def test_a_cut_names_max_tokens(llm: MLXPersistentLLM, route: str) -> None:
    with pytest.raises(ValueError, match=r"ended at max_tokens=12 in the middle of .*: raise max_tokens"):
        CUTS[route](llm.model_copy(update={"max_tokens": 12}))


@pytest.mark.parametrize("route", ["stream", "async stream"])
def test_an_answer_that_may_be_text_is_no_error_where_it_is_cut(llm: MLXPersistentLLM, route: str) -> None:
    short, tools = llm.model_copy(update={"max_tokens": 2}), [get_function_tool(Long)]
    if route == "stream":
        pieces = list(short.stream_chat_with_tools(tools, "My name is Ada."))
    else:
        pieces = asyncio.run(drained(short.astream_chat_with_tools(tools, "My name is Ada.")))
    raw: Any = pieces[-1].raw
    assert raw["finish_reason"] == "length"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
async def test_an_agents_object_that_was_cut_is_warned_of(llm: MLXPersistentLLM) -> None:
    """LlamaIndex catches what its agents' last call raises."""
    agent = FunctionAgent(llm=llm.model_copy(update={"max_tokens": 12}), output_cls=Long)
    with pytest.warns(UserWarning, match=r"ended at max_tokens=12 .*: raise max_tokens"):
        answer: Any = await agent.run("My name is Ada.")
    assert answer.structured_response is None


def test_a_programs_stream_ends_with_the_object(llm: MLXPersistentLLM) -> None:
    program = FunctionCallingProgram.from_defaults(
        Name, "My name is {who}. Call the tool Name.", llm=llm, tool_choice="Name"
    )
    assert list(program.stream_call(who="Ada"))[-1] == program(who="Ada")


def test_a_response_format_is_a_form_too(llm: MLXPersistentLLM) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": Name.model_json_schema()}}
    for form in (Name, schema):
        answer = llm.chat([ChatMessage("Ada")], response_format=form)
        assert Name.model_validate_json(answer.message.content or "").name
    assert isinstance(json.loads(llm.complete("Ada", response_schema=Name).text), dict)


# Log-probabilities


def test_logprobs_are_those_of_the_answers_tokens(llm: MLXPersistentLLM) -> None:
    ask = [ChatMessage("My name is Ada.")]
    answer = llm.chat(ask, logprobs=True, top_logprobs=2)
    assert isinstance(answer.raw, dict)
    assert answer.logprobs is not None
    assert "".join(entry[0].token for entry in answer.logprobs).strip() == answer.message.content
    assert all(1 <= len(entry) <= 3 and entry[0].logprob <= 0 for entry in answer.logprobs)
    streamed = [entry for piece in llm.stream_chat(ask, top_logprobs=2) for entry in piece.logprobs or []]
    assert streamed == answer.logprobs
    asked = llm.model_copy(update={"logprobs": True})
    assert asked.complete("My name is Ada.").logprobs
    assert llm.chat(ask).logprobs is None


# Ahead of time


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


async def test_what_was_prefilled_is_warm(store: Path, llm: MLXPersistentLLM) -> None:
    tools = [FunctionTool.from_defaults(add)]
    system = ChatMessage(RULES, role=MessageRole.SYSTEM)
    report = llm.prefill([system], tools, session_id="ahead")
    assert report.usage.cache_read == 0
    assert (await llm.aprefill([system], tools, session_id="ahead")).usage.cache_creation <= 1
    raw = llm.chat_with_tools(tools, "Hello.", [system], session_id="ahead", max_tokens=1).raw
    assert isinstance(raw, dict)
    assert cached(raw) >= report.usage.prompt_tokens - 2
    assert llm.prefill("What is this?").session_id is None


def test_documents_are_computed_once_for_all_users(tmp_path: Path) -> None:
    documents = [Document(text=f"{name} lives in Rome. " * 40, doc_id=name) for name in ("c", "a", "b")]
    nodes = [NodeWithScore(node=document, score=i) for i, document in enumerate(documents)]
    shuffled = [nodes[1], nodes[2], nodes[0]]
    orders = [InOrderOfId().postprocess_nodes(found) for found in (nodes, shuffled)]
    assert [[n.node.node_id for n in order] for order in orders] == [["a", "b", "c"]] * 2
    context = "\n\n".join(node.get_content() for node in orders[0])

    def asked(question: str) -> list[ChatMessage]:
        return DOCUMENTS_PROMPT.format_messages(context_str=context, query_str=question)

    def open_llm() -> MLXPersistentLLM:
        return MLXPersistentLLM(cache_dir=tmp_path, temperature=0, max_tokens=2)

    model = open_llm()
    known = model.prefill(asked("")[:1], session_id="documents").usage.prompt_tokens
    model.memory.pin("documents")
    for user in ("ada", "tom"):
        assert cached(model.chat(asked(f"Who is {user}?"), session_id=user).raw) >= known - 2
    model.memory.forget("ada")
    model.memory.close()
    model = open_llm()
    raw = model.chat(asked("Who is eva?"), session_id="eva").raw
    # After a restart a new session finds the whole blocks of another one.
    assert cached(raw) >= known - known % 128
    assert {s.session_id for s in model.memory.sessions()} == {"documents", "tom", "eva"}
    model.memory.close()


# The rest


def test_a_saved_model_is_loaded_again(llm: MLXPersistentLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    # Another test of this process may have made the class known.
    monkeypatch.delitem(RECOGNIZED_LLMS, MLXPersistentLLM.class_name(), raising=False)
    with pytest.raises(ValueError, match="Invalid LLM name"):
        load_llm(llm.to_dict())
    register_llm()
    loaded = load_llm(llm.to_dict())
    assert isinstance(loaded, MLXPersistentLLM)
    assert loaded.to_dict() == llm.to_dict()


def test_chat_histories_can_be_saved_with_the_pydantic_that_is_installed(tmp_path: Path) -> None:
    saved = SimpleChatStore()
    saved.add_message("ada", ChatMessage("My name is Ada."))
    saved.persist(str(tmp_path / "history.json"))
    loaded = SimpleChatStore.from_persist_path(str(tmp_path / "history.json"))
    assert [message.content for message in loaded.get_messages("ada")] == ["My name is Ada."]


def test_cached_tokens_are_counted_beside_the_others(llm: MLXPersistentLLM) -> None:
    ours, theirs = CachedTokenCounter(tokenizer=llm.tokenizer), TokenCountingHandler(tokenizer=llm.tokenizer)
    counted = llm.model_copy(update={"callback_manager": CallbackManager([ours, theirs])})
    asked = [ChatMessage(RULES), ChatMessage("Hello.")]
    raws = [counted.chat(asked, session_id="counted", max_tokens=1).raw for _ in range(2)]
    *_, last = counted.stream_chat(asked, session_id="counted", max_tokens=1)
    raws.append(last.raw)
    assert ours.cached_llm_token_counts == [cached(raw) for raw in raws]
    assert ours.cached_llm_token_counts[1] > 0
    assert ours.total_llm_token_count == theirs.total_llm_token_count
    assert ours.new_llm_token_count == sum(
        raw["usage"]["prompt_tokens"] - cached(raw) for raw in raws if isinstance(raw, dict)
    )
    ours.reset_counts()
    assert (ours.cached_llm_token_count, ours.llm_token_counts) == (0, [])
