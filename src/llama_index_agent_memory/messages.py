"""Two translations without side effects: LlamaIndex messages and tools in, LlamaIndex responses out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llama_index.core.base.llms.types import (
    CachePoint,
    ChatMessage,
    ChatResponse,
    CitableBlock,
    CitationBlock,
    CompletionResponse,
    ContentBlock,
    DocumentBlock,
    LogProb,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)
from llama_index.core.tools import BaseTool

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
from agent_memory_core.adapter import id_of, joined, measurements, merge_leading_systems, unreadable_part

_ROLES = {
    MessageRole.SYSTEM: "system",
    MessageRole.DEVELOPER: "system",
    MessageRole.USER: "user",
    MessageRole.ASSISTANT: "assistant",
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
    MessageRole.TOOL: "tool",
    MessageRole.FUNCTION: "tool",
}


# LlamaIndex to core -----------------------------------------------------------------------------------------


def to_core(messages: Sequence[ChatMessage]) -> tuple[Message, ...]:
    """Return ``messages`` as a chat template knows them; leading system messages become one.

    Raises:
        InvalidRequest: there are none, or one holds something that no text model reads.
    """
    return merge_leading_systems(_name_results([_message(message) for message in messages]))


def _name_results(messages: list[Message]) -> list[Message]:
    """Agents name only the call's id in a tool's result; some templates want the tool's name."""
    names = {call.id: call.name for message in messages for call in message.tool_calls}
    return [
        dataclasses.replace(message, name=names.get(message.tool_call_id or ""))
        if message.role == "tool" and message.name is None
        else message
        for message in messages
    ]


def _message(message: ChatMessage | Any) -> Message:
    if not isinstance(message, ChatMessage):
        raise InvalidRequest(
            f"a {type(message).__name__} is not a message: give ChatMessage(content, role=...)."
        )
    role = _ROLES[message.role]
    more = message.additional_kwargs
    # The model wrote its answer in one piece, so its blocks are joined without a separator.
    text, points = joined(_texts(message.blocks, role), "" if role == "assistant" else "\n")
    if role == "assistant":
        thoughts = (block.content for block in message.blocks if isinstance(block, ThinkingBlock))
        return Message(
            role,
            text,
            more.get("name"),
            tool_calls=tuple(_calls(message)),
            reasoning="".join(filter(None, thoughts)) or None,
            cache_points=points,
        )
    return Message(role, text, more.get("name"), tool_call_id=more.get("tool_call_id"), cache_points=points)


def _texts(blocks: Sequence[ContentBlock], role: str) -> Iterator[tuple[str, bool]]:
    """The texts of a message's blocks, and where the message has cache points."""
    for block in blocks:
        if isinstance(block, CachePoint):
            yield "", True
        elif isinstance(block, TextBlock):
            yield block.text, False
        elif isinstance(block, CitableBlock):
            yield from _texts(block.content, role)
        elif isinstance(block, DocumentBlock) and (text := _text_document(block)) is not None:
            yield text, False
        elif role == "tool" and not _is_elsewhere(block, role):
            # The message is in the memory of an agent, whose every further turn would fail.
            yield unreadable_part(block.block_type), False
        elif not _is_elsewhere(block, role):
            raise InvalidRequest(
                f"a block of type {block.block_type!r} in a {role} message is not valid: this model reads text "
                "alone. Pass text blocks, or the text itself."
            )


def _text_document(block: DocumentBlock) -> str | None:
    """The text of a document of plain text that is here; None for any other, and for one that has to be fetched."""
    kind = block.document_mimetype or ""
    if not kind.startswith("text/") or not (block.data or block.path):
        return None
    return str(block.resolve_document().read().decode())


def _is_elsewhere(block: ContentBlock, role: str) -> bool:
    """Whether a block repeats what is read from another place, or means something only to another provider."""
    parts_of_answers = (ThinkingBlock, ToolCallBlock, CitationBlock)
    return role == "assistant" and isinstance(block, parts_of_answers)


