"""Chat requests to prompts: text by the model's own template, and token ids that continue what is known.

What a template cannot express is expressed in plain messages, as its model most likely saw them in training:

    tools            a list after the system message, with the <tool_call> JSON convention
    tool calls       <tool_call> JSON after the content of the message that made them
    tool results     a user message that holds <tool_response>
    system message   the beginning of the next user message
    no template      "role:\\n", the content and a blank line for each message

Most templates were written for one system message and for a user and an assistant who take turns. What is not so stays
in its place. Where a template refuses it, drops it or moves it, it is written in a form that the template takes:

    a system message after the first ones     the beginning of the next user message, or one of its own
    several messages of the user on end       one message, with blank lines between the contents
    several messages of the assistant on end  one message, likewise, with all their calls
    an assistant that speaks first            after an empty message of the user

These forms depend on a message and on what precedes it, not on what follows, as far as that can be. So a conversation
that goes on begins as before.

Text that spells a special token becomes that token where the template, the system message or the assistant has it. In
messages of users and tools it is only text, unless ``control_words`` says otherwise. Where a template rewrites history,
the ids follow it: see `token_text`.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import TemplateError
from mlx_lm.tokenizer_utils import TokenizerWrapper
from transformers import PreTrainedTokenizerBase

from agent_memory_core.config import ControlWords
from agent_memory_core.errors import InvalidRequest
from agent_memory_core.messages import ChatRequest, Message, ToolCall
from agent_memory_core.text.token_text import GUARD, ExactTokenizer, Prompt, TokenText, unguarded

TemplateDict = dict[str, Any]
"""A message or a tool as chat templates read it."""

_RESERVED = {"messages", *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters} - {
    "documents",
    "kwargs",
}
"""Arguments of the template that a request may not set, because the engine sets them."""

TEMPLATE_ERRORS = (
    TemplateError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    TypeError,
    ValueError,
)
"""What templates and mlx-lm's own renderers raise on messages they do not know."""

_TOOL_LIST = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


@dataclass(frozen=True, slots=True)
class _CallDialect:
    """How a template wants to be given tool calls."""

    arguments_as_json: bool
    """The arguments are given as text, because the template concatenates them."""
    short_ids: bool
    """Ids have nine letters or digits, because the template checks that."""

    def render(self, call: ToolCall) -> TemplateDict:
        arguments = _plain(call.arguments)
        if self.arguments_as_json:
            arguments = _json(arguments)
        function = {"name": call.name, "arguments": arguments}
        return {"id": self.id(call.id), "type": "function", "function": function}

    def id(self, call_id: str) -> str:
        if not self.short_ids or (len(call_id) == 9 and call_id.isalnum()):
            return call_id
        return hashlib.sha256(call_id.encode()).hexdigest()[:9]


_ASK: TemplateDict = {"role": "user", "content": "ask"}
_PROBE_TOOL: TemplateDict = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "",
        "parameters": {"type": "object", "properties": {}},
    },
}
_CALL_DIALECTS = tuple(_CallDialect(as_json, short) for short in (False, True) for as_json in (False, True))


@dataclass(frozen=True, slots=True)
class _Abilities:
    """What a template renders. Each is tried out once, so that none can change within a session."""

    tools: bool
    system: bool
    results: bool
    calls: _CallDialect | None
    """How tool calls are given to it; None where it renders none."""
    later_systems: bool
    users_on_end: bool
    assistants_on_end: bool
    assistant_first: bool


