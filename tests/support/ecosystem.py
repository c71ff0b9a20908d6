"""Conversations inside packages that others wrote, each on the real package and the real model.

Run as a program it takes some turns of one of them in one thread, prints what each turn reused as a line of JSON, and
may then kill itself with SIGKILL:

    python tests/support/ecosystem.py NAME FOLDER FIRST LAST [kill]
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from langchain_core.messages import BaseMessage, HumanMessage
from langchain_core.tools import tool
from llama_index.core.base.llms.types import MessageRole
from support.watched_calls import Call, Watch

from agent_memory_core import AgentMemory
from langchain_agent_memory import ChatMLXPersistent
from llama_index_agent_memory import MLXPersistentLLM

SYSTEM = "You are a helpful assistant. You answer in one short sentence. " * 8
QUESTIONS = ("What is the weather in Rome?", "What is the weather in Paris?", "What is the weather in Oslo?")

Turn = Callable[[str], Awaitable[Any]]
"""Runs one turn: takes what the user says, and returns when it is answered."""
SETTINGS: dict[str, Any] = {"min_free_mb": 0, "temperature": 0, "max_tokens": 60}


class Directed(ChatMLXPersistent):
    """tiny-chat is too small to choose among many tools, so each question begins with a call of the first that fits.

    The calls are the model's own, held to the tool's schema, and all else it writes as it likes.
    """

    def _generate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> Any:
        return super()._generate(messages, *args, **directed(messages, kwargs))

    async def _agenerate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> Any:
        return await super()._agenerate(messages, *args, **directed(messages, kwargs))


HAND_OVER = "transfer_to_"
PREFERRED = ("get_weather", "manage_memory", "task")


def directed(messages: Sequence[BaseMessage], keywords: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of a call with the choice of a tool, where several may be called.

    A question is handed over once, because handing back would never end, and then one tool is called for it.
    """
    names = [tool["function"]["name"] for tool in keywords.get("tools") or ()]
    if not names or keywords.get("tool_choice"):
        return dict(keywords)
    called = {
        call["name"] for message in since_question(messages) for call in getattr(message, "tool_calls", ())
    }
    hand_overs = [name for name in names if name.startswith(HAND_OVER)]
    if hand_overs and not any(name.startswith(HAND_OVER) for name in called):
        return {**keywords, "tool_choice": hand_overs[0]}
    wanted = [name for name in PREFERRED if name in names and called.isdisjoint(PREFERRED)]
    return {**keywords, "tool_choice": wanted[0] if wanted else "none"}


def since_question(messages: Sequence[BaseMessage]) -> list[BaseMessage]:
    """The messages after the user's last one."""
    asked = max((i for i, message in enumerate(messages) if isinstance(message, HumanMessage)), default=-1)
    return list(messages[asked + 1 :])


