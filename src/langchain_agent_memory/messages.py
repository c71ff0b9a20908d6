"""Two translations without state or side effects: LangChain messages in, LangChain messages out."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    InvalidToolCall as LangChainInvalidToolCall,
    SystemMessage,
    ToolCall as LangChainToolCall,
    ToolMessage,
)
from langchain_core.messages.ai import InputTokenDetails, OutputTokenDetails, UsageMetadata
from langchain_core.messages.tool import ToolCallChunk
from langchain_core.utils.json import parse_partial_json

from agent_memory_core import (
    ChatResult,
    Delta,
    InvalidRequest,
    InvalidToolCall,
    Message,
    TokenLogprob,
    ToolCall,
    TurnReport,
)
from agent_memory_core.adapter import id_of, joined, merge_leading_systems, unreadable_part

PROVIDER = "mlx"

_ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "ai": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
}
_TEXT_BLOCKS = frozenset({"text", "text-plain", "input_text", "output_text"})
_REASONING_BLOCKS = {"reasoning": "reasoning", "thinking": "thinking"}
_CALL_BLOCKS = {"tool_use": "input", "tool_call": "args"}
# They repeat the message's tool_calls, or mean something only to the provider that wrote them.
_IGNORED_BLOCKS = frozenset(
    {"tool_call_chunk", "invalid_tool_call", "input_json_delta", "function_call", "redacted_thinking"}
)
# Put before the text of a call that could not be read, if LangChain would read it as a call after all.
_UNREADABLE = "unreadable call: "


# LangChain to core ------------------------------------------------------------------------------------------


def to_core(messages: Sequence[BaseMessage]) -> tuple[Message, ...]:
    """Return ``messages`` as a chat template knows them; leading system messages become one.

    Raises:
        InvalidRequest: there are none, or one holds something that no text model reads.
    """
    return merge_leading_systems([_message(message) for message in messages])


def _message(message: BaseMessage) -> Message:
    if isinstance(message, AIMessage):
        return _assistant(message)
    role = _role(message)
    text, points = _text(message, role, joint="\n")
    if isinstance(message, ToolMessage):
        shown = _tool_text(text, message.status)
        points = tuple(point + len(shown) - len(text) for point in points)
        return Message(role, shown, message.name, tool_call_id=message.tool_call_id, cache_points=points)
    return Message(role, text, message.name, cache_points=points)


def _role(message: BaseMessage) -> str:
    if isinstance(message, HumanMessage):
        return "user"
    if isinstance(message, SystemMessage):
        return "system"
    if isinstance(message, (ToolMessage, FunctionMessage)):
        return "tool"
    if isinstance(message, ChatMessage) and message.role in _ROLES:
        return _ROLES[message.role]
    kind = f"role {message.role!r}" if isinstance(message, ChatMessage) else type(message).__name__
    raise InvalidRequest(f"a message of {kind} is not valid: user, assistant, system or tool.")


def _assistant(message: AIMessage) -> Message:
    # The model wrote its answer in one piece, so its blocks are joined without a separator.
    text, points = _text(message, "assistant", joint="")
    unread = (_unread(call["args"] or "") for call in message.invalid_tool_calls)
    return Message(
        role="assistant",
        content="\n".join(filter(None, (text, *unread))),
        name=message.name,
        tool_calls=tuple(_calls(message)),
        reasoning=_reasoning(message),
        cache_points=points,
    )


def _calls(message: AIMessage) -> Iterator[ToolCall]:
    for call in message.tool_calls:
        yield ToolCall(call["name"], call["args"], call["id"] or "")
    if message.tool_calls:
        return
    for block in _blocks(message.content):
        arguments = _CALL_BLOCKS.get(block.get("type", ""))
        if arguments is not None:
            yield ToolCall(block["name"], block.get(arguments) or {}, block.get("id") or "")


def _reasoning(message: AIMessage) -> str | None:
    content = message.additional_kwargs.get("reasoning_content")
    if isinstance(content, str) and content:
        return content
    found = (
        block.get(_REASONING_BLOCKS[block["type"]])
        for block in _blocks(message.content)
        if block.get("type") in _REASONING_BLOCKS
    )
    return "".join(filter(None, found)) or None


def _tool_text(text: str, status: str) -> str:
    """The text of a tool's result. A failure becomes a part of the text, since no chat template shows a status."""
    if status != "error" or text.lstrip().lower().startswith("error"):
        return text
    return f"Error: {text}"


def _blocks(content: object) -> Iterator[Mapping[str, Any]]:
    if isinstance(content, list):
        yield from (block for block in content if isinstance(block, Mapping))


