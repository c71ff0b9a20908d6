"""OpenAI's chat completions, https://platform.openai.com/docs/api-reference/chat."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from pydantic import BaseModel, Field

from agent_memory_core import Delta, InvalidRequest, Message, TokenLogprob, TurnReport, Usage
from agent_memory_core.adapter import check_neutral, measurements, to_response_schema
from agent_memory_core.server.answers import Answer, Piece, PieceReader
from agent_memory_core.server.choices import MOST_CHOICES, Choices, summed
from agent_memory_core.server.errors import INVALID, UNSUPPORTED, ApiError
from agent_memory_core.server.ids import new_id
from agent_memory_core.server.requests import Asked, Body, called, content_of, effort, function_tool
from agent_memory_core.server.sse import data
from agent_memory_core.server.tool_choice import allowed_tools
from agent_memory_core.server.turns import Admitted, Call

TEXTS = ("text", "input_text", "output_text", "refusal")

PENALTIES = ("frequency_penalty", "presence_penalty", "logit_bias")
"""Fields that may be there and must change nothing."""

DONE = b"data: [DONE]\n\n"


class SamplingBody(Body):
    """The fields of sampling, as OpenAI and servers of open models name them."""

    CAN_CHOOSE: ClassVar[bool] = False
    """Whether ``n`` may ask for several answers."""

    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    n: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None

    def sampling(self) -> dict[str, Any]:
        """Fields of `SamplingParams`.

        Raises:
            ApiError: a field asks for what no model here can do.
        """
        self._check_neutral()
        given = self.given("max_tokens", "temperature", "top_p", "min_p", "repetition_penalty", "seed")
        if self.top_k is not None:
            # Some servers write "off" as -1.
            given["top_k"] = max(0, self.top_k)
        if self.max_completion_tokens is not None:
            given["max_tokens"] = self.max_completion_tokens
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return given | {"stop": tuple(text for text in stop if text)}

    def _check_neutral(self) -> None:
        for name in PENALTIES if self.CAN_CHOOSE else (*PENALTIES, "n"):
            try:
                check_neutral({name: getattr(self, name)})
            except InvalidRequest as error:
                raise ApiError(UNSUPPORTED, str(error), param=name) from error

    @property
    def wants_usage(self) -> bool:
        """Whether a stream is to end with the usage."""
        return bool((self.stream_options or {}).get("include_usage"))


class CalledFunction(BaseModel):
    """What a tool call of a message names."""

    name: str
    arguments: str | dict[str, Any] | None = None


class ChatCall(BaseModel):
    """A tool call of a message."""

    id: str | None = None
    function: CalledFunction


class ChatMessage(BaseModel):
    """A message."""

    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[ChatCall] | None = None
    function_call: CalledFunction | None = None
    """The only call, in the form before tools."""
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: Any = None


class ChatBody(SamplingBody):
    """A request for a chat completion."""

    CAN_CHOOSE = True

    n: int | None = Field(default=None, ge=1, le=MOST_CHOICES)
    messages: list[ChatMessage] = Field(min_length=1, max_length=20_000)
    tools: list[dict[str, Any]] | None = Field(default=None, max_length=512)
    tool_choice: Any = None
    functions: list[dict[str, Any]] | None = Field(default=None, max_length=512)
    """Tools in the form before tools."""
    function_call: Any = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    reasoning_effort: str | None = None
    thinking_budget: int | None = Field(default=None, ge=0)
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool = False
    add_generation_prompt: bool | None = None
    modalities: list[str] | None = None

    def asked(self) -> Asked:
        """The turn that is asked for.

        Raises:
            ApiError: a part of the request cannot be used.
            InvalidRequest: the same.
        """
        self._check()
        tools, choice = self._tools()
        logprobs = self.given("logprobs", "top_logprobs") if self.logprobs else {}
        return Asked(
            messages=[_message(item, f"messages.{i}") for i, item in enumerate(self.messages)],
            tools=tools,
            tool_choice=choice,
            parallel_tool_calls=False if self.is_older else self.parallel_tool_calls,
            response_schema=to_response_schema(self.response_format),
            sampling=self.sampling() | logprobs,
            template_kwargs=effort(self.reasoning_effort) | (self.chat_template_kwargs or {}),
            continues=self.continue_final_message,
            thinking_budget=self.thinking_budget,
        )

    @property
    def is_older(self) -> bool:
        """Whether the client speaks of functions, as before there were tools, and reads its call in that form."""
        return bool(self.functions) and not self.tools

    def _check(self) -> None:
        if set(self.modalities or ()) - {"text"}:
            raise ApiError(
                UNSUPPORTED, f"modalities={self.modalities} is not valid: text only.", param="modalities"
            )
        if self.add_generation_prompt is False and not self.continue_final_message:
            name = "add_generation_prompt"
            raise ApiError(
                UNSUPPORTED, f"{name}=False is not valid without continue_final_message=True.", param=name
            )

    def _tools(self) -> tuple[list[dict[str, Any]], object]:
        """The tools that the model is told of, and the choice among them."""
        if self.is_older:
            given = [{"function": function} for function in self.functions or ()]
            tools = [_tool(tool, f"functions.{i}") for i, tool in enumerate(given)]
            return tools, self.function_call if self.tool_choice is None else self.tool_choice
        tools = [_tool(tool, f"tools.{i}") for i, tool in enumerate(self.tools or ())]
        return allowed_tools(tools, self.tool_choice)


def _tool(tool: Mapping[str, Any], place: str) -> dict[str, Any]:
    function = tool.get("function")
    if tool.get("type", "function") != "function" or not isinstance(function, Mapping):
        raise ApiError(UNSUPPORTED, f"{place}: only tools of type 'function' can be called.", param=place)
    return function_tool(function.get("name"), function.get("description"), function.get("parameters"), place)


ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"} | {
    "tool": "tool",
    "function": "tool",
}


def _message(item: ChatMessage, place: str) -> Message:
    role = ROLES.get(item.role)
    if role is None:
        raise ApiError(
            INVALID, f"{place}.role={item.role!r} is not valid: one of {', '.join(ROLES)}.", param=place
        )
    content, points = content_of(item.content, f"{place}.content", texts=TEXTS)
    reasoning = item.reasoning_content or item.reasoning
    older = [ChatCall(function=item.function_call)] if item.function_call else []
    return Message(
        role,
        content,
        name=item.name,
        tool_calls=tuple(
            called(call.function.name, call.function.arguments, call.id, f"{place}.tool_calls.{index}")
            for index, call in enumerate(item.tool_calls or older)
        ),
        tool_call_id=item.tool_call_id,
        reasoning=reasoning if isinstance(reasoning, str) and role == "assistant" else None,
        cache_points=points,
    )


# Answers ----------------------------------------------------------------------------------------------------


def usage(counted: Usage) -> dict[str, Any]:
    """The tokens of a turn, as OpenAI counts them."""
    return {
        "prompt_tokens": counted.prompt_tokens,
        "completion_tokens": counted.completion_tokens,
        "total_tokens": counted.total_tokens,
        "prompt_tokens_details": {
            "cached_tokens": counted.cache_read,
            "cache_write_tokens": counted.cache_creation,
        },
        "completion_tokens_details": {"reasoning_tokens": counted.reasoning_tokens},
    }


def finish_reason(report: TurnReport) -> str:
    """Why an answer ended."""
    return report.finish_reason if report.finish_reason != "cancelled" else "stop"


def _finish(report: TurnReport, call: Call) -> str:
    """Why an answer ended, in the form that its client reads."""
    reason = finish_reason(report)
    return "function_call" if call.is_older and reason == "tool_calls" else reason


def _logprob(entry: TokenLogprob, top: bool = True) -> dict[str, Any]:
    said = {"token": entry.token, "logprob": entry.logprob, "bytes": list(entry.raw)}
    return said | {"top_logprobs": [_logprob(other, False) for other in entry.top]} if top else said


def _logprobs(entries: list[TokenLogprob]) -> dict[str, Any] | None:
    return {"content": [_logprob(entry) for entry in entries], "refusal": None} if entries else None


def _wire_call(piece: Piece) -> dict[str, Any]:
    function = {"name": piece.name, "arguments": piece.text}
    return {"id": piece.call_id, "type": "function", "function": function}


def whole(call: Call, answer: Answer) -> dict[str, Any]:
    """A chat completion."""
    return whole_of(call, [answer])


def whole_of(call: Call, answers: Sequence[Answer]) -> dict[str, Any]:
    """A chat completion of several answers."""
    return {
        "id": new_id("chatcmpl-"),
        "object": "chat.completion",
        "created": int(time.time()),
        "model": call.model,
        "choices": [_choice(index, answer, call) for index, answer in enumerate(answers)],
        "usage": usage(summed([answer.ended.usage for answer in answers])),
        "agent_memory": measurements(answers[0].ended),
    }


def _choice(index: int, answer: Answer, call: Call) -> dict[str, Any]:
    text, thought, calls = answer.text(), answer.text("reasoning"), answer.of("call")
    message: dict[str, Any] = {
        "role": "assistant",
        "content": None if calls and not text else text,
        "refusal": None,
    }
    if thought:
        message["reasoning_content"] = thought
    if calls and call.is_older:
        message["function_call"] = _wire_call(calls[0])["function"]
    elif calls:
        message["tool_calls"] = [_wire_call(piece) for piece in calls]
    return {
        "index": index,
        "message": message,
        "logprobs": _logprobs(answer.logprobs),
        "finish_reason": _finish(answer.ended, call),
    }


def _head(call: Call) -> dict[str, Any]:
    created = int(time.time())
    return {
        "id": new_id("chatcmpl-"),
        "object": "chat.completion.chunk",
        "created": created,
        "model": call.model,
    }


def stream_of(
    choices: Choices, call: Call, silence: float, count: int
) -> tuple[AsyncIterator[bytes], ChatWriter]:
    """The chunks of several answers, and what writes how they end that are not complete."""
    head = _head(call)
    writers = [ChatWriter(call, index, head) for index in range(count)]

    def end(reports: Sequence[TurnReport]) -> Iterator[bytes]:
        if call.usage_in_stream:
            counted = summed([report.usage for report in reports])
            yield data(head | {"choices": [], "usage": usage(counted)})
        yield DONE

    return choices.chunks(writers, silence, end), writers[0]


class ChatWriter:
    """Streams a chat completion in chunks."""

    def __init__(self, call: Call, index: int = 0, head: dict[str, Any] | None = None) -> None:
        """Write one answer; with a ``head``, the one of several with this index, after which more comes."""
        self._call, self._reader = call, PieceReader()
        self._index, self._is_last = index, head is None
        self._head = head or _head(call)
        self._calls: list[str] = []

    def begin(self) -> Iterator[bytes]:
        """The role."""
        yield self._chunk({"role": "assistant", "content": ""})

    def admitted(self, event: Admitted) -> Iterator[bytes]:
        """Nothing: the usage comes at the end."""
        return iter(())

    def silence(self) -> Iterator[bytes]:
        """An empty chunk."""
        yield self._chunk({})

    def delta(self, delta: Delta) -> Iterator[bytes]:
        """The chunks of a delta; the log-probabilities of its tokens go with the first one."""
        logprobs = _logprobs(list(delta.logprobs))
        for piece in self._reader.read(delta):
            yield self._chunk(self._wire(piece), logprobs=logprobs)
            logprobs = None
        if logprobs:
            yield self._chunk({}, logprobs=logprobs)
        if delta.report is not None:
            yield from self._end(delta.report)

    def failed(self, error: ApiError) -> Iterator[bytes]:
        """The error; the stream is closed without a last mark."""
        yield data(error.openai())

    def _end(self, report: TurnReport) -> Iterator[bytes]:
        yield self._chunk({}, finish=_finish(report, self._call), agent_memory=measurements(report))
        if not self._is_last:
            return
        if self._call.usage_in_stream:
            yield data(self._head | {"choices": [], "usage": usage(report.usage)})
        yield DONE

    def _wire(self, piece: Piece) -> dict[str, Any]:
        if piece.kind == "text":
            return {"content": piece.text}
        if piece.kind == "reasoning":
            return {"reasoning_content": piece.text}
        if self._call.is_older:
            return {"function_call": self._older(piece)}
        if piece.call_id in self._calls:
            index = self._calls.index(piece.call_id)
            return {"tool_calls": [{"index": index, "function": {"arguments": piece.text}}]}
        self._calls.append(piece.call_id)
        return {"tool_calls": [{"index": len(self._calls) - 1, **_wire_call(piece)}]}

    def _older(self, piece: Piece) -> dict[str, str]:
        """A piece of the only call; its name is in the first one."""
        if self._calls:
            return {"arguments": piece.text}
        self._calls.append(piece.call_id)
        return {"name": piece.name, "arguments": piece.text}

    def _chunk(
        self,
        delta: Mapping[str, Any],
        *,
        finish: str | None = None,
        logprobs: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> bytes:
        choice = {"index": self._index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return data(self._head | {"choices": [choice]} | more)
