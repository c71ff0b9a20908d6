"""What crosses the border of the package: requests in, deltas out. Plain frozen data, and the rules for names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from uuid import uuid4

from agent_memory_core.config import SamplingParams
from agent_memory_core.errors import InvalidRequest

MAX_NAME = 512
"""Most characters of a session id or a namespace."""

_FORBIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")

FinishReason = Literal["stop", "length", "tool_calls", "cancelled"]
HitTier = Literal["none", "hot", "warm"]
"""Where the reused tokens came from: nowhere, memory only, or at least partly from disk."""

MissReason = Literal[
    "", "new", "evicted", "diverged", "template", "damaged", "model_changed", "boundary", "unsupported"
]
"""Why prompt tokens were computed although the session has, or might have had, their KV.

Empty: none were, as in a retry, in a regenerated answer, after another last message or in the first turn of a lane.
"new": the session is new. "evicted": their KV made room for others. "diverged": a message, the system prompt or the
tools that were there before are others now, or gone. "template": an earlier answer came back in other words. "damaged":
a stored block could not be used. "model_changed": the session was stored with another model. "boundary": the model's
layers can only be resumed at an earlier position. "unsupported": they cannot be stored at all.
"""

MissPart = Literal["system", "tools", "messages"]
"""The part of a prompt in which it differs from what a session holds."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of a tool."""

    name: str
    arguments: Mapping[str, Any]
    """In the key order in which the model wrote them."""
    id: str = ""
    """Empty where the model gave none."""


def new_call_id() -> str:
    """An id for a call that the model gave none."""
    return f"call_{uuid4().hex[:16]}"


@dataclass(frozen=True, slots=True)
class InvalidToolCall:
    """A tool call that could not be read."""

    text: str
    """What the model wrote between its markers of a call."""
    error: str
    """Why the parser refused it."""
    id: str = ""
    """The id of the pieces of it that were handed out before; empty where there were none."""


@dataclass(frozen=True, slots=True)
class ToolCallPiece:
    """A part of a tool call that is still being written.

    The call itself follows once it has ended, with the same id: as a `ToolCall`, whose arguments are what the pieces'
    JSON says, or as an `InvalidToolCall`, so that the pieces are worth nothing.
    """

    id: str
    """Which call it belongs to."""
    name: str
    """The tool."""
    arguments: str
    """What it adds to the arguments, as JSON text; empty in the first piece of a call."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation."""

    role: str
    """One that chat templates know: system, user, assistant or tool."""
    content: str
    name: str | None = None
    """Who wrote it; for a tool's result, the tool."""
    tool_calls: tuple[ToolCall, ...] = ()
    """What an assistant's message calls."""
    tool_call_id: str | None = None
    """Which call a tool's result answers."""
    reasoning: str | None = None
    """What an assistant wrote as its thinking."""
    cache_points: tuple[int, ...] = field(default=(), compare=False)
    """Places in ``content``, in characters, up to which later prompts will be the same. What a model needs in order to
    go on from there is kept. This matters for models with sliding windows or states; others go on from any place."""


@dataclass(frozen=True, slots=True)
class Transcript:
    """A conversation as it was read back from the tokens of a session."""

    messages: tuple[Message, ...]
    """Oldest first. The system message is as the model was given it, with the tools, where they stand in it."""
    text: str = field(repr=False)
    """All that the model was given and wrote, with the marks of its chat template."""
    is_exact: bool
    """Whether the messages, given to the model again, are that text, so that a conversation that begins with them goes
    on where the session is."""


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """One turn to run."""

    messages: tuple[Message, ...]
    """The whole conversation, oldest first."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """OpenAI function schemas."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    """How the answer is sampled."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Arguments for the chat template."""
    tool_choice: str | None = None
    """"auto" or None leaves calls to the model, "none" forbids them, "required" demands at least one; any other word is
    the name of the one tool that is called, once."""
    parallel_tool_calls: bool = True
    """Whether an answer may hold several calls."""
    response_schema: Mapping[str, Any] | None = None
    """A JSON schema that the answer's text must fit; an empty one means any JSON object. If tools are offered too, the
    model may call them instead."""
    continue_final_message: bool = False
    """Whether the last message, which is the assistant's, is continued rather than answered. The answer is only what is
    new."""
    is_raw: bool = False
    """Whether the contents of the messages, one after another, are the prompt, which no chat template writes. Special
    tokens are then spelled out."""
    timeout: float | None = None
    """Seconds that the answer may take, waiting included; then it is given up with `DeadlineExceeded`."""
    thinking_budget: int | None = None
    """Most tokens that the model may think, after which it has to answer; None sets no limit. It holds for models whose
    thoughts stand between two tokens, such as <think> and </think>."""


