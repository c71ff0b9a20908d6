"""Frameworks and tools that others wrote, as clients: `make test-sdks` installs and runs them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from support import http_server
from support.http_server import Running

from agent_memory_core import AgentMemory

pydantic_ai = pytest.importorskip("pydantic_ai", reason="make test-sdks installs it")
agents = pytest.importorskip("agents", reason="make test-sdks installs it")

# What the frameworks warn of is theirs.
pytestmark = pytest.mark.filterwarnings("default")

ADA = "My name is Ada."
NAME = "What is my name?"


class Person(BaseModel):
    """Somebody."""

    name: str


def get_weather(city: str) -> str:
    """The weather of a city."""
    return f"Rain in {city}."


@pytest.fixture(params=["responses", "chat"])
def agents_model(request: pytest.FixtureRequest, server: Running) -> Any:
    import openai

    agents.set_tracing_disabled(True)
    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
    if request.param == "responses":
        return agents.OpenAIResponsesModel(model="tiny-chat", openai_client=client)
    return agents.OpenAIChatCompletionsModel(model="tiny-chat", openai_client=client)


async def test_openai_agents_go_on_with_a_conversation(agents_model: Any) -> None:
    settings = agents.ModelSettings(temperature=0, max_tokens=48)
    agent = agents.Agent(name="a", instructions="Be brief.", model=agents_model, model_settings=settings)
    first = await agents.Runner.run(agent, ADA)
    again = [*first.to_input_list(), {"role": "user", "content": NAME}]
    second = await agents.Runner.run(agent, again)
    assert "Ada" in second.final_output
    used = second.context_wrapper.usage
    before = first.context_wrapper.usage
    assert used.input_tokens_details.cached_tokens >= before.total_tokens - 1
    streamed = agents.Runner.run_streamed(agent, again)
    kinds = {event.type async for event in streamed.stream_events()}
    assert "raw_response_event" in kinds
    assert streamed.final_output == second.final_output


async def test_openai_agents_go_on_from_an_answer(server: Running) -> None:
    import openai

    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
    model = agents.OpenAIResponsesModel(model="tiny-chat", openai_client=client)
    settings = agents.ModelSettings(temperature=0, max_tokens=48)
    agent = agents.Agent(name="a", instructions="Be brief.", model=model, model_settings=settings)
    first = await agents.Runner.run(agent, ADA)
    second = await agents.Runner.run(agent, NAME, previous_response_id=first.last_response_id)
    assert "Ada" in second.final_output
    conversation = agents.OpenAIConversationsSession(openai_client=client)
    await agents.Runner.run(agent, ADA, session=conversation)
    told = await agents.Runner.run(agent, NAME, session=conversation)
    assert "Ada" in told.final_output
    assert len(await conversation.get_items()) == 4


async def test_openai_agents_call_tools_and_fill_forms(agents_model: Any) -> None:
    settings = agents.ModelSettings(temperature=0, max_tokens=48, tool_choice="get_weather")
    tool = agents.function_tool(get_weather)
    agent = agents.Agent(name="a", tools=[tool], model=agents_model, model_settings=settings)
    result = await agents.Runner.run(agent, "What is the weather in Paris?")
    kinds = [type(item).__name__ for item in result.new_items]
    assert kinds == ["ToolCallItem", "ToolCallOutputItem", "MessageOutputItem"]
    assert result.new_items[1].output.startswith("Rain in")
    form = agents.Agent(name="a", output_type=Person, model=agents_model)
    assert isinstance((await agents.Runner.run(form, "Who are you?")).final_output, Person)


@pytest.fixture(params=["chat", "responses", "messages"])
def pydantic_model(request: pytest.FixtureRequest, server: Running) -> Any:
    from pydantic_ai.models.anthropic import AnthropicModel
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.anthropic import AnthropicProvider
    from pydantic_ai.providers.openai import OpenAIProvider

    if request.param == "messages":
        return AnthropicModel(
            "claude-sonnet-4-5", provider=AnthropicProvider(base_url=server.url, api_key="any")
        )
    provider = OpenAIProvider(base_url=f"{server.url}/v1", api_key="any")
    return {"chat": OpenAIChatModel, "responses": OpenAIResponsesModel}[request.param](
        "tiny-chat", provider=provider
    )


async def test_pydantic_ai_goes_on_with_a_conversation(pydantic_model: Any) -> None:
    agent = pydantic_ai.Agent(pydantic_model, model_settings={"temperature": 0, "max_tokens": 48})
    first = await agent.run(ADA)
    second = await agent.run(NAME, message_history=first.all_messages())
    assert "Ada" in second.output
    assert second.usage.cache_read_tokens >= first.usage.total_tokens - 1
    async with agent.run_stream(NAME, message_history=first.all_messages()) as streamed:
        assert await streamed.get_output() == second.output


async def test_pydantic_ai_calls_tools_and_fills_forms(pydantic_model: Any) -> None:
    form = pydantic_ai.Agent(pydantic_model, output_type=pydantic_ai.NativeOutput(Person))
    assert isinstance((await form.run("Who are you?")).output, Person)
    # A form that is filled by calling a tool.
    form = pydantic_ai.Agent(pydantic_model, output_type=pydantic_ai.ToolOutput(Person))
    assert isinstance((await form.run("Who are you?")).output, Person)


def test_llm_goes_on_with_a_conversation(server: Running, tmp_path: Path) -> None:
    pytest.importorskip("llm", reason="make test-sdks installs it")
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: here\n  model_name: tiny-chat\n  api_base: {server.url}/v1\n  api_key_name: here\n"
    )
    environ = {"LLM_USER_PATH": str(tmp_path), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}

    def say(*words: str) -> str:
        arguments = [
            sys.executable,
            "-m",
            "llm",
            "-m",
            "here",
            "--key",
            "any",
            "-o",
            "temperature",
            "0",
            *words,
        ]
        done = subprocess.run(arguments, env=environ, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    say(ADA)
    assert "Ada" in say("-c", NAME)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("keys", [(), ("a-key",)])
def test_schemathesis_finds_no_fault(keys: tuple[str, ...], tmp_path: Path) -> None:
    pytest.importorskip("schemathesis", reason="make test-sdks installs it")
    memory = AgentMemory(cache_dir=tmp_path / "store", memory_budget_mb=128, min_free_mb=0)
    with memory, http_server.serve(memory, api_keys=keys, max_tokens=8, body_timeout=5) as server:
        program = Path(sys.executable).with_name("schemathesis")
        options = ["--checks", "not_a_server_error", "--phases", "coverage,fuzzing", "--max-examples", "10"]
        headers = ["-H", f"Authorization: Bearer {keys[0]}"] if keys else []
        done = subprocess.run(
            [program, "run", f"{server.url}/openapi.json", *options, *headers, "--no-color"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-8000:]
        with server.http(**{"x-api-key": "a-key"}) as client:
            assert client.get("/health/ready").status_code == 200
