"""What the dialects' requests have in common: a loose body, texts out of content parts, and one turn put together.

Bodies are loose: a field that means nothing here is ignored, because clients send what any provider might know. What
would change the answer and cannot be done is refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from agent_memory_core import AgentMemoryError, ChatRequest, Message, ToolCall, sampling_for
from agent_memory_core.adapter import chosen_tool, joined, merge_leading_systems, template_kwargs
from agent_memory_core.server.errors import INVALID, UNSUPPORTED, ApiError, from_core
from agent_memory_core.server.host import Host
from agent_memory_core.server.keeping import FIELDS, kept_for
from agent_memory_core.server.keys import Tenant
from agent_memory_core.server.sessions import Session, SessionKeys, session_by_content
from agent_memory_core.server.settings import ServerSettings
from agent_memory_core.server.turns import Call

MAX_DEPTH = 64
"""How deep the values of a request may be nested."""

MAX_SCHEMA = 256 * 1024
"""Most characters of the schema of an answer."""


class Body(BaseModel):
    """The JSON object of a request."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: str = ""

    @model_validator(mode="before")
    @classmethod
    def _check_depth(cls, value: Any) -> Any:
        check_depth(value)
        return value

    def given(self, *names: str) -> dict[str, Any]:
        """Those of the fields ``names`` that have a value."""
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@dataclass(slots=True)
class Asked:
    """A turn as a dialect has read it."""

    messages: list[Message]
    tools: list[dict[str, Any]] = field(default_factory=list)
    """OpenAI function schemas."""
    tool_choice: object = None
    """In any form that is in use."""
    parallel_tool_calls: bool | None = None
    response_schema: Mapping[str, Any] | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    """Fields of `SamplingParams`."""
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    thinking_budget: int | None = None
    """Most tokens of thinking."""
    ignored: tuple[str, ...] = ()
    """The types of tools that a provider runs itself, which are left out."""
    continues: bool = False
    """Whether the last message is to be gone on with."""
    is_raw: bool = False
    """Whether the messages are the prompt as it stands."""


@dataclass(frozen=True, slots=True)
class Client:
    """Who asks: what the request says beside its body."""

    tenant: Tenant
    session: Session
    timeout: float | None = None
    """Seconds that its answer gets; None is no limit."""


class Reader:
    """Puts the turns of all dialects together."""

    def __init__(self, host: Host, settings: ServerSettings) -> None:
        self._host, self._settings = host, settings
        self._keys = SessionKeys()
        self.seed: int | None = None
        """Of answers whose requests give none."""

    def call(self, asked: Asked, body: Body, client: Client, *, served: str, **wire: Any) -> Call:
        """The call of a request, for the model that is served by that name.

        Args:
            asked: the turn.
            body: what it was read from.
            client: who asks.
            served: the model.
            wire: fields of `Call` that say in which form the client reads the answer.

        Raises:
            ApiError: a part of it cannot be used.
        """
        try:
            request = self.request(asked, served, client.timeout)
            session = self._session(client, asked, request)
            key = self._keys.key_of(session, client.tenant.namespace, request)
        except AgentMemoryError as error:
            raise from_core(error) from error
        keep, ignored = _keep(body, client.tenant)
        return Call(
            request,
            body.model,
            served,
            session=session,
            key=key,
            context=self._host.context_of(served),
            ignored=(*asked.ignored, *ignored),
            keep=keep,
            **wire,
        )

    def _session(self, client: Client, asked: Asked, request: ChatRequest) -> Session:
        """The session that the client names; or, if the settings say so, one that is named by its content."""
        is_unnamed = client.session.session_id is None
        # A prompt as it stands has no first question by which its next one could be known.
        if is_unnamed and self._settings.keep_anonymous and not asked.is_raw:
            return session_by_content(request)
        return client.session

    def request(self, asked: Asked, served: str, timeout: float | None = None) -> ChatRequest:
        """The core's request, with what the model's configuration says of its answers. Raises the core's errors."""
        check_size(asked.response_schema)
        sampling = {
            "max_tokens": self._settings.max_tokens,
            **self._host.sampling_of(served),
            **asked.sampling,
        }
        if self.seed is not None:
            sampling.setdefault("seed", self.seed)
        return ChatRequest(
            messages=merge_leading_systems(_with_names(asked.messages)),
            tools=tuple(asked.tools),
            sampling=sampling_for(self._host.engine(served).config.model, sampling),
            template_kwargs=asked.template_kwargs,
            thinking_budget=asked.thinking_budget,
            tool_choice=chosen_tool(asked.tool_choice, asked.tools),
            parallel_tool_calls=asked.parallel_tool_calls is not False,
            response_schema=asked.response_schema,
            continue_final_message=asked.continues,
            is_raw=asked.is_raw,
            timeout=timeout,
        )