def _text(message: BaseMessage, role: str, *, joint: str) -> tuple[str, tuple[int, ...]]:
    """The text of a message's content, and its cache points: the ends of what has a ``cache_control``.

    Raises:
        InvalidRequest: a block is no text, nor a part of an answer that is kept elsewhere.
    """
    content = message.content
    blocks: Sequence[str | dict[Any, Any]] = [content] if isinstance(content, str) else content
    marked = [isinstance(block, Mapping) and bool(block.get("cache_control")) for block in blocks]
    if marked and message.additional_kwargs.get("cache_control"):
        marked[-1] = True
    return joined(zip((_block_text(block, role) for block in blocks), marked, strict=True), joint)


def _block_text(block: str | dict[Any, Any], role: str) -> str:
    if isinstance(block, str):
        return block
    kind = block.get("type", "text" if isinstance(block.get("text"), str) else None)
    if kind in _TEXT_BLOCKS:
        return str(block.get("text") or "")
    if role == "assistant" and (kind in _CALL_BLOCKS or kind in _REASONING_BLOCKS or kind in _IGNORED_BLOCKS):
        return ""
    if (text := _text_file(block)) is not None:
        return text
    if role == "tool":
        # The message is in the state of a thread, whose every further turn would fail.
        return unreadable_part(kind)
    raise InvalidRequest(
        f"a block of type {kind!r} in a {role} message is not valid: this model reads text alone. "
        "Pass text blocks, or the text itself."
    )


def _text_file(block: Mapping[str, Any]) -> str | None:
    """The text of a block that holds a file of plain text; None where it holds something else."""
    inner = block.get("source")
    source: Mapping[str, Any] = inner if isinstance(inner, Mapping) else block
    kind = str(source.get("mime_type") or source.get("media_type") or "")
    if not kind.startswith("text/"):
        return None
    if isinstance(source.get("text"), str):
        return str(source["text"])
    data = source.get("base64", source.get("data"))
    if not isinstance(data, str):
        return None
    try:
        return base64.b64decode(data, validate=True).decode()
    except ValueError:
        return data if source.get("type") == "text" or "base64" not in source else None


# Core to LangChain ------------------------------------------------------------------------------------------


def to_ai_message(result: ChatResult) -> AIMessage:
    """Return a whole answer as one message."""
    return AIMessage(
        content=result.text,
        additional_kwargs={"reasoning_content": result.reasoning} if result.reasoning else {},
        tool_calls=[_langchain_call(call) for call in result.tool_calls],
        invalid_tool_calls=[_invalid_call(c) for c in result.invalid_tool_calls],
        usage_metadata=_usage(result.report),
        response_metadata=_metadata(result.report) | _logprobs(result.logprobs),
    )


def to_langchain(messages: Sequence[Message]) -> list[BaseMessage]:
    """Return the core's messages as LangChain's."""
    return [_to_langchain(message) for message in messages]


def _to_langchain(message: Message) -> BaseMessage:
    if message.role == "tool":
        return ToolMessage(message.content, name=message.name, tool_call_id=message.tool_call_id or "")
    if message.role == "assistant":
        return AIMessage(
            content=message.content,
            additional_kwargs={"reasoning_content": message.reasoning} if message.reasoning else {},
            tool_calls=[_langchain_call(call) for call in message.tool_calls],
        )
    return (SystemMessage if message.role == "system" else HumanMessage)(message.content)


def _langchain_call(call: ToolCall) -> LangChainToolCall:
    return LangChainToolCall(name=call.name, args=dict(call.arguments), id=id_of(call), type="tool_call")


