"""What crosses the border of the package: requests in, deltas out. Plain frozen data, and the rules for names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

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
"""Why prompt tokens that the session once knew, or could have known, were computed again.

"boundary": the model's layers could only be resumed at an earlier place. "unsupported": they cannot be stored at all.
"""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of a tool: ``arguments`` keeps the key order in which the model wrote them."""

    name: str
    arguments: Mapping[str, Any]
    id: str = ""


@dataclass(frozen=True, slots=True)
class InvalidToolCall:
    """Text between the model's tool markers that its parser could not read."""

    text: str
    error: str


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation, in the roles chat templates know (system, user, assistant, tool)."""

    role: str
    content: str
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    reasoning: str | None = None


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """One turn to run.

    Args:
        messages: the whole conversation, oldest first.
        tools: OpenAI function schemas.
        sampling: how the answer is sampled.
        template_kwargs: arguments for the chat template.
        tool_choice: "auto" or None leaves calls to the model, "none" forbids them, "required" demands at least
            one; any other word is the name of the one tool that is called, once.
        parallel_tool_calls: whether an answer may hold several calls.
        response_schema: a JSON schema the answer's text fits; an empty one means any JSON object. Where tools
            are offered too, the model may call them instead.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    tool_choice: str | None = None
    parallel_tool_calls: bool = True
    response_schema: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class SessionKey:
    """Who owns the memory of a turn. It never decides what is reused: token ids do.

    ``session_id`` None means anonymous: shared by content in memory, never on disk. ``lane`` (an agent or a
    node) labels and breaks ties. An ``ephemeral`` turn reads what is known and owns nothing. ``is_thread`` says that
    the id is that of a framework's thread, which may end elsewhere, and not one that the user chose.
    """

    session_id: str | None = None
    namespace: str = "default"
    lane: str = ""
    ephemeral: bool = False
    is_thread: bool = field(default=False, compare=False)


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


@dataclass(frozen=True, slots=True)
class Usage:
    """Counted tokens of one turn. ``cache_read`` + ``cache_creation`` == ``prompt_tokens``."""

    prompt_tokens: int
    completion_tokens: int
    cache_read: int
    reasoning_tokens: int = 0

    @property
    def cache_creation(self) -> int:
        """Prompt tokens whose forward pass was run in this turn."""
        return self.prompt_tokens - self.cache_read

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class TurnReport:
    """What one finished turn did, measured. Times are in seconds."""

    finish_reason: FinishReason
    usage: Usage
    hit_tier: HitTier
    miss_reason: MissReason
    restore_seconds: float
    time_to_first_token: float
    total_seconds: float
    session_id: str | None
    branch_id: int | None
    model: str
    persisted: bool


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and the natural logarithm of its probability; ``top`` are the likeliest tokens at its place.

    ``raw`` are the bytes it stands for, which may be a part of a character; ``token`` is their text.
    """

    token: str
    logprob: float
    raw: bytes
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of an answer as it is made. The last one of a turn carries its ``report``.

    ``logprobs`` has an entry for each of ``token_ids`` where the request asked for them.
    """

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    invalid_tool_calls: tuple[InvalidToolCall, ...] = ()
    token_ids: tuple[int, ...] = ()
    report: TurnReport | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


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
    """One line of the session list. ``tokens`` is the length of its longest branch.

    ``is_thread`` says that every turn so far named it by a framework's thread id.
    """

    session_id: str
    namespace: str
    model: str
    branches: int
    tokens: int
    nbytes: int
    pinned: bool
    created: float
    last_use: float
    is_thread: bool = False


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