class ChatTemplate:
    """The chat template and the tokenizer of one model. Not for several threads at once."""

    def __init__(self, tokenizer: TokenizerWrapper, control_words: ControlWords = "text") -> None:
        self._tokenizer = tokenizer
        self.tokenizer = ExactTokenizer(tokenizer, guards=control_words == "text")
        self._abilities = self._try_out()

    def render(self, request: ChatRequest, *, generation_prompt: bool = True) -> str:
        """The text of ``request``, ready for the model's answer unless ``generation_prompt`` is off.

        Raises:
            InvalidRequest: there is no message, a template argument is reserved, or the template refuses.
        """
        if not request.messages:
            raise InvalidRequest("messages is empty: a request needs at least one message.")
        if taken := sorted(_RESERVED & request.template_kwargs.keys()):
            raise InvalidRequest(f"template_kwargs may not hold {', '.join(taken)}: the engine sets them.")
        text = self._raw(request) if request.is_raw else self._written(request, generation_prompt)
        try:
            unguarded(text).encode()
        except UnicodeEncodeError as error:
            # Not raised from it, because it holds the whole text.
            place = f"at character {error.start} of the prompt ({error.reason})"
            raise InvalidRequest(f"a message is not valid Unicode, so it has no tokens: {place}") from None
        return text

    def readable(self, request: ChatRequest) -> str:
        """What `render` gives, as people read it. Raises as it does."""
        return unguarded(self.render(request))

    def _raw(self, request: ChatRequest) -> str:
        return self._bos() + "".join(_without_guards(message).content for message in request.messages)

    def _written(self, request: ChatRequest, generation_prompt: bool) -> str:
        """The conversation, written by the template."""
        messages, tools = self._translate(request)
        opens_answer = generation_prompt and not request.continue_final_message
        try:
            text = self._apply(messages, tools, request.template_kwargs, generation_prompt=opens_answer)
        except TemplateError as error:
            said = self._refusal(str(error), messages, tools, request.template_kwargs)
            raise InvalidRequest(f"the model's chat template refuses these messages: {said}") from None
        if request.continue_final_message:
            text = _left_open(text, request.messages[-1].content)
        return text

    def _refusal(
        self,
        said: str,
        messages: list[TemplateDict],
        tools: list[TemplateDict],
        template_kwargs: Mapping[str, Any],
    ) -> str:
        """Why the template refused: in its own words if these stay the same whatever the messages say."""
        others = [{"role": message["role"], "content": "..."} for message in messages]
        try:
            self._apply(others, tools, template_kwargs)
        except TemplateError as error:
            if str(error) == said:
                return said
        except TEMPLATE_ERRORS:
            pass
        return "what it says may quote them, so it is not shown here"

    def encode(
        self, request: ChatRequest, known: Sequence[TokenText] = (), *, generation_prompt: bool = True
    ) -> Prompt:
        """Token ids of ``request``, beginning with those of the ``known`` branch that agrees with it the longest.

        Raises:
            InvalidRequest: see `render`.
        """
        return self.tokenizer.encode(self.render(request, generation_prompt=generation_prompt), known)

    def _apply(
        self,
        messages: list[TemplateDict],
        tools: list[TemplateDict],
        template_kwargs: Mapping[str, Any],
        *,
        generation_prompt: bool = True,
    ) -> str:
        if not self._tokenizer.has_chat_template:
            turns = "".join(f"{m['role']}:\n{m['content']}\n\n" for m in messages)
            return self._bos() + turns + ("assistant:\n" if generation_prompt else "")
        text: str = self._tokenizer.apply_chat_template(
            messages,
            tools=tools or None,
            add_generation_prompt=generation_prompt,
            tokenize=False,
            **template_kwargs,
        )
        return text

    def _bos(self) -> str:
        """The BOS that the model expects, for text that no template writes; empty where it expects none."""
        bos = self._tokenizer.bos_token_id
        expected = bos is not None and bool(self._tokenizer.encode("a")[:1] == [bos])
        return (self._tokenizer.bos_token or "") if expected else ""

    def _translate(self, request: ChatRequest) -> tuple[list[TemplateDict], list[TemplateDict]]:
        can = self._abilities
        messages = [_to_dict(self._guarded(message), can.calls) for message in request.messages]
        tools: list[TemplateDict] = [_plain(tool) for tool in request.tools]
        if tools and not can.tools:
            messages, tools = _with_tool_list(messages, tools), []
        if not can.results:
            messages = _as_user(messages, "tool", "<tool_response>\n{}\n</tool_response>".format)
        if not can.system:
            messages = _as_user(messages, "system", str)
        if not can.later_systems:
            first = next((i for i, m in enumerate(messages) if m["role"] != "system"), len(messages))
            messages = [*messages[:first], *_as_user(messages[first:], "system", str)]
        return _taking_turns(messages, can), tools

    def _guarded(self, message: Message) -> Message:
        """A message in which control words that a user or a tool has written are only text."""
        _without_guards(message)
        if message.role not in ("user", "tool"):
            return message
        return replace(message, content=self.tokenizer.guard(message.content))

    def _try_out(self) -> _Abilities:
        calls = next((dialect for dialect in _CALL_DIALECTS if self._shows_call(dialect)), None)
        return _Abilities(
            tools=self._shows("probe_tool", [_ASK], [_PROBE_TOOL]),
            system=self._shows("probe_system", [{"role": "system", "content": "probe_system"}, _ASK]),
            results=self._shows("probe_result", _probe_conversation(calls)),
            calls=calls,
            later_systems=self._keeps(("user", "assistant", "system", "user")),
            users_on_end=self._keeps(("user", "user", "assistant")),
            assistants_on_end=self._keeps(("user", "assistant", "assistant")),
            assistant_first=self._keeps(("assistant", "user")),
        )

    def _keeps(self, roles: Sequence[str]) -> bool:
        """Whether messages of these roles are rendered one after another, each once."""
        words = [f"probe_{i}" for i in range(len(roles))]
        try:
            text = self._apply(
                [{"role": role, "content": word} for role, word in zip(roles, words, strict=True)], [], {}
            )
        except TEMPLATE_ERRORS:
            return False
        return re.findall("probe_[0-9]", text) == words

    def _shows_call(self, dialect: _CallDialect) -> bool:
        """Whether a call is rendered before its result is there, or at least afterwards."""
        messages = _probe_conversation(dialect)
        return self._shows("probe_call", messages[:-1]) or self._shows("probe_call", messages)

    def _shows(self, word: str, messages: list[TemplateDict], tools: Sequence[TemplateDict] = ()) -> bool:
        try:
            return word in self._apply(messages, list(tools), {})
        except TEMPLATE_ERRORS:
            return False


