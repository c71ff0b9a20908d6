"""The arguments of a tool call as JSON text, piece by piece while the model writes the call.

A reader takes the text after a call's start delimiter and returns what is certain of the arguments. The pieces of a
call, put together, are JSON that reads as exactly the arguments that the model's parser finds in the whole call. A call
that is not written in the syntax that was learnt gives no pieces: it comes whole, once it has ended.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from agent_memory_core.structured.tool_schema import Tool, schema_types, tool_name, tool_parameters
from agent_memory_core.structured.tool_syntax import PROBE_NAMES, JsonToolSyntax, ToolSyntax
from agent_memory_core.structured.tool_syntax_xml import XmlToolSyntax
from agent_memory_core.text.detokenizer import CallReader

_CLOSING = {"}": "{", "]": "["}

_TRIED = (" x", "x ", "\nx\n", "7", "true", '{"a": 1}', "[1]", 'a "b" \\ é', "a\nb", "(1, 2)", "&lt;a&amp;")
"""Strings that must come back from a parser as they are, or without the space at their ends."""

_LONGEST_WORD = 8
"""Parsers may read words up to this many characters, such as null, as something else than a string."""


def call_reader(syntax: ToolSyntax | None, tools: Sequence[Tool]) -> CallReader | None:
    """A reader of one call of ``tools`` in ``syntax``; None where its arguments cannot be told before its end."""
    if isinstance(syntax, JsonToolSyntax) and not _writes_ids(syntax):
        return JsonCallReader(syntax, [tool_name(tool) for tool in tools])
    if isinstance(syntax, XmlToolSyntax):
        return XmlCallReader(syntax, tools)
    return None


def _writes_ids(syntax: JsonToolSyntax) -> bool:
    """Whether the model writes an id of its own into each call, which is then known too late or too early."""
    around = syntax.before_name + syntax.after_name + syntax.after_arguments
    return any(name in around for name in PROBE_NAMES)


class _Head:
    """Finds which tool a call names, at the beginning of its text."""

    def __init__(self, before: str, names: Sequence[str], after: str) -> None:
        choices = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
        self._pattern = re.compile(f"{_spaced(before)}({choices}){_spaced(after)}")
        self._longest = 2 * len(before + after) + max(map(len, names), default=0) + 32

    def find(self, text: str) -> re.Match[str] | None:
        """The beginning of a call, once it is there."""
        return self._pattern.match(text) if len(text) <= self._longest else None


def _spaced(text: str) -> str:
    """A pattern for ``text`` with any white space where it has some, around it and after JSON's marks."""
    parts = (re.escape(part) for part in re.findall(r"[{}\[\]:,]|[^\s{}\[\]:,]+", text))
    return r"\s*" + r"\s*".join(parts) + r"\s*"


class JsonCallReader:
    """Reads a call whose arguments are one JSON object: they are handed out as the model writes them."""

    def __init__(self, syntax: JsonToolSyntax, names: Sequence[str]) -> None:
        self.name = ""
        self._head = _Head(syntax.before_name, names, syntax.after_name)
        self._text = ""
        self._said: list[str] = []
        self._open: list[str] = []
        self._in_string = self._escaped = self._ended = False

    def feed(self, text: str) -> str:
        """See `CallReader.feed`."""
        if not self.name:
            self._text += text
            found = self._head.find(self._text)
            # An object begins here; anything else, such as JSON inside a string, is read at the end of the call.
            if found is None or self._text[found.end() : found.end() + 1] != "{":
                return ""
            self.name, text = found[1], self._text[found.end() :]
        piece = "".join(map(self._character, text))
        self._said.append(piece)
        return piece

    def rest(self, arguments: Mapping[str, Any]) -> str | None:
        """See `CallReader.rest`."""
        try:
            said = json.loads("".join(self._said))
        except (ValueError, RecursionError):
            return None
        # As text, because a number that is none does not equal itself.
        return "" if json.dumps(said) == json.dumps(dict(arguments)) else None

    def _character(self, character: str) -> str:
        if self._ended:
            return ""
        if self._in_string:
            return self._inside(character)
        if character == '"':
            self._in_string = True
        elif character in "{[":
            self._open.append(character)
        elif character in "}]":
            self._ended = not self._open or self._open.pop() != _CLOSING[character] or not self._open
        return character

    def _inside(self, character: str) -> str:
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            self._in_string = False
        # The parser takes line breaks as they are, which strict JSON forbids.
        return json.dumps(character)[1:-1] if character < " " else character


