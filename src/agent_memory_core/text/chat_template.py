"""Requests to exact token ids: a session goes on with its own tokens, only new text is tokenised.

A prompt is rendered by the model's own template, once. Where its text begins with the text of a known branch,
the branch's ids are taken over as they are, however the model chose to spell its answer; only the rest is
tokenised. Both meet where the tokenizer itself would cut: behind a special token, before one, or, in templates
without them, at the end of a word or line. Where a template rewrites history, the ids follow it.

What a template cannot say is said in plain messages, as its model most likely saw them in training:

    tools            a list after the system message, with the <tool_call> JSON convention
    tool calls       <tool_call> JSON after the content of the message that made them
    tool results     a user message holding <tool_response>
    system message   the beginning of the next user message
    no template      "role:\\n", the content and a blank line for each message

Text that spells a special token becomes that token, in a user's message as in the template's own text.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile
from typing import Any

from jinja2 import TemplateError
from mlx_lm.tokenizer_utils import TokenizerWrapper
from transformers import PreTrainedTokenizerBase

from agent_memory_core.blocks.block import common_prefix
from agent_memory_core.errors import InvalidRequest
from agent_memory_core.messages import ChatRequest, Message, ToolCall

MIN_OPENING = 64
"""A conversation's opening shorter than this many tokens is not worth a mark."""

MAX_PROBES = 256
"""How many openings and generation prompts are remembered."""

Rendered = dict[str, Any]
"""A message in the form that chat templates read."""

_RESERVED = {"messages", *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters} - {
    "documents",
    "kwargs",
}

# What templates and mlx-lm's own renderers raise on messages they do not know.
_REFUSALS = (
    TemplateError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    TypeError,
    ValueError,
)

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
class Piece:
    """Tokens [start, end) and their text. A special token is a piece of its own, a run of others is one."""

    start: int
    end: int
    text: str


