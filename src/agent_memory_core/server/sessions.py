"""Whose memory a request continues: the names by which clients say which conversation theirs is.

No client has to say it: what is reused is decided by tokens alone. A session decides what is kept on disk, and for
whom. What names a person (`user`, `safety_identifier`, a plain `metadata.user_id`) is not a conversation.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from agent_memory_core import ChatRequest, SessionKey

OWN_HEADER = "x-session-id"

CLIENT_HEADERS = (
    "x-claude-code-session-id",
    "thread-id",
    "session-id",
    "x-opencode-session",
    "x-session-affinity",
    "x-openwebui-chat-id",
    "chatui-conversation-id",
    "session_id",
)
"""Headers that clients send by themselves, the more specific ones first."""

CONTENT = "content"
"""The source of a session that is named by what was said, because the request named none."""

THREAD = "thread"
"""The source of a session that belongs to a conversation which the server holds."""

MAX_AGENTS = 4096
"""Of how many sessions it is remembered that they had a turn with tools."""

METADATA_NAMES = ("session_id", "thread_id", "conversation_id", "chat_id")


class Session(NamedTuple):
    """A session as a request named it."""

    session_id: str | None
    """None where the request named none: its KV is shared by content in memory and not stored."""
    source: str
    """Where the name was found; "none" where there was none."""


class Thread(NamedTuple):
    """The session of a conversation that the server holds."""

    session_id: str
    is_new: bool
    """Whether the request begins it: then it has this session only where the client names no other one."""


NO_THREAD = Thread("", is_new=True)


def session_of(headers: Mapping[str, str], body: Mapping[str, Any], thread: Thread = NO_THREAD) -> Session:
    """The session of a request: the first name that is there.

    Args:
        headers: with lower-case names.
        body: the request's JSON object.
        thread: the conversation that the request goes on with, or begins.
    """
    found = next((Session(name, source) for name, source in _names(headers, body, thread) if name), None)
    return found or Session(None, "none")


def session_by_content(request: ChatRequest) -> Session:
    """A session for a conversation whose requests name none: they all begin with the same question to one agent."""
    question = next((message.content for message in request.messages if message.role == "user"), "")
    digest = hashlib.sha256(f"{_lane(request)}\0{question}".encode(errors="replace")).hexdigest()
    return Session(f"auto-{digest[:32]}", CONTENT)


def _names(headers: Mapping[str, str], body: Mapping[str, Any], thread: Thread) -> Iterator[tuple[str, str]]:
    yield headers.get(OWN_HEADER, ""), f"header {OWN_HEADER}"
    yield _text(body.get("session_id")), "body session_id"
    if not thread.is_new:
        yield thread.session_id, THREAD
    for name in CLIENT_HEADERS:
        yield headers.get(name, ""), f"header {name}"
    yield _text(body.get("prompt_cache_key")), "body prompt_cache_key"
    metadata = body.get("metadata")
    if isinstance(metadata, Mapping):
        for name in METADATA_NAMES:
            yield _text(metadata.get(name)), f"body metadata.{name}"
        yield _inner_session(metadata.get("user_id")), "body metadata.user_id"
    yield thread.session_id, THREAD


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _inner_session(user_id: object) -> str:
    """The session id inside a `metadata.user_id` that is a JSON object, as Claude Code sends it."""
    if not isinstance(user_id, str) or not user_id.startswith("{"):
        return ""
    try:
        said = json.loads(user_id)
    except ValueError:
        return ""
    return _text(said.get("session_id")) if isinstance(said, dict) else ""


class SessionKeys:
    """Makes the keys of turns.

    Agents with tools ask beside their conversation, under its id, for such things as a title. Such a question reads the
    session's memory and adds nothing to it. It is known by having no tools and no answer in it, once its session had a
    turn with tools.
    """

    def __init__(self) -> None:
        self._agents: OrderedDict[tuple[str, str], None] = OrderedDict()

    def key_of(self, session: Session, namespace: str, request: ChatRequest) -> SessionKey:
        """The key of a turn. Two agents that share a session id are two lanes of it, told apart by system and tools."""
        aside = session.session_id is not None and self._is_aside((namespace, session.session_id), request)
        # What a later request goes on from is kept, whatever it looks like.
        return SessionKey(
            session.session_id,
            namespace=namespace,
            lane=_lane(request),
            ephemeral=aside and session.source != THREAD,
        )

    def _is_aside(self, owner: tuple[str, str], request: ChatRequest) -> bool:
        if not request.tools:
            return owner in self._agents and all(message.role != "assistant" for message in request.messages)
        self._agents[owner] = None
        self._agents.move_to_end(owner)
        if len(self._agents) > MAX_AGENTS:
            self._agents.popitem(last=False)
        return False


def _lane(request: ChatRequest) -> str:
    first = request.messages[0]
    return lane_of(first.content if first.role == "system" else "", request.tools)


def lane_of(system: str, tools: Sequence[Mapping[str, Any]]) -> str:
    """A label of an agent: a hash of its system prompt and the names of its tools."""
    names = [str(tool["function"]["name"]) for tool in tools]
    return hashlib.sha256("\0".join([system, *names]).encode(errors="replace")).hexdigest()[:16]
