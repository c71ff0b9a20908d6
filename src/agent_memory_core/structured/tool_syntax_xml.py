"""Tool calls whose arguments are written one by one, as <parameter=name> value </parameter>, and not as JSON.

The letters are learnt from calls that the model's template renders, and believed where its own parser reads them back:

    start head NAME none end                                                          no arguments
    start head NAME first KEY middle VALUE last end                                   one
    start head NAME first KEY middle VALUE between KEY middle VALUE last end          two, and so on

Strings are written as they are, other values as JSON. What a written value is read as is for the parser to say, by
the schema: a text such as 7 or null may come back as something else than a string. So every sort of value that a
parameter may have is tried out with the parser, and what does not come back is not written; a parameter of which
nothing comes back is refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agent_memory_core.errors import InvalidRequest
from agent_memory_core.messages import ChatRequest, Message, ToolCall
from agent_memory_core.structured.tool_calls import ToolCallParser
from agent_memory_core.structured.tool_schema import kinds
from agent_memory_core.text.chat_template import ChatTemplate

_NAMES = ("probe_one", "probe_two")
_KEYS = ("probe_key", "probe_other")
_VALUES = ("probe_value", "probe_worth")
_RAW = 'a "b" \\ é'

_TEXTS = ("7", "-1.5", "true", '{"a": 1}', "[1]", _RAW, "a\nb", "(1, 2)")
"""Strings that come back as themselves only where the schema's type is believed."""

_NOTHING = ("null", "none", "nil")
"""What some parsers read as no value, also in a string's place."""

_WORDS = ("word", "two words", "é")
_NO_WORD = "(?i:null|true|false|none|nan|infinity)"
_WORD = r"""/[^\W\d_]([^"'()\[\]{}<>]*[^\s"'()\[\]{}<>])?/"""
"""Text that nobody takes for a value of another kind."""

_EDGED = r"/(\S((?s:.*)\S)?)?/"
"""Any text without space at its ends: parsers strip it."""

_SAMPLES: Mapping[str, Sequence[Any]] = {
    "integer": (7, -3),
    "number": (1.5, -7),
    "boolean": (True, False),
    "null": (None,),
    "object": ({"a": "b"},),
    "array": ([1, "b"],),
}
_PLAIN_NUMBERS = {
    "integer": r"/-?(0|[1-9][0-9]{0,14})/",
    "number": r"/-?(0|[1-9][0-9]{0,14})(\.[0-9]{1,15})?/",
}
_COMBINED = ("anyOf", "oneOf", "allOf", "$ref", "not", "if")


@dataclass(frozen=True, slots=True)
class ParameterForm:
    """The letters of a call; ``joint`` None means that no second call can follow. ``yes`` is how true is written."""

    start: str
    end: str
    head: str
    none: str
    first: str
    middle: str
    between: str
    last: str
    yes: str
    no: str
    joint: str | None = None

    @property
    def closer(self) -> str:
        """What ends a value, whatever follows it."""
        found = re.match(r"\s*(<[^<>\s]*>|[^\s<]+)", self.between)
        return found[0] if found and (self.last + self.end).startswith(found[0]) else ""

    @property
    def tags(self) -> list[str]:
        """Letters that may not stand in a value, for they would end it."""
        letters = f"{self.between} {self.last} {self.end} {self.start}"
        return sorted(set(re.findall(r"<[^<>\s]+>?", letters) or letters.split()))

    def inside(self, name: str, written: Sequence[tuple[str, str]]) -> str:
        """What stands between the delimiters of a call with these arguments."""
        if not written:
            return self.head + name + self.none
        arguments = self.between.join(key + self.middle + value for key, value in written)
        return self.head + name + self.first + arguments + self.last

    def write(self, value: Any) -> str:
        """A value as it stands in a call."""
        if isinstance(value, bool):
            return self.yes if value else self.no
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# Learning a form


def parameter_form(template: ChatTemplate, parser: ToolCallParser) -> ParameterForm | None:
    """The form that the template renders; None where it is no such form, or is not read back."""
    try:
        form = _learnt(template, parser.start, parser.end)
    except (InvalidRequest, ValueError):
        return None
    if not form.closer or not _is_read_back(form, parser):
        return None
    return form


def _is_read_back(form: ParameterForm, parser: ToolCallParser) -> bool:
    properties = {key: {"type": "string"} for key in _KEYS}
    parser = parser.offering(_tool(_NAMES[0], {"type": "object", "properties": properties}))
    pairs = [(key, _RAW) for key in _KEYS]
    return all(
        read(parser, form, _NAMES[0], pairs[:count]) == {key: _RAW for key, _ in pairs[:count]}
        for count in range(3)
    )


