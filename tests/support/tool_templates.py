"""Tokenizers whose chat templates write tool calls, each in the syntax of a published model."""

from __future__ import annotations

from functools import cache
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tool_parsers import glm47, minimax_m2, qwen3_coder
from support import made_tokenizers as made

VALUE = "(v if v is string else v | tojson)"
QWEN3_CODER = (
    "'\\n<tool_call>\\n<function=' ~ c.function.name ~ '>\\n' -}}{%- for k, v in c.function.arguments.items() -%}"
    "{{- '<parameter=' ~ k ~ '>\\n' ~ VALUE ~ '\\n</parameter>\\n' -}}{%- endfor -%}"
    "{{- '</function>\\n</tool_call>'"
).replace("VALUE", VALUE)
# As the first release of that template: what is no container is written as Python does.
QWEN3_CODER_PYTHON = QWEN3_CODER.replace(
    VALUE, "(v | tojson if v is mapping or (v is sequence and v is not string) else v | string)"
)
GLM = (
    "'<tool_call>' ~ c.function.name -}}{%- for k, v in c.function.arguments.items() -%}"
    "{{- '<arg_key>' ~ k ~ '</arg_key><arg_value>' ~ VALUE ~ '</arg_value>' -}}{%- endfor -%}{{- '</tool_call>'"
).replace("VALUE", VALUE)
GLM_LINES = (
    "'\\n<tool_call>' ~ c.function.name ~ '\\n' -}}{%- for k, v in c.function.arguments.items() -%}"
    "{{- '<arg_key>' ~ k ~ '</arg_key>\\n<arg_value>' ~ VALUE ~ '</arg_value>\\n' -}}{%- endfor -%}"
    "{{- '</tool_call>'"
).replace("VALUE", VALUE)
MINIMAX = (
    "'<minimax:tool_call>\\n<invoke name=\"' ~ c.function.name ~ '\">\\n' -}}"
    "{%- for k, v in c.function.arguments.items() -%}"
    "{{- '<parameter name=\"' ~ k ~ '\">' ~ VALUE ~ '</parameter>\\n' -}}{%- endfor -%}"
    "{{- '</invoke>\\n</minimax:tool_call>'"
).replace("VALUE", VALUE)
GLM_TAGS = ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")

_CALLS = "{%- for c in m.tool_calls or [] -%}{{- CALL -}}{%- endfor -%}"


def with_tools(parser: Any, call: str, *special: str) -> TokenizerWrapper:
    """A tokenizer whose template writes calls as ``call`` does, and whose model is read by ``parser``."""
    template = made.CHATML.replace("m.content", "m.content ~ calls(m)").replace(
        "{%- for m", "{%- macro calls(m) -%}" + _CALLS.replace("CALL", call) + "{%- endmacro -%}{%- for m", 1
    )
    added = made.special("<|im_start|>", "<|im_end|>", *special)
    plain = made.byte_level(template, added, eos_token="<|im_end|>")
    return TokenizerWrapper(
        plain._tokenizer,
        eos_token_ids=plain.eos_token_ids,
        tool_call_start=parser.tool_call_start,
        tool_call_end=parser.tool_call_end,
        tool_parser=parser.parse_tool_call,
    )


@cache
def xml_tokenizers() -> dict[str, TokenizerWrapper]:
    """Tokenizers whose models write each argument by itself, by the name of the style."""
    return {
        "qwen3_coder": with_tools(qwen3_coder, QWEN3_CODER),
        "qwen3_coder, Python's words": with_tools(qwen3_coder, QWEN3_CODER_PYTHON),
        "qwen3_coder, delimiters are tokens": with_tools(
            qwen3_coder, QWEN3_CODER, "<tool_call>", "</tool_call>"
        ),
        "glm47": with_tools(glm47, GLM),
        "glm47, tags are tokens": with_tools(glm47, GLM, *GLM_TAGS),
        "glm47, in lines": with_tools(glm47, GLM_LINES),
        "minimax_m2": with_tools(minimax_m2, MINIMAX),
    }
