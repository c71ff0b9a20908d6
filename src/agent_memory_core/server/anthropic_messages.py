"""Anthropic's messages, https://docs.anthropic.com/en/api/messages."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import Field

from agent_memory_core import Delta, Message, TurnReport, Usage
from agent_memory_core.adapter import measurements, unreadable_part
from agent_memory_core.server.answers import Answer, Piece, PieceReader
from agent_memory_core.server.errors import INVALID, THREAD_NOT_FOUND, ApiError
from agent_memory_core.server.requests import (
    Asked,
    Body,
    Part,
    as_token,
    called,
    content_of,
    effort,
    function_tool,
    parts_of,
    refuse_part,
)
from agent_memory_core.server.sse import data
from agent_memory_core.server.threads import Place, Wanted
from agent_memory_core.server.turns import Admitted, Call

PSEUDO_HEADER = "x-anthropic-"
"""How a block of the system prompt begins that is meant for a provider and not for the model."""


class CountBody(Body):
    """A request to count the tokens of a prompt."""

    messages: list[dict[str, Any]] = Field(max_length=20_000)
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = Field(default=None, max_length=512)
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None

    def asked(self, *, strip: bool) -> Asked:
        """The turn that is asked for.

        Args:
            strip: whether blocks of the system prompt that are pseudo-headers are left out.

        Raises:
            ApiError: a part of the request cannot be used.
            InvalidRequest: the same.
        """
        choice, config = self.tool_choice or {}, self.output_config or {}
        messages = [*self._system(strip), *self._conversation()]
        if not self.messages:
            raise ApiError(INVALID, "messages: at least one message is required.", param="messages")
        last = messages[-1]
        return Asked(
            messages=messages,
            tools=[_tool(tool, f"tools.{i}") for i, tool in enumerate(self.tools or ()) if _is_custom(tool)],
            ignored=tuple(as_token(tool.get("type")) for tool in self.tools or () if not _is_custom(tool)),
            tool_choice=choice.get("name") or choice.get("type"),
            parallel_tool_calls=not choice.get("disable_parallel_tool_use", False),
            response_schema=_schema(config.get("format")),
            template_kwargs=_thinking(self.thinking, config.get("effort")),
            thinking_budget=_budget(self.thinking),
            continues=last.role == "assistant" and bool(last.content.strip()) and not last.tool_calls,
        )

    def _system(self, strip: bool) -> list[Message]:
        system = [{"type": "text", "text": self.system}] if isinstance(self.system, str) else self.system
        kept = [
            block
            for block in system or ()
            if not (strip and str(block.get("text", "")).startswith(PSEUDO_HEADER))
        ]
        text, points = content_of(kept, "system")
        return [Message("system", text, cache_points=points)] if text else []

    def _conversation(self) -> Iterator[Message]:
        for index, item in enumerate(self.messages):
            place = f"messages.{index}"
            content, role = item.get("content"), item.get("role")
            if role == "assistant":
                yield _of_assistant(content, f"{place}.content")
            elif role in ("user", "system"):
                yield from _of_user(role, content, f"{place}.content")
            else:
                raise ApiError(
                    INVALID, f"{place}.role={role!r} is not valid: user, assistant or system.", param=place
                )


class MessagesBody(CountBody):
    """A request for a message."""

    max_tokens: int
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    thread: dict[str, Any] | None = None
    diagnostics: dict[str, Any] | None = None

    @property
    def wanted(self) -> Wanted:
        """What it says of its thread."""
        return Wanted(
            "msg_",
            THREAD_NOT_FOUND,
            previous=(self.thread or {}).get("previous_message_id"),
            keeps=self.thread is not None,
            outlines=self.diagnostics is not None,
            compare=(self.diagnostics or {}).get("previous_message_id"),
            held={"system": self.system, "tools": self.tools},
        )

    def going_on(self, place: Place) -> MessagesBody:
        """The request with what the server holds of its thread."""
        return self.model_copy(update={**place.held, "messages": [*place.earlier, *self.messages]})

    def asked(self, *, strip: bool) -> Asked:
        """The turn that is asked for; arguments and errors as above."""
        asked = super().asked(strip=strip)
        stop = tuple(text for text in self.stop_sequences or () if text)
        asked.sampling = self.given("max_tokens", "temperature", "top_p", "top_k") | {"stop": stop}
        return asked


def _of_user(role: str, content: object, place: str) -> Iterator[Message]:
    """A message of the user, after the results of tools that it holds."""
    if isinstance(content, str):
        yield Message(role, content)
        return
    parts = parts_of(content, place)
    for part, where in parts:
        if part.get("type") == "tool_result":
            result, points = content_of(part.get("content"), where, _in_result)
            failed = "Error: " if part.get("is_error") else ""
            # Points count characters of the result itself.
            points = tuple(point + len(failed) for point in points)
            yield Message(
                "tool", failed + result, tool_call_id=str(part.get("tool_use_id")), cache_points=points
            )
    rest = [part for part, _ in parts if part.get("type") != "tool_result"]
    if rest or not parts:
        text, points = content_of(rest, place, _as_text)
        yield Message(role, text, cache_points=points)


def _in_result(part: Part, place: str) -> str:
    """A part of a tool's result. One that cannot be read must not end a conversation that goes on for hours."""
    if part.get("type") in ("document", "search_result"):
        return _as_text(part, place)
    return unreadable_part(part.get("type"))


