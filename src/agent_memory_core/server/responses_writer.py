"""Answers in OpenAI's responses: whole, and as typed events with running numbers."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from typing import Any

from agent_memory_core import Delta, TurnReport, Usage
from agent_memory_core.adapter import measurements
from agent_memory_core.server.answers import Answer, Piece, PieceReader
from agent_memory_core.server.errors import ApiError
from agent_memory_core.server.openai_responses import ResponsesBody, WireTool
from agent_memory_core.server.sse import data
from agent_memory_core.server.threads import Place
from agent_memory_core.server.turns import Admitted, Call

_PREFIXES = {"text": "msg_", "reasoning": "rs_", "call": "fc_"}


def usage(counted: Usage) -> dict[str, Any]:
    """The tokens of a turn, as the responses count them."""
    cached = {"cached_tokens": counted.cache_read, "cache_write_tokens": counted.cache_creation}
    return {
        "input_tokens": counted.prompt_tokens,
        "input_tokens_details": cached,
        "output_tokens": counted.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": counted.reasoning_tokens},
        "total_tokens": counted.total_tokens,
    }


class Response:
    """One response: the fields that repeat the request, and the items of its output."""

    def __init__(self, call: Call, body: ResponsesBody, place: Place) -> None:
        self._call, self._body, self._place = call, body, place
        self._tools = body.read_tools().wire
        conversation = place.conversation
        self._head: dict[str, Any] = {
            "id": place.answer_id,
            "object": "response",
            "created_at": int(time.time()),
            "completed_at": None,
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": call.model,
            "output": [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "prompt_cache_key": body.prompt_cache_key,
            "conversation": {"id": conversation.id} if conversation else None,
            "reasoning": {"effort": (body.reasoning or {}).get("effort"), "summary": None},
            "store": place.is_kept,
            "temperature": body.temperature,
            "text": body.text or {"format": {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": body.user,
        }

    def begun(self) -> dict[str, Any]:
        """The response without its output."""
        return self._head

    def ended(self, output: list[dict[str, Any]], report: TurnReport) -> dict[str, Any]:
        """The whole response, which is kept if the request wants it to be."""
        is_cut = report.finish_reason == "length"
        finding = self._place.finding(self._call, report.usage.cache_read)
        said = self._head | {
            "status": "incomplete" if is_cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "completed_at": int(time.time()),
            "output": output,
            "usage": usage(report.usage),
            "prompt_cache_diagnostics": finding.openai() if finding else None,
            "agent_memory": measurements(report),
        }
        self._place.keep(self._call, self._body.items(), output, report.usage, said)
        return said

    def failed(self, output: list[dict[str, Any]], error: ApiError) -> dict[str, Any]:
        """The response, as far as it came."""
        said = error.openai()["error"]
        told = {"code": said["code"] or said["type"], "message": said["message"]}
        return self._head | {"status": "failed", "output": output, "error": told}

    def item(self, piece: Piece, item_id: str, status: str = "completed") -> dict[str, Any]:
        """An item of the output."""
        head = {"id": item_id, "status": status}
        if piece.kind == "text":
            content = [text_part(piece.text)] if piece.text else []
            return {**head, "type": "message", "role": "assistant", "content": content}
        if piece.kind == "reasoning":
            thought = [{"type": "reasoning_text", "text": piece.text}] if piece.text else []
            return {**head, "type": "reasoning", "summary": [], "content": thought}
        tool = self.tool(piece)
        head |= {"call_id": piece.call_id, "name": tool.name}
        if tool.namespace is not None:
            head["namespace"] = tool.namespace
        if tool.is_custom:
            return {**head, "type": "custom_tool_call", "input": free_text(piece)}
        return {**head, "type": "function_call", "arguments": piece.text}

    def item_id(self, piece: Piece, index: int) -> str:
        """The id of an item of the output, by which `response_of` finds the response again."""
        return f"{_PREFIXES[piece.kind]}{self._place.answer_id.removeprefix('resp_')}_{index}"

    def tool(self, piece: Piece) -> WireTool:
        """The tool that a piece calls."""
        return self._tools.get(piece.name, WireTool(piece.name, None, False))


def text_part(text: str) -> dict[str, Any]:
    """The only part of a message."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def free_text(piece: Piece) -> str:
    """What a custom tool is called with; empty while it is not complete."""
    try:
        return str(json.loads(piece.text)["input"])
    except (ValueError, LookupError):
        return ""


