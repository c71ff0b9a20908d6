"""Completions, as OpenAI's own client reads them."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from support import made_tokenizers
from support.http_server import Running

from agent_memory_core import ChatRequest, Message
from agent_memory_core.text.chat_template import ChatTemplate

CHAT = [Message("user", "My name is Ada.")]
PROMPT = ChatTemplate(made_tokenizers.tiny_chat()).render(ChatRequest(tuple(CHAT)))
"""A chat prompt, written out."""


def ask(server: Running, prompt: Any = PROMPT, **options: Any) -> Any:
    said: dict[str, Any] = {"model": "tiny-chat", "prompt": prompt, "max_tokens": 24, "temperature": 0}
    return server.openai().completions.create(**said | options)


def test_a_prompt_that_is_written_out_is_the_one_that_a_template_writes(server: Running) -> None:
    said = server.memory.chat(CHAT, max_tokens=24, temperature=0)
    answer = ask(server)
    chunks = list(ask(server, stream=True, stream_options={"include_usage": True}))
    assert answer.choices[0].text == said.text
    assert "".join(c.choices[0].text for c in chunks if c.choices) == said.text
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens == said.report.usage.prompt_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens == said.report.usage.prompt_tokens - 1
    assert chunks[-1].usage.total_tokens == answer.usage.total_tokens


def test_a_text_goes_on_where_it_was(server: Running) -> None:
    session = {"session_id": "text"}
    first = ask(server, max_tokens=4, echo=True, extra_body=session)
    assert first.choices[0].text.startswith(PROMPT)
    second = ask(server, first.choices[0].text, extra_body=session)
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.total_tokens - 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prompt": ["a", "b"]}, "2 prompts"),
        ({"prompt": [1, 2]}, "token ids"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of=2"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(server: Running, options: dict[str, Any], says: str) -> None:
    with pytest.raises(openai.BadRequestError, match=says):
        ask(server, **options)


def test_a_text_becomes_tokens_and_tokens_become_it_in_both_forms_that_are_in_use(server: Running) -> None:
    with server.http() as client:
        of_vllm = client.post("/tokenize", json={"prompt": "A boat. Ünï.", "return_token_strs": True}).json()
        of_llama = client.post("/tokenize", json={"content": "A boat. Ünï.", "with_pieces": True}).json()
        back = client.post("/detokenize", json={"tokens": of_vllm["tokens"]}).json()
    assert of_vllm["tokens"] == server.memory.encode("A boat. Ünï.")
    assert of_vllm["count"] == len(of_vllm["tokens"]) == len(of_vllm["token_strs"])
    assert of_vllm["max_model_len"] == server.memory.context_length
    assert [piece["id"] for piece in of_llama["tokens"]] == of_vllm["tokens"]
    assert back == {"prompt": "A boat. Ünï.", "content": "A boat. Ünï."}


def test_a_conversation_has_the_tokens_of_its_prompt(server: Running) -> None:
    body = {"messages": [{"role": "user", "content": "Hello."}]}
    with server.http() as client:
        prompt = client.post("/apply-template", json=body).json()["prompt"]
        found = client.post("/v1/tokenize", json=body).json()
    assert "Hello." in prompt
    assert found["tokens"] == server.memory.encode(prompt)
    assert found["count"] == server.memory.count_tokens(body["messages"])


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"messages": []}),
        ("/tokenize", {"prompt": "a", "model": "nobody"}),
        ("/detokenize", {"tokens": [10**6]}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": "a"}),
    ],
)
def test_what_has_no_tokens_is_refused(server: Running, path: str, body: dict[str, Any]) -> None:
    with server.http() as client:
        refused = client.post(path, json=body)
    assert refused.status_code in (400, 404)
    assert refused.json()["error"]["message"]
