"""Structured output: schemas in every form LangChain has, as what the model is asked for and how it is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from operator import itemgetter
from typing import Any, Literal

from langchain_core.exceptions import OutputParserException
from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage
from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from langchain_core.output_parsers.openai_tools import JsonOutputKeyToolsParser, PydanticToolsParser
from langchain_core.outputs import Generation
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.utils.function_calling import convert_to_json_schema
from langchain_core.utils.pydantic import is_basemodel_subclass
from pydantic import BaseModel

from agent_memory_core import InvalidRequest

Method = Literal["json_schema", "function_calling", "json_mode"]
"""How a structured answer is asked for: as text that fits the schema, as a forced tool call, as any JSON object."""

METHODS: tuple[Method, ...] = ("json_schema", "function_calling", "json_mode")


def to_response_schema(value: object) -> Mapping[str, Any] | None:
    """The JSON schema in a ``response_format`` as OpenAI and LangChain's ProviderStrategy write it; None is free text.

    Raises:
        InvalidRequest: it is none of these.
    """
    kind = value.get("type") if isinstance(value, Mapping) else None
    if value is None or kind == "text":
        return None
    if kind == "json_object":
        return {}
    named = value.get("json_schema") if isinstance(value, Mapping) and kind == "json_schema" else None
    schema = named.get("schema") if isinstance(named, Mapping) else None
    if not isinstance(schema, Mapping):
        raise InvalidRequest(
            f'response_format={value!r} is not valid: {{"type": "text"}}, {{"type": "json_object"}} or '
            '{"type": "json_schema", "json_schema": {"name": ..., "schema": ...}}.'
        )
    return schema


def response_format(schema: dict[str, Any] | type, method: Method) -> dict[str, Any]:
    """The ``response_format`` that asks for ``schema``."""
    if method == "json_mode":
        return {"type": "json_object"}
    form = _json_schema(schema)
    return {"type": "json_schema", "json_schema": {"name": form.get("title", "answer"), "schema": form}}


def _json_schema(schema: dict[str, Any] | type) -> dict[str, Any]:
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        return schema.model_json_schema()
    if isinstance(schema, dict) and not {"title", "name", "function"} & schema.keys():
        return schema
    return convert_to_json_schema(schema)


class _Whole:
    """Refuses an answer that ended inside its JSON. LangChain's parsers would complete it to something else."""

    def parse_result(self, result: list[Generation], *, partial: bool = False) -> Any:
        text = result[0].text
        try:
            json.loads("null" if partial else text)
        except ValueError as error:
            message = f"the answer's JSON is not complete, allow more max_tokens: {text}"
            raise OutputParserException(message, llm_output=text) from error
        return super().parse_result(result, partial=partial)  # type: ignore[misc]


class _Json(_Whole, JsonOutputParser):
    pass


class _Pydantic(_Whole, PydanticOutputParser[Any]):
    pass


def text_parser(schema: dict[str, Any] | type | None) -> Runnable[Any, Any]:
    """Reads an answer that is JSON: as an object of a pydantic class, else as a dictionary."""
    if isinstance(schema, type) and is_basemodel_subclass(schema):
        return _Pydantic(pydantic_object=schema)
    return _Json()


def call_parser(schema: dict[str, Any] | type, name: str) -> Runnable[Any, Any]:
    """Reads an answer that is a call of the tool ``name``."""
    if isinstance(schema, type) and is_basemodel_subclass(schema):
        return PydanticToolsParser(tools=[schema], first_tool_only=True)
    return JsonOutputKeyToolsParser(key_name=name, first_tool_only=True)


def with_parser(
    model: Runnable[LanguageModelInput, AIMessage], parser: Runnable[Any, Any], *, include_raw: bool
) -> Runnable[LanguageModelInput, Any]:
    """``model`` followed by ``parser``; if asked for, the result also has the message itself and the parser's error."""
    if not include_raw:
        return model | parser
    read = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
    unread = RunnablePassthrough.assign(parsed=lambda _: None)
    return RunnableMap(raw=model) | read.with_fallbacks([unread], exception_key="parsing_error")