def _as_text(part: Part, place: str) -> str:
    """The text of a document or of a search result."""
    kind, source = part.get("type"), part.get("source")
    if kind == "search_result":
        return content_of(part.get("content"), place)[0]
    if kind == "document" and isinstance(source, Mapping):
        if source.get("type") == "text":
            return str(source.get("data", ""))
        if source.get("type") == "content":
            return content_of(source.get("content"), place)[0]
    return refuse_part(part, place)


def _of_assistant(content: object, place: str) -> Message:
    if isinstance(content, str):
        return Message("assistant", content)
    parts = parts_of(content, place)
    texts = [
        part for part, _ in parts if part.get("type") not in ("tool_use", "thinking", "redacted_thinking")
    ]
    text, points = content_of(texts, place)
    calls = [
        called(part.get("name"), part.get("input") or {}, part.get("id"), where)
        for part, where in parts
        if part.get("type") == "tool_use"
    ]
    thoughts = [str(part.get("thinking", "")) for part, _ in parts if part.get("type") == "thinking"]
    return Message(
        "assistant",
        text,
        tool_calls=tuple(calls),
        reasoning="\n\n".join(thoughts) or None,
        cache_points=points,
    )


def _is_custom(tool: Mapping[str, Any]) -> bool:
    """Whether a tool is the client's own; those that a provider runs itself are left out."""
    return tool.get("type") in (None, "custom")


def _tool(tool: Mapping[str, Any], place: str) -> dict[str, Any]:
    return function_tool(tool.get("name"), tool.get("description"), tool.get("input_schema"), place)


def _schema(form: object) -> Mapping[str, Any] | None:
    if form is None:
        return None
    schema = form.get("schema") if isinstance(form, Mapping) and form.get("type") == "json_schema" else None
    if not isinstance(schema, Mapping):
        raise ApiError(
            INVALID,
            'output_config.format is not valid: {"type": "json_schema", "schema": ...}.',
            param="output_config",
        )
    return schema


def _thinking(thinking: Mapping[str, Any] | None, degree: object) -> dict[str, Any]:
    """What the chat template is told. A degree of effort alone does not switch thinking on in this dialect."""
    said = {name: value for name, value in effort(degree).items() if name != "enable_thinking"}
    if thinking is not None:
        said["enable_thinking"] = thinking.get("type") != "disabled"
    return said


def _budget(thinking: Mapping[str, Any] | None) -> int | None:
    """The tokens that the model may think.

    Raises:
        ApiError: they are no whole number.
    """
    budget = (thinking or {}).get("budget_tokens")
    if budget is not None and (type(budget) is not int or budget < 0):
        place = "thinking.budget_tokens"
        raise ApiError(INVALID, f"{place}={budget!r} is not valid: a whole number of tokens.", param=place)
    return budget


# Answers ----------------------------------------------------------------------------------------------------


def usage(counted: Usage, *, is_kept: bool) -> dict[str, Any]:
    """The tokens of a turn, as Anthropic counts them: ``input_tokens`` are those that no cache has to do with.

    Args:
        counted: the turn's tokens.
        is_kept: whether the turn has a session, so that what was computed is there for the next one.
    """
    created = counted.cache_creation if is_kept else 0
    return {
        "input_tokens": counted.cache_creation - created,
        "cache_creation_input_tokens": created,
        "cache_read_input_tokens": counted.cache_read,
        "cache_creation": {"ephemeral_5m_input_tokens": created, "ephemeral_1h_input_tokens": 0},
        "output_tokens": counted.completion_tokens,
    }


def stop_of(report: TurnReport, context: int) -> dict[str, str | None]:
    """Why an answer ended, of a model whose context holds ``context`` tokens."""
    reasons = {"tool_calls": "tool_use", "length": "max_tokens"}
    reason = reasons.get(report.finish_reason, "end_turn")
    if report.stop_string is not None:
        reason = "stop_sequence"
    elif reason == "max_tokens" and report.usage.total_tokens >= context:
        reason = "model_context_window_exceeded"
    return {"stop_reason": reason, "stop_sequence": report.stop_string}


