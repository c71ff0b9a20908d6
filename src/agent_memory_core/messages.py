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


@dataclass(frozen=True, slots=True)
class InvalidToolCall:
    """A tool call that could not be read."""

    text: str
    """What the model wrote between its markers of a call."""
    error: str
    """Why the parser refused it."""


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
    timeout: float | None = None
    """Seconds that the answer may take, waiting included; then it is given up with `DeadlineExceeded`."""


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