def _learnt(template: ChatTemplate, start: str, end: str) -> ParameterForm:
    """Read a form off the rendered calls; ValueError where a piece of it is not found."""
    two = _cut(_rendered(template, dict(zip(_KEYS, _VALUES, strict=True))), start, end)
    head, rest = _split(two, _NAMES[0])
    first, rest = _split(rest, _KEYS[0])
    middle, rest = _split(rest, _VALUES[0])
    between, rest = _split(rest, _KEYS[1])
    again, last = _split(rest, _VALUES[1])
    if again != middle:
        raise ValueError("keys and values are not joined alike")

    def alone(value: Any) -> str:
        text = _cut(_rendered(template, {_KEYS[0]: value}), start, end)
        return _split(_split(text, _KEYS[0] + middle)[1], last)[0]

    if alone(_RAW) != _RAW:
        raise ValueError("strings are not written as they are")
    _, none = _split(_cut(_rendered(template, {}), start, end), _NAMES[0])
    yes, no = alone(True), alone(False)
    joint = _joint(template, start, end)
    return ParameterForm(start, end, head, none, first, middle, between, last, yes, no, joint)


def _joint(template: ChatTemplate, start: str, end: str) -> str | None:
    """What stands between two calls, where the second one begins with the same mark."""
    text = _rendered(template, {}, {})
    before = text.index(_NAMES[0])
    behind = text.index(end, before + len(_NAMES[0])) + len(end)
    joint, delimiter, rest = text[behind:].partition(start)
    return joint if delimiter and _NAMES[1] in rest else None


def _rendered(template: ChatTemplate, *arguments: Mapping[str, Any]) -> str:
    calls = tuple(
        ToolCall(name, given, f"call_{name}") for name, given in zip(_NAMES, arguments, strict=False)
    )
    request = ChatRequest((Message("user", "ask"), Message("assistant", "", tool_calls=calls)))
    return template.render(request, generation_prompt=False)


def _cut(text: str, start: str, end: str) -> str:
    """What stands between the delimiters of the first call; an empty end delimiter is the message's end."""
    name = text.index(_NAMES[0])
    begin = text.rindex(start, 0, name) + len(start)
    return text[begin : text.index(end, name + len(_NAMES[0]))] if end else text[begin:]


def _split(text: str, word: str) -> tuple[str, str]:
    at = text.index(word)
    return text[:at], text[at + len(word) :]