@dataclass(frozen=True, slots=True)
class TokenText:
    """Token ids with the text they stand for, piece by piece."""

    token_ids: tuple[int, ...] = ()
    pieces: tuple[Piece, ...] = ()
    text: str = ""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request as token ids. The first ``reused`` of them are those of ``known[source]``."""

    token_ids: tuple[int, ...]
    text: str
    reused: int
    source: int | None


class TextDecoder:
    """Decodes ids exactly: special tokens are shown, spaces are kept."""

    def __init__(self, tokenizer: TokenizerWrapper) -> None:
        self._tokenizer = tokenizer
        self._anchor: list[int] = tokenizer.encode("a", add_special_tokens=False)[-1:]
        self._lead = self.whole(self._anchor)

    def whole(self, token_ids: Sequence[int]) -> str:
        """The text of ids that begin a text."""
        text: str = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def inner(self, token_ids: Sequence[int]) -> str:
        """The text of ids that stand after others.

        Some tokenizers drop the space of the first token they decode: behind an anchor, no token is the first.
        """
        text = self.whole([*self._anchor, *token_ids])
        return text[len(self._lead) :] if text.startswith(self._lead) else self.whole(token_ids)


@dataclass(frozen=True, slots=True)
class _CallForm:
    """How a template wants tool calls: some concatenate the arguments as text, some check the ids."""

    arguments_as_json: bool
    short_ids: bool

    def render(self, call: ToolCall) -> Rendered:
        arguments = _plain(call.arguments)
        if self.arguments_as_json:
            arguments = _json(arguments)
        function = {"name": call.name, "arguments": arguments}
        return {"id": self.id(call.id), "type": "function", "function": function}

    def id(self, call_id: str) -> str:
        if not self.short_ids or (len(call_id) == 9 and call_id.isalnum()):
            return call_id
        return hashlib.sha256(call_id.encode()).hexdigest()[:9]


_CALL_FORMS = tuple(_CallForm(as_json, short) for short in (False, True) for as_json in (False, True))


@dataclass(frozen=True, slots=True)
class _Abilities:
    """What a template renders. Found by trying it, once, so that it cannot change within a session."""

    tools: bool
    system: bool
    results: bool
    calls: _CallForm | None


class ChatTemplate:
    """The chat template and the tokenizer of one model. Not for several threads at once."""

    def __init__(self, tokenizer: TokenizerWrapper) -> None:
        self._tokenizer = tokenizer
        self._decoder = TextDecoder(tokenizer)
        added = tokenizer.added_tokens_decoder
        self._added: dict[int, str] = {token_id: self._decoder.inner([token_id]) for token_id in added}
        self._probes: OrderedDict[tuple[str, str], tuple[int, ...]] = OrderedDict()
        self._abilities = self._try_out()

    # Text

    def render(self, request: ChatRequest, *, generation_prompt: bool = True) -> str:
        """The text of ``request``, ready for the model's answer unless ``generation_prompt`` is off.

        Raises:
            InvalidRequest: there is no message, a template argument is reserved, or the template refuses.
        """
        if not request.messages:
            raise InvalidRequest("messages is empty: a request needs at least one message.")
        if taken := sorted(_RESERVED & request.template_kwargs.keys()):
            raise InvalidRequest(f"template_kwargs may not hold {', '.join(taken)}: the engine sets them.")
        messages, tools = self._translate(request)
        try:
            text = self._apply(messages, tools, request.template_kwargs, generation_prompt=generation_prompt)
        except TemplateError as error:
            raise InvalidRequest(f"the model's chat template refuses these messages: {error}") from error
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"a message is not valid Unicode, so it has no tokens: {error}") from error
        return text

    def _apply(
        self,
        messages: list[Rendered],
        tools: list[Rendered],
        template_kwargs: Mapping[str, Any],
        *,
        generation_prompt: bool = True,
    ) -> str:
        if not self._tokenizer.has_chat_template:
            bos: str = (self._tokenizer.bos_token or "") if self._adds_bos() else ""
            said = "".join(f"{m['role']}:\n{m['content']}\n\n" for m in messages)
            return bos + said + ("assistant:\n" if generation_prompt else "")
        text: str = self._tokenizer.apply_chat_template(
            messages,
            tools=tools or None,
            add_generation_prompt=generation_prompt,
            tokenize=False,
            **template_kwargs,
        )
        return text

    def _adds_bos(self) -> bool:
        """Whether the model expects a BOS that no template is there to write."""
        bos = self._tokenizer.bos_token_id
        return bos is not None and bool(self._tokenizer.encode("a")[:1] == [bos])

    def _translate(self, request: ChatRequest) -> tuple[list[Rendered], list[Rendered]]:
        can = self._abilities
        messages = [_rendered(message, can.calls) for message in request.messages]
        tools: list[Rendered] = [_plain(tool) for tool in request.tools]
        if tools and not can.tools:
            messages, tools = _with_tool_list(messages, tools), []
        if not can.results:
            messages = _as_user(messages, "tool", "<tool_response>\n{}\n</tool_response>".format)
        if not can.system:
            messages = _as_user(messages, "system", str)
        return messages, tools

    def _try_out(self) -> _Abilities:
        ask = [{"role": "user", "content": "ask"}]
        tool = {"name": "probe_tool", "description": "", "parameters": {"type": "object", "properties": {}}}
        call = Message("assistant", "", tool_calls=(ToolCall("probe_call", {"x": 1}, "call_1"),))
        result = Message("tool", "probe_result", name="probe_call", tool_call_id="call_1")

        def shows(word: str, messages: list[Rendered], tools: list[Rendered]) -> bool:
            try:
                return word in self._apply(messages, tools, {})
            except _REFUSALS:
                return False

        def turns(form: _CallForm | None) -> tuple[list[Rendered], list[Rendered]]:
            called = [*ask, _rendered(call, form)]
            return called, [*called, _rendered(result, form)]

        def shows_call(form: _CallForm) -> bool:
            return any(shows("probe_call", messages, []) for messages in turns(form))

        calls = next((form for form in _CALL_FORMS if shows_call(form)), None)
        return _Abilities(
            tools=shows("probe_tool", ask, [{"type": "function", "function": tool}]),
            system=shows("probe_system", [{"role": "system", "content": "probe_system"}, *ask], []),
            results=shows("probe_result", turns(calls)[1], []),
            calls=calls,
        )

    # Tokens

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a whole text. A BOS is in them only if it is in the text."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return ids

    def text_of(self, token_ids: Sequence[int]) -> TokenText:
        """The text of a branch's ids, alone from the ids."""
        return self.extend(TokenText(), token_ids)

    def extend(self, known: TokenText, token_ids: Sequence[int]) -> TokenText:
        """``known`` with more ids; costs what is new, and the unfinished run before it."""
        ids = (*known.token_ids, *token_ids)
        pieces, text = known.pieces, known.text
        start = len(known.token_ids)
        if pieces and self._is_plain(known, pieces[-1]):
            # A character may have been cut in two.
            start = pieces[-1].start
            text = text[: len(text) - len(pieces[-1].text)]
            pieces = pieces[:-1]
        new = tuple(self._cut(ids, start))
        return TokenText(ids, pieces + new, text + "".join(piece.text for piece in new))

    def _cut(self, ids: tuple[int, ...], start: int) -> Iterator[Piece]:
        at = start
        for added, run in groupby(ids[start:], key=self._added.__contains__):
            for part in ([i] for i in run) if added else [list(run)]:
                decode = self._decoder.inner if at else self._decoder.whole
                yield Piece(at, at + len(part), self._added[part[0]] if added else decode(part))
                at += len(part)

    def _is_plain(self, known: TokenText, piece: Piece) -> bool:
        return known.token_ids[piece.start] not in self._added

    def encode(
        self, request: ChatRequest, known: Sequence[TokenText] = (), *, generation_prompt: bool = True
    ) -> Prompt:
        """Token ids of ``request``, those of the deepest agreeing ``known`` branch taken over.

        Raises:
            InvalidRequest: see `render`.
        """
        text = self.render(request, generation_prompt=generation_prompt)
        agreed = [_agreement(branch, text) for branch in known]
        source = max(range(len(known)), key=lambda i: agreed[i][1], default=None)
        if source is None:
            return Prompt(tuple(self.tokenize(text)), text, 0, None)
        return self._continue(known[source], source, agreed[source], text) or self._align(known, text)

    def checkpoints(self, request: ChatRequest, prompt: Prompt) -> tuple[int, ...]:
        """Places in a prompt where other prompts are likely to part from it, in order.

        These are the end of what comes before the first user message (the system message and the tools), unless
        that is short, and the end of the messages, where the generation prompt begins.
        """
        ids = prompt.token_ids
        suffix = self._generation_prompt(request)
        end = len(ids) - max(1, len(suffix) if ids[len(ids) - len(suffix) :] == suffix else 1)
        opening = common_prefix(self._opening(request), ids)
        places = {opening if opening >= MIN_OPENING else 0, end}
        return tuple(sorted(place for place in places if 0 < place < len(ids)))

    def _generation_prompt(self, request: ChatRequest) -> tuple[int, ...]:
        """The tokens that ask for an answer, where a template ends with them whatever comes before."""
        probe = ChatRequest((Message("user", "ask"),), template_kwargs=request.template_kwargs)

        def find() -> tuple[int, ...]:
            whole = self.encode(probe).token_ids
            start = self.encode(probe, generation_prompt=False).token_ids
            return whole[len(start) :] if whole[: len(start)] == start else ()

        return self._probed(("generation", _json(dict(request.template_kwargs))), find)

    def _opening(self, request: ChatRequest) -> tuple[int, ...]:
        """The tokens that begin every conversation with these tools and this system message."""
        system = tuple(takewhile(lambda message: message.role == "system", request.messages))

        def find() -> tuple[int, ...]:
            one, other = (
                self.encode(
                    ChatRequest(
                        (*system, Message("user", word)),
                        request.tools,
                        template_kwargs=request.template_kwargs,
                    )
                ).token_ids
                for word in ("a", "1")
            )
            return one[: common_prefix(one, other)]

        said = [
            [m.content for m in system],
            [dict(tool) for tool in request.tools],
            dict(request.template_kwargs),
        ]
        return self._probed(("opening", hashlib.sha256(_json(said).encode()).hexdigest()), find)

    def _probed(self, key: tuple[str, str], find: Callable[[], tuple[int, ...]]) -> tuple[int, ...]:
        if key not in self._probes:
            try:
                found = find()
            except _REFUSALS:
                # Some templates want more of a conversation than a probe says.
                found = ()
            self._probes[key] = found
            if len(self._probes) > MAX_PROBES:
                self._probes.popitem(last=False)
        return self._probes[key]

    def _continue(self, branch: TokenText, source: int, agreed: tuple[int, int], text: str) -> Prompt | None:
        """Take over the agreed pieces; None where no clean seam follows them."""
        count, at = agreed
        if not count:
            return None
        last, rest = branch.pieces[count - 1], text[at:]
        # Behind the last piece, so that a tokenizer that puts a space before a text does not put one here, and so
        # that the tokenizer shows whether it cuts where the piece ends.
        new = self.tokenize(last.text + rest)[len(self.tokenize(last.text)) :]
        if self._decoder.inner(new) != rest:
            return None
        return Prompt((*branch.token_ids[: last.end], *new), text, last.end, source)

    def _align(self, known: Sequence[TokenText], text: str) -> Prompt:
        """Compare tokens with tokens, for tokenizers whose ids do not decode to the text they came from."""
        fresh = self.text_of(self.tokenize(text))
        counts = [_common_pieces(branch, fresh) for branch in known]
        source = max(range(len(known)), key=counts.__getitem__)
        count = counts[source]
        if not count:
            return Prompt(fresh.token_ids, text, 0, None)
        end = known[source].pieces[count - 1].end
        ids = known[source].token_ids[:end] + fresh.token_ids[fresh.pieces[count - 1].end :]
        return Prompt(ids, text, end, source)