@dataclass(frozen=True, slots=True)
class SessionKey:
    """Who owns the memory of a turn. It never decides what is reused: token ids do."""

    session_id: str | None = None
    """None is an anonymous turn: its KV is shared by content in memory and never stored on disk."""
    namespace: str = "default"
    """Nothing is shared between namespaces."""
    lane: str = ""
    """The agent or node that asks: a label, and of two branches that fit equally the one with this label is taken."""
    ephemeral: bool = False
    """Whether the turn only reads the session's memory and adds nothing to it."""
    is_thread: bool = field(default=False, compare=False)
    """Whether the id is that of a framework's thread, which may end there, and not one that the user chose."""


def validate_session_id(session_id: str) -> str:
    """Return a session id that can be used. Almost any text can: it is a bound value and never part of a path.

    Raises:
        InvalidRequest: it is empty, longer than `MAX_NAME`, or has control characters or lone surrogates.
    """
    return _validate_name(session_id, "session id")


def validate_namespace(namespace: str) -> str:
    """Return a namespace that can be used, by the rules of `validate_session_id`."""
    return _validate_name(namespace, "namespace")


def _validate_name(name: str, what: str) -> str:
    if isinstance(name, str) and 0 < len(name) <= MAX_NAME and not _FORBIDDEN.search(name):
        return name
    shown = repr(name)[:80]
    raise InvalidRequest(
        f"{shown} cannot be a {what}: use 1 to {MAX_NAME} characters without control characters."
    )


def to_key(session: SessionKey | str | None) -> SessionKey:
    """The key of a session, from one or from its id, whose names can be used."""
    key = session if isinstance(session, SessionKey) else SessionKey(session)
    if key.session_id is not None:
        validate_session_id(key.session_id)
    validate_namespace(key.namespace)
    return key


@dataclass(frozen=True, slots=True)
class Usage:
    """Counted tokens of one turn. ``cache_read`` + ``cache_creation`` == ``prompt_tokens``."""

    prompt_tokens: int
    completion_tokens: int
    """Tokens of the answer, reasoning and calls included."""
    cache_read: int
    """Prompt tokens whose forward pass was skipped, because their KV was there."""
    reasoning_tokens: int = 0
    """Those tokens of the answer that were reasoning."""

    @property
    def cache_creation(self) -> int:
        """Prompt tokens whose forward pass was run in this turn."""
        return self.prompt_tokens - self.cache_read

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Miss:
    """The first place at which a prompt differs from what its session holds."""

    reason: MissReason
    """"diverged" or "template"."""
    part: MissPart
    message: int | None
    """The position of the message in the request; None where the difference stands before all of them."""
    token: int
    """The position in the prompt of the first token that is another."""
    character: int
    """The position of the first character that is another, in the prompt as the chat template writes it."""
    before: str = field(repr=False)
    """What the session holds from there on, at most 80 characters. It is shown to the caller and never logged."""
    now: str = field(repr=False)
    """What the prompt holds from there on, at most 80 characters."""


@dataclass(frozen=True, slots=True)
class TurnReport:
    """What one finished turn did, measured. Times are in seconds."""

    finish_reason: FinishReason
    usage: Usage
    hit_tier: HitTier
    miss_reason: MissReason
    restore_seconds: float
    """Reading and decoding stored KV."""
    time_to_first_token: float
    """From the request to the first token, waiting included."""
    total_seconds: float
    """From the request to the last token; the commit to disk comes after it."""
    session_id: str | None
    branch_id: int | None
    """The branch of the session that the turn continued or began; None where it owns none."""
    model: str
    """The model as it was asked for when its engine was made."""
    persisted: bool
    """Whether the turn is on disk."""
    lane: str = ""
    """The agent or node that asked."""
    miss: Miss | None = None
    """Where the prompt differs, if ``miss_reason`` is "diverged" or "template"."""
    save_error: str = ""
    """Why the turn is not on disk though it should be; a turn is answered whatever the disk does."""
    stop_string: str | None = None
    """The stop string that ended the answer, if one did."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and its log-probability."""

    token: str
    """Its text."""
    logprob: float
    """The natural logarithm of its probability."""
    raw: bytes
    """Its bytes, which may be only a part of a character."""
    top: tuple[TokenLogprob, ...] = ()
    """The likeliest tokens at its position."""


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of an answer as it is made."""

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    invalid_tool_calls: tuple[InvalidToolCall, ...] = ()
    token_ids: tuple[int, ...] = ()
    report: TurnReport | None = None
    """Set on the last delta of a turn, and only there."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One entry for each of ``token_ids``, if the request asked for them."""
    call_pieces: tuple[ToolCallPiece, ...] = ()
    """What became known of a tool call that has not ended, or ends with this delta."""