class DirectedLlm(MLXPersistentLLM):
    """The same for LlamaIndex: one call for each question."""

    def _prepare_chat_with_tools(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if kwargs["chat_history"][-1].role == MessageRole.TOOL:
            kwargs["tool_choice"] = "none"
        return super()._prepare_chat_with_tools(*args, **kwargs)


@tool
def get_weather(city: str) -> str:
    """Get the weather of a city."""
    return "It is sunny."


# The packages ---------------------------------------------------------------------------------------------------


Opened = AbstractAsyncContextManager[tuple[AgentMemory, Turn]]
"""A conversation that goes on where the folder says it is, and the memory whose calls are watched."""
Build = Callable[[ChatMLXPersistent, Any, Path], Awaitable[Turn]]


def on_langchain(build: Build) -> Callable[[Path], Opened]:
    """Opens what is built on the chat model and a checkpointer."""

    @functools.wraps(build)
    @asynccontextmanager
    async def opened(folder: Path) -> AsyncIterator[tuple[AgentMemory, Turn]]:
        llm = Directed(cache_dir=str(folder / "caches"), **SETTINGS)
        saver = import_module("langgraph.checkpoint.sqlite.aio").AsyncSqliteSaver
        async with saver.from_conn_string(str(folder / "checkpoints.db")) as checkpoints:
            yield llm.memory, await build(llm, checkpoints, folder)

    return opened


THREAD: dict[str, Any] = {"configurable": {"thread_id": "t"}, "recursion_limit": 40}


def graph_turn(graph: Any) -> Turn:
    async def turn(text: str) -> Any:
        return await graph.ainvoke({"messages": [("user", text)]}, THREAD)

    return turn


@on_langchain
async def supervisor(llm: ChatMLXPersistent, saver: Any, folder: Path) -> Turn:
    """A supervisor that hands each question to an expert."""
    agent = import_module("langgraph.prebuilt").create_react_agent
    expert = agent(llm, [get_weather], name="weather_expert", prompt=SYSTEM + "You know the weather.")
    package = import_module("langgraph_supervisor")
    return graph_turn(
        package.create_supervisor([expert], model=llm, prompt=SYSTEM).compile(checkpointer=saver)
    )


@on_langchain
async def swarm(llm: ChatMLXPersistent, saver: Any, folder: Path) -> Turn:
    """Two agents that hand over to each other."""
    package, agent = import_module("langgraph_swarm"), import_module("langgraph.prebuilt").create_react_agent
    hand_over = package.create_handoff_tool
    alice = agent(llm, [hand_over(agent_name="Bob")], prompt=SYSTEM + "You are Alice.", name="Alice")
    bob = agent(llm, [get_weather, hand_over(agent_name="Alice")], prompt=SYSTEM + "You are Bob.", name="Bob")
    return graph_turn(
        package.create_swarm([alice, bob], default_active_agent="Alice").compile(checkpointer=saver)
    )


@on_langchain
async def deep_agent(llm: ChatMLXPersistent, saver: Any, folder: Path) -> Turn:
    """An agent with files, plans and subagents, whose tools are long."""
    create = import_module("deepagents").create_deep_agent
    return graph_turn(create(model=llm, tools=[get_weather], system_prompt=SYSTEM, checkpointer=saver))


@on_langchain
async def deep_subagents(llm: ChatMLXPersistent, saver: Any, folder: Path) -> Turn:
    """An agent that gives each question to another subagent, which knows nothing of the conversation."""
    # Named by what tiny-chat copies from the question into its call.
    experts = [
        {
            "name": city,
            "description": f"Knows the weather in {city}.",
            "system_prompt": SYSTEM,
            "tools": [get_weather],
        }
        for city in ("Rome", "Paris", "Oslo")
    ]
    create = import_module("deepagents").create_deep_agent
    return graph_turn(
        create(model=llm, tools=[], subagents=experts, system_prompt=SYSTEM, checkpointer=saver)
    )


@on_langchain
async def memories(llm: ChatMLXPersistent, saver: Any, folder: Path) -> Turn:
    """An agent that keeps memories in a store, by langmem's tools."""
    langmem, store = import_module("langmem"), import_module("langgraph.store.memory").InMemoryStore()
    tools = [langmem.create_manage_memory_tool(("m",)), langmem.create_search_memory_tool(("m",))]
    agent = import_module("langchain.agents").create_agent
    answered = graph_turn(agent(llm, tools, system_prompt=SYSTEM, checkpointer=saver, store=store))
    drawn = random.Random()
    # The ids of memories stand in the prompts. Each turn draws the same ones again, so that runs can be compared.
    ids = SimpleNamespace(UUID=UUID, uuid4=lambda: UUID(int=drawn.getrandbits(128), version=4))
    import_module("langmem.knowledge.tools").uuid = ids  # type: ignore[attr-defined]

    async def turn(text: str) -> Any:
        drawn.seed(text)
        return await answered(text)

    return turn


@on_langchain
async def mcp_tools(llm: ChatMLXPersistent, saver: Any, folder: Path) -> Turn:
    """An agent whose tools are those of an MCP server in another process."""
    client = import_module("langchain_mcp_adapters.client").MultiServerMCPClient
    server = {"command": sys.executable, "args": [__file__, "mcp-server"], "transport": "stdio"}
    tools = await client({"weather": server}).get_tools()
    agent = import_module("langchain.agents").create_agent
    return graph_turn(agent(llm, tools, system_prompt=SYSTEM, checkpointer=saver))


@on_langchain
async def extraction(llm: ChatMLXPersistent, saver: Any, folder: Path) -> Turn:
    """trustcall fills a form from what is said, question after question in one history."""
    weather = {
        "name": "Weather",
        "description": "What somebody wants to know.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}},
            "required": ["city"],
        },
    }
    form = {"type": "function", "function": weather}
    extract = import_module("trustcall").create_extractor(llm, tools=[form], tool_choice="Weather")
    kept = folder / "history.json"
    said: list[tuple[str, str]] = json.loads(kept.read_text()) if kept.exists() else [("system", SYSTEM)]

    async def turn(text: str) -> Any:
        said.append(("user", text))
        state = await extract.ainvoke({"messages": list(said)}, THREAD)
        said.append(("assistant", str(state["responses"][0])))
        kept.write_text(json.dumps(said))

    return turn