class XmlCallReader:
    """Reads a call that writes each argument by itself. Long strings are handed out while they are written."""

    def __init__(self, syntax: XmlToolSyntax, tools: Sequence[Tool]) -> None:
        self.name = ""
        self._tools = {tool_name(tool): tool for tool in tools}
        self._syntax = syntax
        self._head = _Head(syntax.before_name, list(self._tools), "")
        self._buffer = ""
        """What is not understood yet. It is looked at with each character, so what was handed out is not in it."""
        self._searched = 0
        self._said: list[str] = []
        self._key: str | None = None
        self._value: list[str] = []
        """The part of the value that was handed out, as it was written."""
        self._written: list[str] | None = None
        """The same as the parser reads it; None where the value has to be known whole."""
        self._strips = False
        self._step: Callable[[], str | None] = self._read_head

    def feed(self, text: str) -> str:
        """See `CallReader.feed`."""
        self._buffer += text
        pieces = []
        while (piece := self._step()) is not None:
            pieces.append(piece)
        self._said += pieces
        return "".join(pieces)

    def rest(self, arguments: Mapping[str, Any]) -> str | None:
        """See `CallReader.rest`."""
        whole, said = json.dumps(dict(arguments), ensure_ascii=False), "".join(self._said)
        return whole[len(said) :] if whole.startswith(said) else None

    # Each step takes what it can from the buffer and returns a piece, which may be empty; None where it needs more.

    def _read_head(self) -> str | None:
        found = self._head.find(self._buffer)
        after = self._buffer[found.end() :] if found else ""
        # A longer name may begin like this one.
        if found is None or not after or after[0].isalnum() or after[0] in "_-.":
            return None
        self.name, self._buffer = found[1], after
        self._syntax = self._syntax.offering(self._tools[self.name])
        self._step = self._read_key
        return "{"

    def _read_key(self) -> str | None:
        syntax = self._syntax
        before = (
            syntax.between_arguments[len(syntax.value_end) :] if self._key is not None else syntax.before_key
        )
        pattern = f'{_marks(before)}(?P<key>[^<>\\s"=]+?){_marks(syntax.after_key)}'
        if (found := re.match(pattern, self._buffer)) is None:
            return None
        again = self._key is not None
        self._key, self._buffer = found["key"], self._buffer[found.end() :]
        self._strips, is_plain = self._text_of(self._key)
        self._written, self._value, self._searched = [] if is_plain else None, [], 0
        self._step = self._read_value
        return (", " if again else "") + json.dumps(self._key, ensure_ascii=False) + ": "

    def _read_value(self) -> str | None:
        mark = self._syntax.value_end.lstrip()
        at = self._buffer.find(mark, self._searched)
        if at >= 0:
            value, self._buffer = self._buffer[:at], self._buffer[at + len(mark) :]
            self._step = self._read_key
            return self._end_of("".join([*self._value, value]))
        self._searched = max(0, len(self._buffer) - len(mark))
        return self._string_so_far(mark) if self._written is not None else None

    def _string_so_far(self, mark: str) -> str | None:
        """What is certain of a string: all but what may be a mark, and the space before it."""
        assert self._written is not None
        certain = self._buffer[: len(self._buffer) - _held(self._buffer, mark)].rstrip()
        new = certain if self._written else self._begun(certain)
        if len(new) <= (0 if self._written else _LONGEST_WORD):
            return None
        quote = "" if self._written else '"'
        self._value.append(certain)
        self._written.append(new)
        self._buffer, self._searched = self._buffer[len(certain) :], 0
        return quote + _inner(new)

    def _end_of(self, value: str) -> str | None:
        """The rest of a value, as the parser reads it."""
        assert self._key is not None
        syntax, written = self._syntax, "".join(self._written or ())
        raw = value.removeprefix(_trailing_space(syntax.after_key)).removesuffix(
            _leading_space(syntax.value_end)
        )
        read = syntax.read_back(self.name, [(self._key, raw)])
        found = (read or {}).get(self._key, _NOTHING)
        if found is _NOTHING:
            self._stop()
            return None
        if not written:
            return json.dumps(found, ensure_ascii=False)
        if not isinstance(found, str) or not found.startswith(written):
            self._stop()
            return None
        return _inner(found[len(written) :]) + '"'

    def _stop(self) -> None:
        """Hand out no more before the end of the call."""
        self._step = lambda: None

    def _begun(self, value: str) -> str:
        """The beginning of a string as the parser reads it."""
        text = value.removeprefix(_trailing_space(self._syntax.after_key))
        return text.lstrip() if self._strips else text

    def _text_of(self, key: str) -> tuple[bool, bool]:
        """Whether the parser strips strings of this parameter, and whether they come back as they are but for that."""
        schema = tool_parameters(self._tools[self.name])
        declared = (schema.get("properties") or {}).get(key)
        if declared is None or {found.name for found in schema_types(declared, schema)} != {"string"}:
            return False, False
        read = [(self._syntax.read_back(self.name, [(key, text)]) or {}).get(key) for text in _TRIED]
        if read == list(_TRIED):
            return False, True
        return True, read == [text.strip() for text in _TRIED]


_NOTHING = object()


def _inner(text: str) -> str:
    """Text as it stands inside a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _marks(text: str) -> str:
    """A pattern for marks with any white space before and between them; what follows the last one is left."""
    return r"\s*" + r"\s*".join(re.escape(part) for part in text.split())


def _leading_space(text: str) -> str:
    return text[: len(text) - len(text.lstrip())]


def _trailing_space(text: str) -> str:
    return text[len(text.rstrip()) :]


def _held(text: str, mark: str) -> int:
    """How many characters at the end of ``text`` may be the beginning of ``mark``."""
    return next((size for size in range(len(mark) - 1, 0, -1) if text.endswith(mark[:size])), 0)
