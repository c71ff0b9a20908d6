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
        self._plain, self._tools = syntax, {tool_name(tool): tool for tool in tools}
        self._syntax = syntax
        self._head = _Head(syntax.before_name, list(self._tools), "")
        self._buffer, self._said = "", ""
        self._key: str | None = None
        self._written: str | None = None
        """What was handed out of the value that is being read; None where it has to be known whole."""
        self._step: Callable[[], str | None] = self._read_head
        self._strips: bool | None = None

    def feed(self, text: str) -> str:
        """See `CallReader.feed`."""
        self._buffer += text
        pieces = []
        while (piece := self._step()) is not None:
            pieces.append(piece)
        said = "".join(pieces)
        self._said += said
        return said

    def rest(self, arguments: Mapping[str, Any]) -> str | None:
        """See `CallReader.rest`."""
        whole = json.dumps(dict(arguments), ensure_ascii=False)
        return whole[len(self._said) :] if whole.startswith(self._said) else None

    # Each step takes what it can from the buffer and returns a piece, which may be empty; None where it needs more.

    def _read_head(self) -> str | None:
        found = self._head.find(self._buffer)
        after = self._buffer[found.end() :] if found else ""
        # A longer name may begin like this one.
        if found is None or not after or after[0].isalnum() or after[0] in "_-.":
            return None
        self.name, self._buffer = found[1], after
        self._syntax = self._plain.offering(self._tools[self.name])
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
        self._strips, self._written = self._text_of(self._key)
        self._step = self._read_value
        return (", " if again else "") + json.dumps(self._key, ensure_ascii=False) + ": "

    def _read_value(self) -> str | None:
        mark = self._syntax.value_end.lstrip()
        value, found, after = self._buffer.partition(mark)
        if found:
            self._buffer, self._step = after, self._read_key
            return self._end_of(value)
        if self._written is None:
            return None
        value = self._begun(value[: len(value) - _held(value, mark)].rstrip())
        if len(value) <= max(_LONGEST_WORD, len(self._written)):
            return None
        return self._string_up_to(value)

    def _string_up_to(self, value: str) -> str:
        assert self._written is not None
        quote = "" if self._written else '"'
        new, self._written = value[len(self._written) :], value
        return quote + _inner(new)

    def _end_of(self, value: str) -> str | None:
        """The rest of a value, as the parser reads it."""
        assert self._key is not None
        syntax = self._syntax
        before = _trailing_space(syntax.after_key)
        raw = value.removeprefix(before).removesuffix(_leading_space(syntax.value_end))
        read = syntax.read_back(self.name, [(self._key, raw)])
        found = (read or {}).get(self._key, _NOTHING)
        if found is _NOTHING:
            self._stop()
            return None
        if not self._written:
            return json.dumps(found, ensure_ascii=False)
        if not isinstance(found, str) or not found.startswith(self._written):
            self._stop()
            return None
        return _inner(found[len(self._written) :]) + '"'

    def _stop(self) -> None:
        """Hand out no more before the end of the call."""
        self._step = lambda: None

    def _begun(self, value: str) -> str:
        """The beginning of a string as the parser reads it."""
        text = value.removeprefix(_trailing_space(self._syntax.after_key))
        return text.lstrip() if self._strips else text

    def _text_of(self, key: str) -> tuple[bool, str | None]:
        """Whether the parser strips strings of this parameter; "" if strings come back as they are, else None."""
        schema = tool_parameters(self._tools[self.name])
        declared = (schema.get("properties") or {}).get(key)
        if declared is None or {found.name for found in schema_types(declared, schema)} != {"string"}:
            return False, None
        read = [(self._syntax.read_back(self.name, [(key, text)]) or {}).get(key) for text in _TRIED]
        if read == list(_TRIED):
            return False, ""
        return True, "" if read == [text.strip() for text in _TRIED] else None


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