@dataclass(frozen=True, slots=True)
class ChatResult:
    """A whole answer: the deltas of a turn put together."""

    text: str
    reasoning: str
    tool_calls: tuple[ToolCall, ...]
    invalid_tool_calls: tuple[InvalidToolCall, ...]
    token_ids: tuple[int, ...]
    report: TurnReport
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """One line of the session list."""

    session_id: str
    namespace: str
    model: str
    """The model that the session was stored with."""
    branches: int
    """How many branches it has."""
    tokens: int
    """The length of its longest branch."""
    nbytes: int
    """Its bytes on disk, those that other sessions share included."""
    pinned: bool
    """Whether it is kept whatever the disk budget."""
    created: float
    """Seconds since the epoch."""
    last_use: float
    """Seconds since the epoch."""
    is_thread: bool = False
    """Whether every turn so far named it by a framework's thread id."""


@dataclass(frozen=True, slots=True)
class BranchInfo:
    """One branch of a session on disk: a line of turns that continued each other."""

    branch_id: int
    tokens: int
    """All tokens of the branch, prompt and answers."""
    prompt_tokens: int
    """The position of the token at which the model's last answer begins."""
    lane: str
    """The lane of the branch's last turn."""
    created: float
    """Seconds since the epoch."""
    last_use: float
    """Seconds since the epoch."""


# Requests and answers ---------------------------------------------------------------------------------------


def to_message(item: Any) -> Message:
    """A message, from one or from a mapping with its fields.

    Raises:
        InvalidRequest: it is neither.
    """
    if isinstance(item, Message):
        return item
    # The errors never quote the message: they end in logs, and it may hold a whole conversation.
    try:
        return Message(**item)
    except TypeError:
        if hasattr(item, "keys"):
            kind = f"a mapping with the keys {', '.join(map(str, item))}"
        else:
            kind = f"an object of the type {type(item).__name__}"
        raise InvalidRequest(f"{kind} is not a message: give a mapping with role and content.") from None


def checked_request(request: ChatRequest) -> ChatRequest:
    """Return a request that can be run, as far as that can be told without its model.

    Raises:
        InvalidRequest: a part of it cannot be used, or does not go with another.
    """
    if not request.messages:
        raise InvalidRequest("the list of messages is empty: give at least one.")
    for message in request.messages:
        if not isinstance(message.role, str) or not isinstance(message.content, str):
            raise InvalidRequest(
                f"role and content of a message are of the types {type(message.role).__name__} and "
                f"{type(message.content).__name__}: both must be strings."
            )
    _check_form(request)
    return request


def _check_form(request: ChatRequest) -> None:
    choice, schema = request.tool_choice, request.response_schema
    if schema is not None and not isinstance(schema, Mapping):
        raise InvalidRequest(f"response_schema={schema!r} is not valid: a JSON schema as a mapping.")
    if request.continue_final_message:
        _check_continued(request)
    if request.is_raw and (request.tools or request.continue_final_message):
        raise InvalidRequest("is_raw=True is not valid with tools or continue_final_message: write them out.")
    if choice in (None, "auto", "none"):
        return
    names = [tool.get("function", tool).get("name") for tool in request.tools]
    if not names:
        raise InvalidRequest(f"tool_choice={choice!r} is not valid without tools.")
    if choice != "required" and choice not in names:
        raise InvalidRequest(f"tool_choice={choice!r} is not valid: auto, none, required or one of {names}.")
    if schema is not None:
        raise InvalidRequest(
            f"tool_choice={choice!r} and response_schema exclude each other: give one of them."
        )


def _check_continued(request: ChatRequest) -> None:
    last = request.messages[-1]
    if last.role != "assistant" or not last.content.strip() or last.tool_calls:
        raise InvalidRequest(
            f"continue_final_message=True is not valid: the last message has the role {last.role!r}, and has to be the "
            "beginning of the assistant's text."
        )
    if request.response_schema is not None or request.tool_choice not in (None, "auto", "none"):
        raise InvalidRequest(
            "continue_final_message=True is not valid with a response_schema or a forced tool: give one of them."
        )


def whole_answer(deltas: Sequence[Delta]) -> ChatResult:
    """Put the deltas of an ended turn together."""
    report = deltas[-1].report
    assert report is not None
    calls: list[ToolCall] = [call for delta in deltas for call in delta.tool_calls]
    invalid: list[InvalidToolCall] = [call for delta in deltas for call in delta.invalid_tool_calls]
    return ChatResult(
        text="".join(delta.text for delta in deltas),
        reasoning="".join(delta.reasoning for delta in deltas),
        tool_calls=tuple(calls),
        invalid_tool_calls=tuple(invalid),
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
        report=report,
        logprobs=tuple(entry for delta in deltas for entry in delta.logprobs),
    )