def _calls(message: ChatMessage) -> Iterator[ToolCall]:
    found = [block for block in message.blocks if isinstance(block, ToolCallBlock)]
    for block in found:
        yield ToolCall(block.tool_name, _arguments(block.tool_kwargs), block.tool_call_id or "")
    if not found:
        for call in message.additional_kwargs.get("tool_calls") or ():
            yield _older_call(call)


def _older_call(call: object) -> ToolCall:
    """A call in the form that LlamaIndex had before blocks: OpenAI's, as mappings or as objects."""
    function = _get(call, "function")
    name = _get(function, "name")
    if not isinstance(name, str):
        raise InvalidRequest(
            f"tool_calls={call!r} is not valid: a function with a name, as OpenAI writes it."
        )
    return ToolCall(name, _arguments(_get(function, "arguments")), _get(call, "id") or "")


def _get(holder: object, name: str) -> Any:
    return holder.get(name) if isinstance(holder, Mapping) else getattr(holder, name, None)


def _arguments(value: object) -> Mapping[str, Any]:
    """Arguments as a mapping; providers that stream them hand over the JSON text.

    Raises:
        InvalidRequest: they are neither.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value or "{}")
        except ValueError:
            raise InvalidRequest(f"tool arguments {value!r} are not valid: a JSON object.") from None
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"tool arguments {value!r} are not valid: a JSON object.")
    return value


def to_tools(tools: Sequence[BaseTool | Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    """Return tools as OpenAI function schemas.

    Raises:
        InvalidRequest: one is neither a tool nor such a schema.
    """
    return tuple(_tool(tool) for tool in tools)


def _tool(tool: BaseTool | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(tool, BaseTool):
        return tool.metadata.to_openai_tool(skip_length_check=True)
    if isinstance(tool, Mapping) and isinstance(_get(tool.get("function"), "name"), str):
        return tool
    raise InvalidRequest(
        f"tool {tool!r} is not valid: a LlamaIndex tool (FunctionTool.from_defaults(fn)) or a function schema."
    )


# Core to LlamaIndex -----------------------------------------------------------------------------------------


def to_chat_response(result: ChatResult) -> ChatResponse:
    """Return a whole answer as one response."""
    writer = ResponseWriter()
    writer.add(
        Delta(
            result.text, result.reasoning, result.tool_calls, result.invalid_tool_calls, report=result.report
        )
    )
    return ChatResponse(message=writer.message(), raw=writer.raw, logprobs=_logprobs(result.logprobs))


def to_llama_index(messages: Sequence[Message]) -> list[ChatMessage]:
    """Return the core's messages as LlamaIndex's."""
    return [_to_llama_index(message) for message in messages]


def _to_llama_index(message: Message) -> ChatMessage:
    blocks: list[ContentBlock] = []
    if message.reasoning:
        blocks.append(ThinkingBlock(content=message.reasoning))
    if message.content or not message.tool_calls:
        blocks.append(TextBlock(text=message.content))
    more = {"name": message.name, "tool_call_id": message.tool_call_id} if message.role == "tool" else {}
    return ChatMessage(
        role=MessageRole(message.role),
        blocks=[*blocks, *map(_call_block, message.tool_calls)],
        additional_kwargs=more,
    )


def to_completion(response: ChatResponse) -> CompletionResponse:
    """Return a response, whole or a piece of one, as a completion has it."""
    return CompletionResponse(
        text=response.message.content or "",
        delta=response.delta,
        raw=response.raw,
        logprobs=response.logprobs,
        additional_kwargs=response.additional_kwargs,
    )


class ResponseWriter:
    """Joins the deltas of one answer: LlamaIndex expects the answer so far with each new piece."""

    def __init__(self) -> None:
        self._text = ""
        self._reasoning = ""
        self._calls: list[ToolCallBlock] = []
        self._invalid: list[InvalidToolCall] = []
        self._thinking_tokens: int | None = None
        self.raw: dict[str, Any] | None = None
        """The report, once the answer has ended."""

    def add(self, delta: Delta) -> str:
        """Take in ``delta`` and return the text that it adds."""
        # What the model wrote in place of a call stays text, because the next prompt has to repeat it.
        text = delta.text + "".join(call.text for call in delta.invalid_tool_calls)
        self._text += text
        self._reasoning += delta.reasoning
        self._calls += map(_call_block, delta.tool_calls)
        self._invalid += delta.invalid_tool_calls
        if delta.report is not None:
            self._thinking_tokens = delta.report.usage.reasoning_tokens
            self.raw = _raw(delta.report, self._invalid)
        return text

    def message(self) -> ChatMessage:
        """Return the answer so far."""
        blocks: list[ContentBlock] = []
        if self._reasoning:
            blocks.append(ThinkingBlock(content=self._reasoning, num_tokens=self._thinking_tokens))
        if self._text or not self._calls:
            blocks.append(TextBlock(text=self._text))
        return ChatMessage(role=MessageRole.ASSISTANT, blocks=[*blocks, *self._calls])

    def _streamed(self) -> ChatMessage:
        """The answer so far, with its calls also in the place where LlamaIndex's programs look for them in streams."""
        message = self.message()
        if self._calls:
            message.additional_kwargs["tool_calls"] = [_older_form(call) for call in self._calls]
        return message

    def responses(self, delta: Delta) -> Iterator[ChatResponse]:
        """Yield the response that ``delta`` makes, if it shows; the last of an answer has the report.

        A call is among the answer's calls once it has ended, since agents run what is there. What it says meanwhile is
        in ``additional_kwargs["tool_call_deltas"]``.
        """
        calls = len(self._calls)
        text = self.add(delta)
        shows = text or delta.reasoning or delta.call_pieces or len(self._calls) > calls
        if shows or delta.report is not None:
            yield ChatResponse(
                message=self._streamed(),
                delta=text,
                raw=self.raw,
                logprobs=_logprobs(delta.logprobs),
                additional_kwargs=_pieces(delta),
            )