def _message(call: Call, place: Place, cached_tokens: int, **fields: Any) -> dict[str, Any]:
    head = {"id": place.answer_id, "type": "message", "role": "assistant", "model": call.model}
    finding = place.finding(call, cached_tokens)
    return head | {"diagnostics": finding.anthropic() if finding else None} | fields


def _keep(call: Call, answer: Answer, body: MessagesBody, place: Place) -> None:
    """Keep an answer if its request wants it to be."""
    content = [_block(piece) for piece in answer.pieces]
    place.keep(
        call,
        body.messages,
        [{"role": "assistant", "content": content}],
        answer.ended.usage,
        {"id": place.answer_id},
    )


def _block(piece: Piece) -> dict[str, Any]:
    if piece.kind == "text":
        return {"type": "text", "text": piece.text}
    if piece.kind == "reasoning":
        return {"type": "thinking", "thinking": piece.text, "signature": _signature(piece.text)}
    arguments = json.loads(piece.text or "{}")
    return {"type": "tool_use", "id": piece.call_id, "name": piece.name, "input": arguments}


def _signature(thought: str) -> str:
    """What clients send back with a thought. It proves nothing and nobody checks it."""
    return hashlib.sha256(thought.encode(errors="replace")).hexdigest()


def whole(call: Call, answer: Answer, body: MessagesBody, place: Place) -> dict[str, Any]:
    """A message."""
    report = answer.ended
    _keep(call, answer, body, place)
    return _message(
        call,
        place,
        report.usage.cache_read,
        content=[_block(piece) for piece in answer.pieces],
        usage=usage(report.usage, is_kept=call.is_kept),
        agent_memory=measurements(report),
        **stop_of(report, call.context),
    )


class MessageWriter:
    """Streams a message: its start, each block from start to stop, its end."""

    def __init__(self, call: Call, body: MessagesBody, place: Place) -> None:
        self._call, self._body, self._place = call, body, place
        self._reader, self._answer = PieceReader(), Answer()

    def begin(self) -> Iterator[bytes]:
        """Nothing: the start of a message tells how much was in the cache."""
        return iter(())

    def admitted(self, event: Admitted) -> Iterator[bytes]:
        """The start of the message."""
        counted = usage(Usage(event.prompt_tokens, 1, event.cached_tokens), is_kept=self._call.is_kept)
        empty: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None, "usage": counted}
        yield _event("message_start", message=_message(self._call, self._place, event.cached_tokens, **empty))

    def silence(self) -> Iterator[bytes]:
        """A ping."""
        yield _event("ping")

    def delta(self, delta: Delta) -> Iterator[bytes]:
        """The pieces of a delta, each in its block; a block ends where another begins."""
        for piece in self._reader.read(delta):
            begins = not self._answer.continues(piece)
            if begins:
                yield from self._close()
            self._answer.add(piece)
            if begins:
                yield from self._begin(piece)
            if piece.text:
                yield self._add(piece)
        if delta.report is not None:
            yield from self._close()
            self._answer.report = delta.report
            _keep(self._call, self._answer, self._body, self._place)
            counted = usage(delta.report.usage, is_kept=self._call.is_kept)
            yield _event(
                "message_delta",
                delta=stop_of(delta.report, self._call.context),
                usage=counted,
                agent_memory=measurements(delta.report),
            )
            yield _event("message_stop")

    def failed(self, error: ApiError) -> Iterator[bytes]:
        """The error, in place of the rest."""
        yield data(error.anthropic(), "error")

    def _begin(self, piece: Piece) -> Iterator[bytes]:
        block = _block(piece._replace(text="")) | ({"signature": ""} if piece.kind == "reasoning" else {})
        yield _event("content_block_start", index=self._index, content_block=block)

    def _add(self, piece: Piece) -> bytes:
        if piece.kind == "reasoning":
            return self._delta("thinking_delta", thinking=piece.text)
        if piece.kind == "text":
            return self._delta("text_delta", text=piece.text)
        return self._delta("input_json_delta", partial_json=piece.text)

    def _close(self) -> Iterator[bytes]:
        if not self._answer.pieces:
            return
        last = self._answer.pieces[-1]
        if last.kind == "reasoning":
            yield self._delta("signature_delta", signature=_signature(last.text))
        yield _event("content_block_stop", index=self._index)

    @property
    def _index(self) -> int:
        return len(self._answer.pieces) - 1

    def _delta(self, kind: str, **fields: str) -> bytes:
        return _event("content_block_delta", index=self._index, delta={"type": kind, **fields})


def _event(name: str, **fields: Any) -> bytes:
    return data({"type": name, **fields}, name)