def _without_guards(message: Message) -> Message:
    """The message, in which no character stands that only this package writes.

    Raises:
        InvalidRequest: one does.
    """
    if GUARD in message.content:
        raise InvalidRequest("a message is not valid Unicode, so it has no tokens: it has a lone surrogate")
    return message


def _left_open(text: str, answer: str) -> str:
    """A rendered conversation up to the end of its last message, which is not closed.

    Raises:
        InvalidRequest: the template writes the message otherwise.
    """
    for content in (answer, answer.strip()):
        if content and content in text:
            return text[: text.rindex(content) + len(content)]
    raise InvalidRequest(
        "continue_final_message=True is not valid: this model's chat template does not write the last message as it is."
    )


def _probe_conversation(dialect: _CallDialect | None) -> list[TemplateDict]:
    call = Message("assistant", "", tool_calls=(ToolCall("probe_call", {"x": 1}, "call_1"),))
    result = Message("tool", "probe_result", name="probe_call", tool_call_id="call_1")
    return [_ASK, _to_dict(call, dialect), _to_dict(result, dialect)]


def _to_dict(message: Message, dialect: _CallDialect | None) -> TemplateDict:
    rendered: TemplateDict = {"role": message.role, "content": message.content}
    if message.name is not None:
        rendered["name"] = message.name
    if message.tool_call_id is not None:
        rendered["tool_call_id"] = dialect.id(message.tool_call_id) if dialect else message.tool_call_id
    if message.reasoning is not None:
        rendered["reasoning_content"] = message.reasoning
    if message.tool_calls and dialect:
        rendered["tool_calls"] = [dialect.render(call) for call in message.tool_calls]
    elif message.tool_calls:
        calls = [{"name": call.name, "arguments": _plain(call.arguments)} for call in message.tool_calls]
        spans = [f"<tool_call>\n{_json(call)}\n</tool_call>" for call in calls]
        rendered["content"] = "\n".join([*filter(None, [message.content]), *spans])
    return rendered


def _plain(value: Any) -> Any:
    """A copy made of dicts and lists, in the same order. Templates and renderers expect these, and may change them."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _with_tool_list(messages: list[TemplateDict], tools: list[TemplateDict]) -> list[TemplateDict]:
    listed = _TOOL_LIST.format(tools="\n".join(map(_json, tools)))
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": listed}, *messages]
    return [{**messages[0], "content": f"{messages[0]['content']}\n\n{listed}"}, *messages[1:]]


def _as_user(messages: list[TemplateDict], role: str, wrap: Callable[[str], str]) -> list[TemplateDict]:
    """Give messages of ``role`` to the user, joined with what the user says next, because roles have to alternate."""
    out: list[TemplateDict] = []
    joins = False
    for message in messages:
        moved = message["role"] == role
        if moved:
            message = {"role": "user", "content": wrap(message["content"])}
        if joins and message["role"] == "user":
            message = {**message, "content": f"{out.pop()['content']}\n\n{message['content']}"}
        out.append(message)
        joins = moved
    return out


def _taking_turns(messages: list[TemplateDict], can: _Abilities) -> list[TemplateDict]:
    """Messages of a user and an assistant who take turns, as far as a template needs that."""
    out: list[TemplateDict] = []
    joined = {"user": not can.users_on_end, "assistant": not can.assistants_on_end}
    for message in messages:
        role = message["role"]
        if role == "assistant" and not can.assistant_first and not any(m["role"] != "system" for m in out):
            out.append({"role": "user", "content": ""})
        if out and out[-1]["role"] == role and joined.get(role):
            message = _joined(out.pop(), message)
        out.append(message)
    return out


def _joined(first: TemplateDict, second: TemplateDict) -> TemplateDict:
    """Two messages of one role as one."""
    both: TemplateDict = {**first, **second}
    for key in ("content", "reasoning_content"):
        if said := [part for part in (first.get(key), second.get(key)) if part]:
            both[key] = "\n\n".join(said)
    if calls := [*first.get("tool_calls", ()), *second.get("tool_calls", ())]:
        both["tool_calls"] = calls
    return both