@asynccontextmanager
async def llama_index_mcp(folder: Path) -> AsyncIterator[tuple[AgentMemory, Turn]]:
    """A FunctionAgent of LlamaIndex whose tools are those of an MCP server, with a memory in a database."""
    mcp = import_module("llama_index.tools.mcp")
    agents, memory = (
        import_module("llama_index.core.agent.workflow"),
        import_module("llama_index.core.memory"),
    )
    llm = DirectedLlm(cache_dir=str(folder / "caches"), **SETTINGS)
    tools = await mcp.McpToolSpec(
        mcp.BasicMCPClient(sys.executable, [__file__, "mcp-server"])
    ).to_tool_list_async()
    agent = agents.FunctionAgent(
        llm=llm, tools=tools, system_prompt=SYSTEM, initial_tool_choice="get_weather"
    )
    history = memory.Memory.from_defaults(
        session_id="t", token_limit=100_000, async_database_uri=f"sqlite+aiosqlite:///{folder / 'chat.db'}"
    )

    async def turn(text: str) -> Any:
        return await agent.run(text, memory=history)

    yield llm.memory, turn


@dataclass(frozen=True, slots=True)
class Scenario:
    """One conversation inside one package."""

    package: str
    """Its name on the package index."""
    module: str
    open: Callable[[Path], Opened]

    @property
    def is_installed(self) -> bool:
        """Whether it can be run here."""
        try:
            return find_spec(self.module) is not None
        except ModuleNotFoundError:
            # A package above it is missing.
            return False


SCENARIOS: dict[str, Scenario] = {
    "supervisor": Scenario("langgraph-supervisor", "langgraph_supervisor", supervisor),
    "swarm": Scenario("langgraph-swarm", "langgraph_swarm", swarm),
    "deepagents": Scenario("deepagents", "deepagents", deep_agent),
    "deepagents, subagents": Scenario("deepagents", "deepagents", deep_subagents),
    "langmem": Scenario("langmem", "langmem", memories),
    "trustcall": Scenario("trustcall", "trustcall", extraction),
    "mcp": Scenario("langchain-mcp-adapters", "langchain_mcp_adapters", mcp_tools),
    "llama-index, mcp": Scenario("llama-index-tools-mcp", "llama_index.tools.mcp", llama_index_mcp),
}


# One process ----------------------------------------------------------------------------------------------------


async def take_turns(name: str, folder: Path, first: int, last: int) -> None:
    """Take turns ``first`` up to ``last`` and print what each call of the model was, and what it reused."""
    async with SCENARIOS[name].open(folder) as (memory, turn):
        watch = Watch(memory)
        for number in range(first, last):
            watch.calls.clear()
            await turn(QUESTIONS[number])
            print(json.dumps({"turn": number, "calls": [*map(seen, watch.calls)]}), flush=True)


def seen(call: Call) -> dict[str, Any]:
    """One call of the model: its tokens, how many of the prompt were not computed again, and the least it had to be."""
    generated = list(call.turn.sequence.generated)
    return {
        "prompt": list(call.prompt),
        "generated": generated,
        "reused": call.read,
        "floor": call.floor,
        "session": call.key.session_id,
    }


def counts(turn: Mapping[str, Any]) -> dict[str, int]:
    """The calls of a turn, their prompt tokens, and those of them that were not computed again."""
    calls = turn["calls"]
    prompt = sum(len(call["prompt"]) for call in calls)
    return {"calls": len(calls), "prompt": prompt, "reused": sum(call["reused"] for call in calls)}


def serve_mcp() -> None:
    """An MCP server with one tool."""
    server = import_module("mcp.server.fastmcp").FastMCP("weather")
    server.tool(name="get_weather", description="Get the weather of a city.")(lambda city: "It is sunny.")
    server.run()


def run(name: str, folder: Path, first: int, last: int, *, kill: bool = False) -> list[dict[str, Any]]:
    """Take turns in a process of their own, which is killed after them if ``kill``; return what each reused."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        __file__,
        name,
        str(folder),
        str(first),
        str(last),
        *(["kill"] if kill else []),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == (-signal.SIGKILL if kill else 0), done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def main(name: str, folder: str = "", first: str = "0", last: str = "0", kill: str = "") -> None:
    """See the module."""
    if name == "mcp-server":
        serve_mcp()
        return
    asyncio.run(take_turns(name, Path(folder), int(first), int(last)))
    if kill:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(*sys.argv[1:])
