"""Structured answers: objects of a pydantic class, whole or while they are written.

By default the answer is held to the class's JSON schema and not asked for as a tool's call: a tool would stand at the
head of the prompt, before all that a session knows, and some classes, as recursive ones, do not survive being a tool.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator, Mapping
from typing import Any

from llama_index.core.base.llms.types import ChatResponse, ToolCallBlock
from llama_index.core.program.streaming_utils import process_streaming_content_incremental
from pydantic import BaseModel, ValidationError

from agent_memory_core import ChatRequest, InvalidRequest


def to_object(output_cls: type[BaseModel], response: ChatResponse) -> BaseModel:
    """The object that a whole answer holds.

    Raises:
        ValueError: the answer ended before it was complete.
    """
    calls = [block.tool_kwargs for block in response.message.blocks if isinstance(block, ToolCallBlock)]
    try:
        if calls:
            return output_cls.model_validate(calls[0])
        return output_cls.model_validate_json(response.message.content or "")
    except ValidationError as error:
        cut = end_of(response, f"an object of {output_cls.__name__}")
        raise ValueError(f"{cut or f'the answer is no {output_cls.__name__}: {error}'}") from error


def end_of(response: ChatResponse, place: str) -> str:
    """In what way an answer ended inside ``place``, and what helps; empty where it came to its own end."""
    raw = response.raw if isinstance(response.raw, dict) else {}
    if raw.get("finish_reason") == "length":
        most = raw["usage"]["completion_tokens"]
        return f"the answer ended at max_tokens={most} in the middle of {place}: raise max_tokens, or bound the fields."
    return ""


def check_called(request: ChatRequest, last: ChatResponse | None) -> None:
    """Look at the end of a stream: LlamaIndex's programs and agents take a call that was cut for an empty answer.

    Raises:
        ValueError: ``request`` forces a call, and the answer ended before its first one was complete.
    """
    forced = request.tool_choice not in (None, "none")
    if last is None or not forced or any(isinstance(block, ToolCallBlock) for block in last.message.blocks):
        return
    if cut := end_of(last, "a tool call"):
        raise ValueError(cut)


def to_schema(value: object) -> Mapping[str, Any] | None:
    """A JSON schema, from one or from a pydantic class.

    Raises:
        InvalidRequest: it is neither.
    """
    if isinstance(value, type) and issubclass(value, BaseModel):
        return value.model_json_schema()
    if value is None or isinstance(value, Mapping):
        return value
    raise InvalidRequest(f"response_schema={value!r} is not valid: a JSON schema or a pydantic class.")


def objects(output_cls: type[BaseModel], pieces: Iterator[ChatResponse]) -> Generator[Any, None, None]:
    """The object as far as it is written, whenever it grows, and at last the whole one.

    Raises:
        ValueError: the answer ended before it was complete.
    """
    growing = _Growing(output_cls)
    for piece in pieces:
        yield from growing.add(piece)
    yield from growing.end()


async def aobjects(
    output_cls: type[BaseModel], pieces: AsyncIterator[ChatResponse]
) -> AsyncGenerator[Any, None]:
    """`objects` for coroutines."""
    growing = _Growing(output_cls)
    async for piece in pieces:
        for found in growing.add(piece):
            yield found
    for found in growing.end():
        yield found


class _Growing:
    """An object that is being written."""

    def __init__(self, output_cls: type[BaseModel]) -> None:
        self._output_cls = output_cls
        self._response: ChatResponse | None = None
        self._object: Any = None

    def add(self, piece: ChatResponse) -> Iterator[Any]:
        """Take an answer so far, and yield the object if that has changed."""
        self._response = piece
        if piece.raw is not None or not piece.message.content:
            return
        found = process_streaming_content_incremental(piece, self._output_cls, self._object)
        if found != self._object:
            self._object = found
            yield found

    def end(self) -> Iterator[Any]:
        """Yield the whole object."""
        if self._response is not None:
            yield to_object(self._output_cls, self._response)