def _agreement(branch: TokenText, text: str) -> tuple[int, int]:
    """How many pieces and characters of ``branch`` begin ``text``."""
    if text.startswith(branch.text):
        return len(branch.pieces), len(branch.text)
    at = 0
    for count, piece in enumerate(branch.pieces):
        if not text.startswith(piece.text, at):
            return count, at
        at += len(piece.text)
    return len(branch.pieces), at


def _common_pieces(branch: TokenText, fresh: TokenText) -> int:
    pairs = zip(branch.pieces, fresh.pieces, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0].text == pair[1].text, pairs))


def _rendered(message: Message, form: _CallForm | None) -> Rendered:
    rendered: Rendered = {"role": message.role, "content": message.content}
    if message.name is not None:
        rendered["name"] = message.name
    if message.tool_call_id is not None:
        rendered["tool_call_id"] = form.id(message.tool_call_id) if form else message.tool_call_id
    if message.reasoning is not None:
        rendered["reasoning_content"] = message.reasoning
    if message.tool_calls and form:
        rendered["tool_calls"] = [form.render(call) for call in message.tool_calls]
    elif message.tool_calls:
        calls = [{"name": call.name, "arguments": _plain(call.arguments)} for call in message.tool_calls]
        spans = [f"<tool_call>\n{_json(call)}\n</tool_call>" for call in calls]
        rendered["content"] = "\n".join([*filter(None, [message.content]), *spans])
    return rendered


def _plain(value: Any) -> Any:
    """A copy in dicts and lists, in the same order: what templates and renderers expect, and may change."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _with_tool_list(messages: list[Rendered], tools: list[Rendered]) -> list[Rendered]:
    listed = _TOOL_LIST.format(tools="\n".join(map(_json, tools)))
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": listed}, *messages]
    return [{**messages[0], "content": f"{messages[0]['content']}\n\n{listed}"}, *messages[1:]]


def _as_user(messages: list[Rendered], role: str, wrap: Callable[[str], str]) -> list[Rendered]:
    """Messages of ``role`` as the user's, joined with what the user says next: roles must alternate."""
    out: list[Rendered] = []
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
