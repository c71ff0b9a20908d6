"""JSON calls: their syntax is learnt from the template, and they are written as the template renders them."""

from __future__ import annotations

import pytest
from mlx_lm.tool_parsers import glm47, mistral, qwen3_coder
from support import made_tokenizers as made
from support.constrained_answers import ASK, Answer, template_of
from support.json_schemas import SCHEMAS, fits, tool
from support.tool_templates import with_tools

from agent_memory_core import ChatRequest, Message
from agent_memory_core.structured.grammar import find_tool_syntax
from agent_memory_core.structured.tool_calls import model_parser
from agent_memory_core.structured.tool_syntax import JsonToolSyntax
from agent_memory_core.text.chat_template import ChatTemplate

TOOLS = (tool("add", SCHEMAS["array"]), tool("find", SCHEMAS["optional"]), tool("stop", SCHEMAS["nothing"]))


@pytest.mark.parametrize("seed", range(4))
def test_a_call_is_written_as_the_template_renders_it(seed: int) -> None:
    request = ChatRequest(ASK, TOOLS, tool_choice="required")
    answer = Answer(made.tiny_chat(), request, seed)
    message = Message("assistant", "", tool_calls=answer.read().tool_calls)
    conversation = ChatRequest((*ASK, message), TOOLS)
    rendered = template_of(made.tiny_chat()).render(conversation, generation_prompt=False)
    assert rendered == answer.prompt.text + answer.text + "<|im_end|>\n"


def test_arguments_are_an_object_also_where_a_tool_does_not_say_so() -> None:
    loose = (tool("f", {"properties": {"a": {"type": "boolean"}}, "required": ["a"]}), tool("g", {}))
    for name, fields in (("f", {"a"}), ("g", set())):
        (call,) = Answer(made.tiny_chat(), ChatRequest(ASK, loose, tool_choice=name), 0).read().tool_calls
        assert set(call.arguments) == fields


def test_another_syntax_is_learnt_from_the_template() -> None:
    call = "'[TOOL_CALLS]' ~ c.function.name ~ '[ARGS]' ~ c.function.arguments | tojson"
    tokenizer = with_tools(mistral, call, "[TOOL_CALLS]", "[ARGS]")
    answer = Answer(tokenizer, ChatRequest(ASK, TOOLS, tool_choice="add"), 0)
    assert answer.text.startswith("[TOOL_CALLS]add[ARGS]{")
    (read,) = answer.read().tool_calls
    assert fits(read.arguments, SCHEMAS["array"])


def test_the_convention_is_used_where_only_it_is_read_back() -> None:
    call = "'<tool_call>' ~ c.function.name ~ '</tool_call>'"
    tokenizer = with_tools(glm47, call)
    syntax = find_tool_syntax(ChatTemplate(tokenizer), model_parser(tokenizer))
    assert syntax == JsonToolSyntax(model_parser(tokenizer))
    unreadable = with_tools(qwen3_coder, call)
    assert find_tool_syntax(ChatTemplate(unreadable), model_parser(unreadable)) is None