def whole(call: Call, answer: Answer, body: ResponsesBody, place: Place) -> dict[str, Any]:
    """A response."""
    response = Response(call, body, place)
    pieces = enumerate(answer.pieces)
    output = [response.item(piece, response.item_id(piece, index)) for index, piece in pieces]
    return response.ended(output, answer.ended)


class ResponseWriter:
    """Streams a response: each item from added to done, and at the end the whole."""

    def __init__(self, call: Call, body: ResponsesBody, place: Place) -> None:
        self._response, self._reader = Response(call, body, place), PieceReader()
        self._numbers = itertools.count()
        self._output: list[dict[str, Any]] = []
        self._answer = Answer()
        self._item_id = ""

    def begin(self) -> Iterator[bytes]:
        """The response without its output, twice: created, and being made."""
        yield self._event("response.created", response=self._response.begun())
        yield from self.silence()

    def admitted(self, event: Admitted) -> Iterator[bytes]:
        """Nothing: the usage comes at the end."""
        return iter(())

    def silence(self) -> Iterator[bytes]:
        """That it is being made."""
        yield self._event("response.in_progress", response=self._response.begun())

    def delta(self, delta: Delta) -> Iterator[bytes]:
        """The pieces of a delta, each in its item; an item ends where another begins."""
        for piece in self._reader.read(delta):
            before = len(self._answer.pieces)
            if before and not self._answer.continues(piece):
                yield from self._close()
            self._answer.add(piece)
            if len(self._answer.pieces) > before:
                yield from self._begin(piece)
            if piece.text:
                yield from self._add(piece)
        if delta.report is not None:
            yield from self._close()
            said = self._response.ended(self._output, delta.report)
            yield self._event(f"response.{said['status']}", response=said)

    def failed(self, error: ApiError) -> Iterator[bytes]:
        """That there will be no more of it."""
        yield self._event("response.failed", response=self._response.failed(self._output, error))

    def _begin(self, piece: Piece) -> Iterator[bytes]:
        self._item_id = self._response.item_id(piece, len(self._output))
        item = self._response.item(piece._replace(text=""), self._item_id, "in_progress")
        yield self._of_item("response.output_item.added", item=item)
        if piece.kind == "text":
            yield self._of_content("response.content_part.added", part=text_part(""))

    def _add(self, piece: Piece) -> Iterator[bytes]:
        if piece.kind == "text":
            yield self._of_content("response.output_text.delta", delta=piece.text, logprobs=[])
        elif piece.kind == "reasoning":
            yield self._of_content("response.reasoning_text.delta", delta=piece.text)
        elif not self._response.tool(piece).is_custom:
            yield self._of_text("response.function_call_arguments.delta", delta=piece.text)

    def _close(self) -> Iterator[bytes]:
        """The end of the last item."""
        if not self._answer.pieces:
            return
        piece = self._answer.pieces[-1]
        if piece.kind == "text":
            yield self._of_content("response.output_text.done", text=piece.text, logprobs=[])
            yield self._of_content("response.content_part.done", part=text_part(piece.text))
        elif piece.kind == "reasoning":
            yield self._of_content("response.reasoning_text.done", text=piece.text)
        else:
            yield from self._close_call(piece)
        item = self._response.item(piece, self._item_id)
        yield self._of_item("response.output_item.done", item=item)
        self._output.append(item)

    def _close_call(self, piece: Piece) -> Iterator[bytes]:
        tool = self._response.tool(piece)
        if tool.is_custom:
            # The text is known once the JSON that holds it is complete.
            yield self._of_text("response.custom_tool_call_input.delta", delta=free_text(piece))
            yield self._of_text("response.custom_tool_call_input.done", input=free_text(piece))
        else:
            yield self._of_text("response.function_call_arguments.done", name=tool.name, arguments=piece.text)

    def _of_content(self, name: str, /, **fields: Any) -> bytes:
        return self._of_text(name, content_index=0, **fields)

    def _of_text(self, name: str, /, **fields: Any) -> bytes:
        return self._of_item(name, item_id=self._item_id, **fields)

    def _of_item(self, name: str, /, **fields: Any) -> bytes:
        return self._event(name, output_index=len(self._output), **fields)

    def _event(self, name: str, /, **fields: Any) -> bytes:
        return data({"type": name, "sequence_number": next(self._numbers), **fields}, name)
