"""Structured output: schemas in every form LangChain has, as what the model is asked for and how it is read.

An answer that ended before its JSON was complete is an error that says so, whole, streamed and with ``include_raw``:
LangChain's own parsers would complete it to something else, or return None.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any, Literal

from langchain_core.exceptions import OutputParserException
from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from langchain_core.output_parsers.openai_tools import JsonOutputKeyToolsParser, PydanticToolsParser
from langchain_core.outputs import ChatGeneration, Generation
from langchain_core.runnables import Runnable, RunnableGenerator
from langchain_core.runnables.utils import AddableDict
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass
from pydantic import BaseModel, PydanticUserError, TypeAdapter, ValidationError

from agent_memory_core import InvalidRequest

Method = Literal["json_schema", "function_calling", "json_mode"]
"""How a structured answer is asked for: as text that fits the schema, as a forced tool call, as any JSON object."""

METHODS: tuple[Method, ...] = ("json_schema", "function_calling", "json_mode")


def to_tool(tool: Any, *, strict: bool | None = None) -> dict[str, Any]:
    """A tool in any form that LangChain has, as an OpenAI function schema.

    Raises:
        InvalidRequest: it is none, above all a tool that a provider runs by itself.
    """
    if isinstance(tool, dict) and not _describes_function(tool):
        kind = tool.get("type") or ", ".join(map(str, tool))
        raise InvalidRequest(
            f"a tool of type {kind!r} is not valid: a provider runs it, and this model runs here. Offer a function."
        )
    try:
        return convert_to_openai_tool(tool, strict=strict)
    except ValueError as error:
        raise InvalidRequest(f"the tool {tool!r} is not valid: {error}") from error


def _describes_function(tool: Mapping[str, Any]) -> bool:
    if tool.get("type", "function") not in ("function", "object"):
        return "input_schema" in tool
    if "function" in tool:
        return isinstance(tool["function"], Mapping) and isinstance(tool["function"].get("name"), str)
    return bool({"name", "title"} & tool.keys())


def response_format(schema: dict[str, Any] | type, method: Method) -> dict[str, Any]:
    """The ``response_format`` that asks for ``schema``."""
    if method == "json_mode":
        return {"type": "json_object"}
    form = to_json_schema(schema)
    return {"type": "json_schema", "json_schema": {"name": form.get("title", "answer"), "schema": form}}


def form_tool(schema: dict[str, Any] | type) -> dict[str, Any]:
    """The tool by whose call an answer of this form is given.

    Raises:
        InvalidRequest: the form is not an object, as the arguments of a call are.
    """
    form = to_json_schema(schema)
    name = _function(schema).get("name") if isinstance(schema, dict) else getattr(schema, "__name__", None)
    if not _is_object(form, form):
        raise InvalidRequest(
            f"the schema {_name_of(form, name)!r} is not an object, and the arguments of a call are one: use "
            "method='json_schema', or make it a property of an object."
        )
    function = {"name": _name_of(form, name), "description": form.get("description", ""), "parameters": form}
    return {"type": "function", "function": function}


def to_json_schema(schema: Any) -> dict[str, Any]:
    """The JSON schema of a class or type, of a function schema in OpenAI's or Anthropic's form, or the schema itself.

    Raises:
        InvalidRequest: it is none of these, or no JSON can have this type.
    """
    if isinstance(schema, dict):
        return _of_function(schema)
    if schema is BaseModel:  # LangChain cannot describe it in its traces
        raise _no_form(schema)
    try:
        return (
            convert_to_json_schema(schema)
            if _in_langchains_form(schema)
            else TypeAdapter(schema).json_schema()
        )
    except (TypeError, ValueError, PydanticUserError) as error:
        raise _no_form(schema) from error


def _no_form(schema: object) -> InvalidRequest:
    return InvalidRequest(
        f"schema={schema!r} is not valid: give a pydantic class, a typed dictionary, a type or a JSON schema."
    )


def shown_schema(schema: Any) -> Any:
    """A schema as LangChain's traces can read it: they take objects only."""
    if schema is None:
        return {"title": "answer", "type": "object"}
    form = to_json_schema(schema)
    if isinstance(form.get("type"), str) and (isinstance(schema, dict) or not is_value_type(schema)):
        return schema
    return {"name": _name_of(form, getattr(schema, "__name__", None)), "description": "", "parameters": form}


def is_value_type(schema: Any) -> bool:
    """Whether ``schema`` is a Python type, such as ``list[int]``, an enum or a union, whose values are answered."""
    return not isinstance(schema, dict) and not _is_class(schema) and not _in_langchains_form(schema)


def _is_class(schema: Any) -> bool:
    return isinstance(schema, type) and issubclass(schema, BaseModel)