def _keep(body: Body, tenant: Tenant) -> tuple[float | None, tuple[str, ...]]:
    """For how long the model is to be kept, and the fields that say so and are not followed.

    Where keys are asked for, the holder of one must not free what the others use.
    """
    said = body.model_extra or {}
    keep = kept_for(said)
    if keep is None or not tenant.is_limited:
        return keep, ()
    return None, tuple(name for name in FIELDS if said.get(name) is not None)


def _with_names(messages: Sequence[Message]) -> list[Message]:
    """Messages in which each result names its tool, which some chat templates want and few clients say."""
    names: dict[str | None, str] = {}
    named = []
    for message in messages:
        names |= {call.id: call.name for call in message.tool_calls}
        if message.role == "tool" and message.name is None:
            message = replace(message, name=names.get(message.tool_call_id))
        named.append(message)
    return named


def effort(value: object) -> dict[str, Any]:
    """What a chat template is told of how much to think.

    Raises:
        InvalidRequest: the value is none of the core's.
    """
    # The core's highest degree has another name in newer APIs.
    return template_kwargs(None, "xhigh" if value == "max" else value, None)


def function_tool(name: object, description: object, parameters: object, place: str) -> dict[str, Any]:
    """A tool as the core takes it, without what would change its tokens and not its meaning.

    Raises:
        ApiError: it has no name, or its parameters are no JSON schema.
    """
    if not isinstance(name, str) or not name:
        raise ApiError(INVALID, f"{place}: a tool needs a name.", param=place)
    schema = {"type": "object", "properties": {}} if parameters is None else parameters
    if not isinstance(schema, dict):
        raise ApiError(INVALID, f"{place}: the parameters of {name} must be a JSON schema.", param=place)
    schema = {key: value for key, value in schema.items() if key != "$schema"}
    function = {"name": name, "description": description or "", "parameters": schema}
    return {"type": "function", "function": function}


def called(name: object, arguments: object, call_id: object, place: str) -> ToolCall:
    """A call that an assistant's message made. ``arguments`` are an object, or one as JSON text.

    Raises:
        ApiError: they are neither, or the call has no name.
    """
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            arguments = None
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise ApiError(
            INVALID, f"{place}: a tool call needs a name and arguments that are a JSON object.", param=place
        )
    return ToolCall(name, arguments, str(call_id or ""))


def as_token(word: object) -> str:
    """A word of a client that may stand in a header."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", str(word))[:64]


Part = Mapping[str, Any]
Other = Callable[[Part, str], str]
"""What makes text of a content part that is none, given its place; it raises `ApiError` where there is no way."""


def refuse_part(part: Part, place: str) -> str:
    """Refuse a content part that a text model cannot read."""
    kind = str(part.get("type"))
    what = "images" if "image" in kind else "audio" if "audio" in kind else f"parts of type {kind!r}"
    raise ApiError(UNSUPPORTED, f"{place}: {what} are not supported by this model (text only).", param=place)


def content_of(
    content: object, place: str, other: Other = refuse_part, texts: Collection[str] = ("text",)
) -> tuple[str, tuple[int, ...]]:
    """The text of a message's content, and the places in it that are marked with `cache_control`.

    A text and a list with that one text are the same: clients write one message now this way and now that way.

    Args:
        content: text, a list of parts, or None.
        place: where it stands in the request, for errors.
        other: what makes text of parts of other types.
        texts: the types of parts that are text.

    Raises:
        ApiError: a part cannot be read.
    """
    if content is None or isinstance(content, str):
        return content or "", ()
    parts = []
    for part, where in parts_of(content, place):
        text = str(part.get("text") or "") if part.get("type") in texts else other(part, where)
        parts.append((text, bool(part.get("cache_control"))))
    return joined(parts, "\n\n")


def parts_of(content: object, place: str) -> list[tuple[Part, str]]:
    """The parts of a content that is a list, each with its place.

    Raises:
        ApiError: it is no list of objects.
    """
    if not isinstance(content, Sequence) or isinstance(content, str):
        raise ApiError(INVALID, f"{place}: text or a list of content parts is needed.", param=place)
    found = []
    for index, part in enumerate(content):
        if not isinstance(part, Mapping):
            raise ApiError(INVALID, f"{place}.{index}: a content part must be an object.", param=place)
        found.append((part, f"{place}.{index}"))
    return found


def check_size(schema: Mapping[str, Any] | None) -> None:
    """Refuse a schema of an answer that would take long to be made a grammar of.

    Raises:
        ApiError: it is larger than `MAX_SCHEMA`.
    """
    if schema is not None and len(json.dumps(schema, default=str)) > MAX_SCHEMA:
        raise ApiError(INVALID, f"The schema is larger than {MAX_SCHEMA // 1024} KiB: make it smaller.")


def check_depth(value: object) -> None:
    """Refuse values that are nested so deep that they are no request but an attack.

    Raises:
        ApiError: they are deeper than `MAX_DEPTH`.
    """
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for item in level
            if isinstance(item, (dict, list))
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return
    raise ApiError(INVALID, f"The request is nested deeper than {MAX_DEPTH} levels: make it flatter.")