def _tool(name: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def read(parser: ToolCallParser, form: ParameterForm, name: str, written: Sequence[tuple[str, str]]) -> Any:
    """The arguments that the model's parser reads in a call of the tool ``name``; None where it reads another call."""
    try:
        calls = parser.parse(form.inside(name, written))
    except ValueError:
        return None
    return calls[0].arguments if len(calls) == 1 and calls[0].name == name else None


# Rules of a grammar


@dataclass(frozen=True, slots=True)
class Letters:
    """What a grammar's text is made with.

    Args:
        literal: text as strings and special tokens.
        schema: a JSON schema as a part of a rule.
        special: finds the first special token in a text.
    """

    literal: Callable[[str], str]
    schema: Callable[[Mapping[str, Any]], str]
    special: Callable[[str], re.Match[str] | None]


class ParameterRules:
    """The rules of one tool's calls, named by ``prefix``."""

    def __init__(
        self,
        form: ParameterForm,
        parser: ToolCallParser,
        letters: Letters,
        tool: Mapping[str, Any],
        prefix: str,
    ) -> None:
        function = tool.get("function", tool)
        self._form, self._letters, self._prefix = form, letters, prefix
        self._name: str = function["name"]
        self._schema: Mapping[str, Any] = function.get("parameters") or {}
        self._parser = parser.offering(_tool(self._name, self._schema))

    def rules(self) -> list[str]:
        """Rules for ``prefix``: the call behind its start delimiter, with its end mark.

        Raises:
            InvalidRequest: a parameter cannot be written so that it is read back.
        """
        if combined := [word for word in _COMBINED if word in self._schema]:
            raise self._refused(f"its parameters are combined by {combined[0]}")
        form, literal = self._form, self._letters.literal
        properties: Mapping[str, Any] = self._schema.get("properties") or {}
        required = self._schema.get("required") or ()
        lines = [f"{self._prefix}: {literal(form.head + self._name)} {self._prefix}_none_0"]
        for at, (key, schema) in enumerate(properties.items()):
            lines += self._step(at, key, optional=key not in required)
            lines += self._value(at, key, schema)
        end = len(properties)
        rest = (form.last + form.end)[len(form.closer) :]
        lines.append(f"{self._prefix}_none_{end}: {literal(form.none + form.end)}")
        if properties:
            lines.append(f"{self._prefix}_some_{end}: {literal(rest)}")
        return lines

    def _step(self, at: int, key: str, *, optional: bool) -> list[str]:
        """From parameter ``at`` on: with none written so far, and with some."""
        form, name, literal = self._form, self._prefix, self._letters.literal
        written = f"{name}_value_{at} {name}_some_{at + 1}"
        lines = []
        for state, before in (("none", form.first), ("some", form.between[len(form.closer) :])):
            if state == "some" and at == 0:
                continue
            skipped = f" | {name}_{state}_{at + 1}" if optional else ""
            lines.append(f"{name}_{state}_{at}: {literal(before + key + form.middle)} {written}{skipped}")
        return lines

    def _value(self, at: int, key: str, schema: Any) -> list[str]:
        """A value of the parameter with what closes it."""
        name = f"{self._prefix}_value_{at}"
        simple, nested, lines = [], [], []
        for kind, part in kinds(schema, self._schema):
            if kind in ("object", "array") or (kind in _PLAIN_NUMBERS and _is_bounded(part)):
                nested += self._nested(key, kind, part)
            elif kind == "string" and (text := self._text(key, part)):
                simple.append(f"{name.upper()}_TEXT")
                lines.append(f"{name.upper()}_TEXT: {text}")
            elif kind != "string":
                simple += self._words(key, kind, part)
        if not simple and not nested:
            raise self._refused(f"parameter {key!r} with the schema {json.dumps(schema, default=str)}")
        closed, ends = self._closed(name, simple)
        return [f"{name}: {' | '.join([*ends, *nested])}", *closed, *lines]

    def _closed(self, name: str, simple: Sequence[str]) -> tuple[list[str], list[str]]:
        """Values that are one lexeme, closed: text ends where the closing letters first appear."""
        if not simple:
            return [], []
        closer, literal = self._form.closer, self._letters.literal
        values = "(" + " | ".join(dict.fromkeys(simple)) + ")"
        special = self._letters.special(closer)
        if special is None:
            return [
                f"{name.upper()}: {values} /{pattern(closer)}/",
                f"{name}_closed[lazy]: {name.upper()}",
            ], [f"{name}_closed"]
        lead = f" /{pattern(closer[: special.start()])}/" if special.start() else ""
        return [f"{name.upper()}: {values}{lead}"], [
            f"{name.upper()} {literal(closer[special.start() :])}",
        ]

    def _nested(self, key: str, kind: str, schema: Mapping[str, Any]) -> list[str]:
        if not self._come_back(key, _SAMPLES[kind]):
            return []
        named = {word: self._schema[word] for word in ("$defs", "definitions") if word in self._schema}
        return [f"{self._letters.schema({**named, **schema})} {self._letters.literal(self._form.closer)}"]

    def _words(self, key: str, kind: str, schema: Mapping[str, Any]) -> list[str]:
        """Values that can be listed, or are numbers."""
        if kind in _PLAIN_NUMBERS:
            return [_PLAIN_NUMBERS[kind]] if self._come_back(key, _SAMPLES[kind]) else []
        values = schema["enum"] if kind == "enum" else _SAMPLES[kind]
        written = [self._form.write(value) for value in values if self._come_back(key, [value])]
        return [
            json.dumps(text, ensure_ascii=False)
            for text in written
            if text and not any(tag in text for tag in self._form.tags)
        ]

    def _text(self, key: str, schema: Mapping[str, Any]) -> str:
        """A terminal for free text; empty where none comes back as a string, or its format cannot be held."""
        if "format" in schema:
            return ""
        if self._come_back(key, _TEXTS):
            parts = [_EDGED] if self._come_back(key, [""]) else [_EDGED, "/(?s:.+)/"]
            lost = [word for word in _NOTHING if not self._come_back(key, [word, word.title()])]
            parts += [f"~/(?i:{'|'.join(lost)})/"] if lost else []
        elif self._come_back(key, _WORDS):
            parts = [_WORD, f"~/{_NO_WORD}/"]
        else:
            return ""
        parts += [f"~/(?s:.*){pattern(tag)}(?s:.*)/" for tag in self._form.tags]
        least, most = schema.get("minLength", 0), schema.get("maxLength", "")
        if least or most != "":
            parts.append(f"/(?s:.{{{least},{most}}})/")
        if "pattern" in schema:
            parts.append(_searched(schema["pattern"]))
        return " & ".join(parts)

    def _come_back(self, key: str, values: Sequence[Any]) -> bool:
        """Whether the parser reads each of these values of a parameter as itself, and as of its own type."""
        for value in values:
            found = read(self._parser, self._form, self._name, [(key, self._form.write(value))])
            if not isinstance(found, dict) or list(found) != [key]:
                return False
            if found[key] != value or isinstance(found[key], bool) != isinstance(value, bool):
                return False
        return True

    def _refused(self, why: str) -> InvalidRequest:
        return InvalidRequest(
            f"the tool {self._name!r} cannot be forced in this model's tool syntax: {why}. Leave tool_choice alone, "
            "or give the parameter a plain type."
        )


def _is_bounded(schema: Mapping[str, Any]) -> bool:
    return bool({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"} & schema.keys())


def pattern(text: str) -> str:
    """``text`` as a regular expression between slashes."""
    return re.escape(text).replace("\\\n", r"\n").replace("/", r"\/")


def _searched(expression: str) -> str:
    """A JSON schema's ``pattern``, which may match anywhere, as one that matches the whole."""
    begins, ends = expression.startswith("^"), expression.endswith("$") and not expression.endswith(r"\$")
    inner = expression[begins : len(expression) - ends].replace("/", r"\/")
    return f"/{'' if begins else '(?s:.*)'}({inner}){'' if ends else '(?s:.*)'}/"
