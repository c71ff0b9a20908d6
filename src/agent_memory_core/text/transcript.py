"""A conversation's messages, read back from the tokens of a prompt and its answer.

How a template sets messages apart is learnt from short conversations that it renders. Special tokens are compared as
tokens, so that a message which only spells one is not cut there. In a template without special tokens a message may
spell what separates two: then the messages, rendered again, are not the text that they came from, and that is said.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

from mlx_lm.tokenizer_utils import TokenizerWrapper

from agent_memory_core.errors import InvalidRequest
from agent_memory_core.messages import ChatRequest, Message, ToolCall, Transcript
from agent_memory_core.text.chat_template import TEMPLATE_ERRORS, ChatTemplate
from agent_memory_core.text.detokenizer import CallParser, Detokenizer
from agent_memory_core.text.token_text import TokenText, unguarded

_MARK = "\0"
"""Stands on both sides of a special token. Messages cannot hold it as a piece of their own next to such a token."""

_WORDS = ("zebra", "quilt", "maple", "ivory")

_CALL = ToolCall("probe", {"x": 1}, "call00000")

_TALKS: tuple[tuple[str, ...], ...] = (
    ("system", "user", "assistant", "user"),
    ("user", "assistant", "user", "assistant"),
    ("user", "user", "assistant", "assistant"),
    ("user", "calls", "tool", "assistant"),
    ("user", "calls", "tool", "tool"),
    ("user", "calls", "tool", "user"),
)
"""Conversations in which each pair of roles that may follow each other stands once."""


class TranscriptReader:
    """Reads the conversations of one model. Not for several threads at once.

    Args:
        tokenizer: the model's.
        template: its chat template.
        calls: parses the calls in its answers.
    """

    def __init__(self, tokenizer: TokenizerWrapper, template: ChatTemplate, calls: CallParser) -> None:
        self._tokenizer, self._template, self._calls = tokenizer, template, calls
        self._openings: dict[str, str] = {}
        self._separators: dict[tuple[str, str], str] = {}
        self._footers: dict[str, str] = {}
        for roles in _TALKS:
            self._learn(roles)

    def read(self, token_ids: Sequence[int]) -> Transcript:
        """The conversation that these ids spell: a prompt as the template writes it, and perhaps an answer."""
        known = self._template.tokenizer.text_of(token_ids)
        messages = tuple(
            _with_call_ids(self._message(role, text) for role, text in self._parts(_marked(known)))
        )
        return Transcript(messages, unguarded(known.text), self._is_exact(messages, known.text))

    # Learning

    def _learn(self, roles: Sequence[str]) -> None:
        """Read off a rendered conversation what stands before and between its messages."""
        messages = tuple(_probe(role, word) for role, word in zip(roles, _WORDS, strict=True))
        try:
            prompt = self._template.encode(ChatRequest(messages), generation_prompt=False)
        except (InvalidRequest, *TEMPLATE_ERRORS):
            return
        text = _marked(self._template.tokenizer.text_of(prompt.token_ids))
        places = [text.find(word) for word in _WORDS]
        ordered = all(place >= 0 for place, role in zip(places, roles, strict=True) if role != "calls")
        if not ordered or [p for p in places if p >= 0] != sorted(p for p in places if p >= 0):
            return
        self._openings.setdefault(roles[0], text[: places[0]])
        self._footers.setdefault(roles[-1], text[places[-1] + len(_WORDS[-1]) :])
        for at, (role, following) in enumerate(pairwise(roles)):
            if "calls" in (role, following):
                continue
            self._separators.setdefault(
                (role, following), text[places[at] + len(_WORDS[at]) : places[at + 1]]
            )
        if "calls" in roles:
            self._learn_results(text, places)

    def _learn_results(self, text: str, places: Sequence[int]) -> None:
        """What stands between a call and its result: the template's text from the last end of a call on."""
        end = self._calls.end or _CALL.name
        at = text.rfind(end, 0, places[2])
        if at >= 0:
            closed = at + len(end) + (len(_MARK) if text.startswith(_MARK, at + len(end)) else 0)
            self._separators.setdefault(("assistant", "tool"), text[closed : places[2]])

    # Reading

    def _parts(self, text: str) -> Iterator[tuple[str, str]]:
        """Roles and marked contents, in their order."""
        fitting = [
            (len(opening), role) for role, opening in self._openings.items() if text.startswith(opening)
        ]
        if not fitting:
            return
        at, role = max(fitting)
        while True:
            found = list(self._ends(role, text, at))
            if not found:
                yield role, self._without_end(role, text[at:])
                return
            end, _, following, size = min(found)
            yield role, text[at:end]
            at, role = end + size, following

    def _ends(self, role: str, text: str, at: int) -> Iterator[tuple[int, int, str, int]]:
        """Where a message of ``role`` that begins at ``at`` may end; of equal places the longest separator first."""
        for (before, following), separator in self._separators.items():
            if before == role and separator and (end := text.find(separator, at)) >= 0:
                yield end, -len(separator), following, len(separator)

    def _without_end(self, role: str, text: str) -> str:
        """The last content without what ends it, which an answer that was cut lacks."""
        footer = self._footers.get(role, "").strip()
        content, found, rest = text.rpartition(footer) if footer else (text, "", "")
        return content if found and not rest.strip() else text

    def _message(self, role: str, marked: str) -> Message:
        text = unguarded(marked.replace(_MARK, ""))
        if role != "assistant":
            return Message(role, text)
        reader = Detokenizer(self._tokenizer, calls=self._calls)
        deltas = [*map(reader.push, self._template.tokenizer.tokenize(text)), reader.finish()]
        calls = tuple(call for delta in deltas for call in delta.tool_calls)
        unread = "".join(call.text for delta in deltas for call in delta.invalid_tool_calls)
        reasoning = "".join(delta.reasoning for delta in deltas).strip()
        content = text if unread else "".join(delta.text for delta in deltas)
        return Message(
            role, content.strip() if reasoning else content, tool_calls=calls, reasoning=reasoning or None
        )

    def _is_exact(self, messages: Sequence[Message], text: str) -> bool:
        """Whether the messages, rendered again, begin with or are begun by the text that they came from."""
        if not messages:
            return False
        try:
            again = self._template.render(ChatRequest(tuple(messages)), generation_prompt=False)
        except (InvalidRequest, *TEMPLATE_ERRORS):
            return False
        return again.startswith(text.rstrip()) or text.startswith(again.rstrip())


def _probe(role: str, word: str) -> Message:
    if role == "calls":
        return Message("assistant", "", tool_calls=(_CALL,))
    return Message(
        role, word, "probe" if role == "tool" else None, tool_call_id=_CALL.id if role == "tool" else None
    )


def _marked(known: TokenText) -> str:
    """The text with a mark on both sides of every special token."""
    return "".join(
        f"{_MARK}{piece.text}{_MARK}" if piece.is_special else piece.text for piece in known.pieces
    )


def _with_call_ids(messages: Iterator[Message]) -> Iterator[Message]:
    """Name in each tool's result the call that it answers, which is told by their order."""
    open_calls: list[ToolCall] = []
    for message in messages:
        if message.tool_calls:
            open_calls = list(message.tool_calls)
        if message.role == "tool" and open_calls:
            call = open_calls.pop(0)
            message = replace(message, name=call.name, tool_call_id=call.id)
        yield message