def _pieces(delta: Delta) -> dict[str, Any]:
    """What a delta adds besides text, under the names that a streamed response has for it."""
    added: dict[str, Any] = {}
    if delta.reasoning:
        added["thinking_delta"] = delta.reasoning
    if delta.call_pieces:
        added["tool_call_deltas"] = [dataclasses.asdict(piece) for piece in delta.call_pieces]
    return added


def _logprobs(entries: Sequence[TokenLogprob]) -> list[list[LogProb]] | None:
    """For each token of the answer itself and the likeliest others in its place; None where none were asked for."""
    return [
        [_logprob(entry), *(_logprob(likely) for likely in entry.top if likely.raw != entry.raw)]
        for entry in entries
    ] or None


def _logprob(entry: TokenLogprob) -> LogProb:
    return LogProb(token=entry.token, logprob=entry.logprob, bytes=list(entry.raw))


def _call_block(call: ToolCall) -> ToolCallBlock:
    return ToolCallBlock(
        tool_call_id=id_of(call),
        tool_name=call.name,
        tool_kwargs=dict(call.arguments),
    )


def _older_form(call: ToolCallBlock) -> dict[str, Any]:
    """A call as OpenAI writes it."""
    arguments = json.dumps(call.tool_kwargs, ensure_ascii=False)
    return {
        "id": call.tool_call_id,
        "type": "function",
        "function": {"name": call.tool_name, "arguments": arguments},
    }


def _raw(report: TurnReport, invalid: Sequence[InvalidToolCall]) -> dict[str, Any]:
    """The ``raw`` of a turn: token counts where LlamaIndex looks for them, and our own measurements."""
    usage = report.usage
    return {
        "model": report.model,
        **measurements(report),
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.total_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cache_read},
            "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        },
        "invalid_tool_calls": [{"text": call.text, "error": call.error} for call in invalid],
    }