class ChunkWriter:
    """Turns the deltas of one answer into chunks. It numbers tool calls, which LangChain tells apart by number.

    Args:
        blocks: whether the chunks will become content blocks. LangChain then numbers text blocks from zero, and would
            join a call to the text of the same number, so calls are numbered from 1000 on.
    """

    def __init__(self, *, blocks: bool = False) -> None:
        self._first = 1000 if blocks else 0
        self._arguments: dict[str, str] = {}
        """What was handed out of each call's arguments, by its id."""

    def chunks(self, delta: Delta) -> Iterator[AIMessageChunk]:
        """Yield what ``delta`` holds, one kind of content a chunk; the last of an answer has its report.

        Log-probabilities go with the first chunk: a delta does not tell which token belongs to which of its parts.
        """
        parts = self._parts(delta)
        if delta.report is not None:
            parts.append(_last_chunk(delta.report))
        if delta.logprobs and not parts:
            # The end of a call whose arguments are out already.
            parts.append(_chunk())
        if parts:
            parts[0].response_metadata.update(_logprobs(delta.logprobs))
        yield from parts

    def _parts(self, delta: Delta) -> list[AIMessageChunk]:
        parts = []
        if delta.reasoning:
            parts.append(_chunk(additional_kwargs={"reasoning_content": delta.reasoning}))
        if delta.text:
            parts.append(_chunk(content=delta.text))
        for piece in delta.call_pieces:
            parts.append(self._call_chunk(piece.id, piece.name, piece.arguments))
        for call in delta.tool_calls:
            if call.id not in self._arguments:
                arguments = json.dumps(dict(call.arguments), ensure_ascii=False)
                parts.append(self._call_chunk(id_of(call), call.name, arguments))
        for invalid in delta.invalid_tool_calls:
            text = _unreadable(invalid.text, self._arguments.get(invalid.id, ""))
            parts.append(self._call_chunk(invalid.id or id_of(invalid), None, text))
        return parts

    def _call_chunk(self, call_id: str, name: str | None, arguments: str) -> AIMessageChunk:
        """A chunk that adds to the arguments of a call. LangChain joins texts, so only the first has name and id."""
        is_first = call_id not in self._arguments
        self._arguments[call_id] = self._arguments.get(call_id, "") + arguments
        chunk = ToolCallChunk(
            name=name if is_first else None,
            args=arguments,
            id=call_id if is_first else None,
            index=self._first + list(self._arguments).index(call_id),
            type="tool_call_chunk",
        )
        return _chunk(tool_call_chunks=[chunk])


def _chunk(content: str = "", **fields: Any) -> AIMessageChunk:
    return AIMessageChunk(content=content, response_metadata={"model_provider": PROVIDER}, **fields)


def _last_chunk(report: TurnReport) -> AIMessageChunk:
    return AIMessageChunk(
        content="",
        usage_metadata=_usage(report),
        response_metadata=_metadata(report),
        chunk_position="last",
    )


def _invalid_call(call: InvalidToolCall) -> LangChainInvalidToolCall:
    return LangChainInvalidToolCall(
        name=None, args=_unreadable(call.text), id=id_of(call), error=call.error, type="invalid_tool_call"
    )


def _unreadable(text: str, begun: str = "") -> str:
    """What to add to ``begun`` so that it says ``text`` and is no call for LangChain, which completes broken JSON."""
    if not begun:
        return text if text and _UNREADABLE not in text and not _is_completed(text) else _UNREADABLE + text
    # A bracket that closes what is not open ends every attempt at it. The first of these that is one is taken.
    endings = (
        "".join(marks) + _UNREADABLE + text for size in (1, 2, 3) for marks in product('"]}', repeat=size)
    )
    return next(ending for ending in endings if not _is_completed(begun + ending))


def _is_completed(text: str) -> bool:
    """Whether LangChain reads ``text`` as the arguments of a call, perhaps after closing what is open."""
    try:
        return isinstance(parse_partial_json(text), dict)
    except (ValueError, RecursionError):
        return False


def _unread(args: str) -> str:
    """What the model wrote, from what ``_unreadable`` made of it."""
    _, marked, text = args.partition(_UNREADABLE)
    return text if marked else args


def _usage(report: TurnReport) -> UsageMetadata:
    usage = report.usage
    return UsageMetadata(
        input_tokens=usage.prompt_tokens,
        output_tokens=usage.completion_tokens,
        total_tokens=usage.total_tokens,
        input_token_details=InputTokenDetails(
            cache_read=usage.cache_read, cache_creation=usage.cache_creation
        ),
        output_token_details=OutputTokenDetails(reasoning=usage.reasoning_tokens),
    )


def _logprobs(entries: Sequence[TokenLogprob]) -> dict[str, Any]:
    """Log-probabilities in OpenAI's form; LangChain joins the lists of chunks. Nothing where none were asked for."""
    content = [
        {**_token(entry), "top_logprobs": [_token(likely) for likely in entry.top]} for entry in entries
    ]
    return {"logprobs": {"content": content}} if content else {}


def _token(entry: TokenLogprob) -> dict[str, Any]:
    return {"token": entry.token, "bytes": list(entry.raw), "logprob": entry.logprob}


def _metadata(report: TurnReport) -> dict[str, Any]:
    """The part of a turn's ``response_metadata`` that belongs to no session; `call.Call` adds the rest.

    Only one chunk carries it, because merging chunks joins equal texts.
    """
    return {
        "model_provider": PROVIDER,
        "model_name": report.model,
        "finish_reason": report.finish_reason,
    }