def _in_langchains_form(schema: Any) -> bool:
    """Whether only LangChain knows how to read it: typed dictionaries, functions, tools and classes of pydantic 1."""
    typed = isinstance(schema, type) and issubclass(schema, dict) and hasattr(schema, "__required_keys__")
    read = typed or is_dataclass(schema) or inspect.isroutine(schema) or isinstance(schema, BaseTool)
    return read or (not _is_class(schema) and is_basemodel_subclass(schema))


def _of_function(schema: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema of a function's parameters; ``schema`` itself if it describes none."""
    function = _function(schema)
    if not function:
        return schema
    found = next((function[key] for key in _PARAMETERS if isinstance(function.get(key), Mapping)), None)
    form = dict(found) if found is not None else {"type": "object", "properties": {}}
    described = {"title": function.get("name"), "description": function.get("description")}
    return {key: value for key, value in described.items() if value} | form


_PARAMETERS = ("parameters", "input_schema", "schema")


def _function(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The function that ``schema`` describes; empty where it is a JSON schema itself."""
    inner = schema.get("function", schema.get("json_schema"))
    if isinstance(inner, Mapping):
        return inner
    described = isinstance(schema.get("name"), str) and not {"type", "properties", "$ref"} & schema.keys()
    return schema if described else {}


def _name_of(form: Mapping[str, Any], name: object) -> str:
    """The name of a tool: the class's or the function's, else the schema's title."""
    return str(name or form.get("title") or "answer")


def _is_object(form: Any, root: Mapping[str, Any], depth: int = 0) -> bool:
    """Whether every value that fits ``form`` is an object, as far as its first lines tell."""
    if not isinstance(form, Mapping) or depth > 8:
        return False
    if isinstance(reference := form.get("$ref"), str):
        found: Any = root
        for key in reference.removeprefix("#").strip("/").split("/"):
            found = found.get(key) if isinstance(found, Mapping) and key else found
        return _is_object(found, root, depth + 1)
    for word in ("anyOf", "oneOf"):
        if choices := form.get(word):
            return all(_is_object(choice, root, depth + 1) for choice in choices)
    if every := form.get("allOf"):
        return any(_is_object(part, root, depth + 1) for part in every)
    return form.get("type") == "object" or ("type" not in form and "properties" in form)


# Parsers ----------------------------------------------------------------------------------------------------


_NOTHING = object()
"""What a stream has yielded before its first value, which may be None."""


class _ToItsEnd:
    """A parser that reads a stream's last value as a whole answer, so that one that was cut raises at the end."""

    def _transform(self, input: Iterator[str | BaseMessage]) -> Iterator[Any]:
        pieces = _Pieces()
        last: Any = _NOTHING
        for last in super()._transform(pieces.through(input)):  # type: ignore[misc]
            yield last
        yield from self._rest(pieces, last)

    async def _atransform(self, input: AsyncIterator[str | BaseMessage]) -> AsyncIterator[Any]:
        pieces = _Pieces()
        last: Any = _NOTHING
        async for last in super()._atransform(pieces.through_async(input)):  # type: ignore[misc]
            yield last
        for value in self._rest(pieces, last):
            yield value

    def _rest(self, pieces: _Pieces, last: Any) -> Iterator[Any]:
        if pieces.message is not None:
            value = self.parse_result([ChatGeneration(message=pieces.message)])  # type: ignore[attr-defined]
            if value != last:
                yield value


class _Pieces:
    """The pieces of an answer, put together as they go by."""

    def __init__(self) -> None:
        self.message: BaseMessage | None = None

    def add(self, piece: str | BaseMessage) -> None:
        if isinstance(piece, str):
            piece = AIMessageChunk(content=piece)
        both = isinstance(self.message, AIMessageChunk) and isinstance(piece, AIMessageChunk)
        self.message = self.message + piece if both else piece  # type: ignore[operator, assignment]

    def through(self, pieces: Iterator[str | BaseMessage]) -> Iterator[str | BaseMessage]:
        for piece in pieces:
            self.add(piece)
            yield piece

    async def through_async(
        self, pieces: AsyncIterator[str | BaseMessage]
    ) -> AsyncIterator[str | BaseMessage]:
        async for piece in pieces:
            self.add(piece)
            yield piece


class _Whole(_ToItsEnd):
    """Refuses an answer that ended inside its JSON. LangChain's parsers would complete it to something else."""

    def parse_result(self, result: list[Generation], *, partial: bool = False) -> Any:
        text = result[0].text
        try:
            json.loads("null" if partial else text)
        except ValueError as error:
            message = f"{_end_of(result[0], 'its JSON')}: {text}"
            raise OutputParserException(message, llm_output=text) from error
        return super().parse_result(result, partial=partial)  # type: ignore[misc]


class _Called(_ToItsEnd):
    """Refuses an answer without the call that it was to be. LangChain's parsers would return None."""

    form: str
    """The name of the tool that is to be called."""

    def parse_result(self, result: list[Generation], *, partial: bool = False) -> Any:
        message = result[0].message if isinstance(result[0], ChatGeneration) else None
        calls = message.tool_calls if isinstance(message, AIMessage) else []
        if not partial and not any(call["name"] == self.form for call in calls):
            raise OutputParserException(self._refusal(result[0], message), llm_output=result[0].text)
        return super().parse_result(result, partial=partial)  # type: ignore[misc]

    def _refusal(self, generation: Generation, message: object) -> str:
        invalid = message.invalid_tool_calls if isinstance(message, AIMessage) else []
        reason = _finish_reason(generation)
        if reason in ("length", "stop") and (invalid or reason == "length"):
            return (
                f"{_end_of(generation, f'the call of {self.form!r}')}, or bound the schema's texts and lists."
            )
        said = "; ".join(str(call["error"]) for call in invalid) or repr(generation.text)
        return f"the answer has no call of {self.form!r} that can be read: {said}"


def _finish_reason(generation: Generation) -> object:
    return (
        generation.message.response_metadata.get("finish_reason")
        if isinstance(generation, ChatGeneration)
        else None
    )


def _end_of(generation: Generation, place: str) -> str:
    """In what way an answer ended inside ``place``, and what helps."""
    message = generation.message if isinstance(generation, ChatGeneration) else None
    usage = message.usage_metadata if isinstance(message, AIMessage) else None
    if _finish_reason(generation) == "stop":
        return f"the answer ended at a stop string inside {place}: choose a stop string that JSON cannot hold"
    limit = f"max_tokens={usage['output_tokens']}" if usage else "max_tokens"
    return f"the answer ended at {limit} inside {place}: raise max_tokens"


class _Json(_Whole, JsonOutputParser):
    pass


class _Pydantic(_Whole, PydanticOutputParser[Any]):
    pass


class _CallOfPydantic1(_Called, PydanticToolsParser):
    form: str


class _JsonCall(_Called, JsonOutputKeyToolsParser):
    form: str


class _Typed:
    """Reads what another parser found as a value of a type; None while an answer is unfinished and not one yet."""

    kind: Any

    def parse_result(self, result: list[Generation], *, partial: bool = False) -> Any:
        value = super().parse_result(result, partial=partial)  # type: ignore[misc]
        try:
            return TypeAdapter(self.kind).validate_json(json.dumps(value))
        except ValidationError as error:
            if partial:
                return None
            message = f"the answer is not valid as {self.kind!r}: {error}"
            raise OutputParserException(message, llm_output=json.dumps(value)) from error


class _TypedCall(_Typed, _JsonCall):
    kind: Any


class _TypedText(_Typed, _Json):
    kind: Any


def text_parser(schema: dict[str, Any] | type | None) -> Runnable[Any, Any]:
    """Reads an answer that is JSON: as an object of a pydantic class or a value of a type, else as what it says."""
    if isinstance(schema, type) and is_basemodel_subclass(schema):
        return _Pydantic(pydantic_object=schema)
    if schema is not None and is_value_type(schema):
        return _TypedText(kind=schema)
    return _Json()


def call_parser(schema: dict[str, Any] | type, name: str) -> Runnable[Any, Any]:
    """Reads an answer that is a call of the tool ``name``."""
    if _is_class(schema) or is_value_type(schema):
        return _TypedCall(kind=schema, key_name=name, first_tool_only=True, form=name)
    if isinstance(schema, type) and is_basemodel_subclass(schema):
        return _CallOfPydantic1(tools=[schema], first_tool_only=True, form=name)
    return _JsonCall(key_name=name, first_tool_only=True, form=name)


def with_parser(
    model: Runnable[LanguageModelInput, AIMessage], parser: Any, *, include_raw: bool
) -> Runnable[LanguageModelInput, Any]:
    """``model`` followed by ``parser``; if asked for, the result also has the message itself and the parser's error.

    A stream of the second form has the message in pieces, and at its end the value or the error.
    """
    if not include_raw:
        read: Runnable[LanguageModelInput, Any] = model | parser
        return read

    def both(pieces: Iterator[BaseMessage]) -> Iterator[AddableDict]:
        whole = _Pieces()
        for piece in pieces:
            whole.add(piece)
            yield AddableDict(raw=piece)
        yield _parsed(parser, whole)

    async def both_async(pieces: AsyncIterator[BaseMessage]) -> AsyncIterator[AddableDict]:
        whole = _Pieces()
        async for piece in pieces:
            whole.add(piece)
            yield AddableDict(raw=piece)
        yield _parsed(parser, whole)

    return model | RunnableGenerator(both, both_async)


def _parsed(parser: Any, whole: _Pieces) -> AddableDict:
    """The value of an answer, or why it has none."""
    assert whole.message is not None
    try:
        value = parser.parse_result([ChatGeneration(message=whole.message)])
    except OutputParserException as error:
        return AddableDict(parsed=None, parsing_error=error)
    return AddableDict(parsed=value, parsing_error=None)
