"""Tool syntax that writes each argument by itself, as <parameter=name> value </parameter>, and not all of them as JSON.

Its texts are learnt from calls that the model's template renders:

    start before_name NAME no_arguments end                                                   no arguments
    start before_name NAME before_key KEY after_key VALUE after_last end                      one
    start before_name NAME before_key KEY after_key VALUE
                           between_arguments KEY after_key VALUE after_last end               two, and so on

Strings are written as they are, other values as JSON. The parser decides by the schema what a written value is: text
such as 7 or null may come back as something else than a string. So every sort of value that a parameter may have is
tried out with the parser, and a value that does not come back as it was cannot be written. A parameter of which no
value comes back is refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from agent_memory_core.errors import InvalidRequest
from agent_memory_core.messages import ToolCall
from agent_memory_core.structured.lark import Lark, escaped, json_of
from agent_memory_core.structured.tool_calls import ToolCallParser
from agent_memory_core.structured.tool_schema import (
    SchemaType,
    Tool,
    function_tool,
    schema_types,
    tool_name,
    tool_parameters,
)
from agent_memory_core.structured.tool_syntax import PROBE_NAMES, render_calls
from agent_memory_core.text.chat_template import ChatTemplate

_KEYS = ("probe_key", "probe_other")
_VALUES = ("probe_value", "probe_worth")
_RAW_TEXT = 'a "b" \\ é'

_CONFUSABLE_TEXTS = ("7", "-1.5", "true", '{"a": 1}', "[1]", _RAW_TEXT, "a\nb", "(1, 2)")
"""Strings that come back as themselves only from a parser that believes the schema's type."""

_NULL_WORDS = ("null", "none", "nil")
"""What some parsers read as null, even where a string belongs."""

_PLAIN_WORDS = ("word", "two words", "é")
_NO_PLAIN_WORD = "(?i:null|true|false|none|nan|infinity)"
_PLAIN_WORD = r"""/[^\W\d_]([^"'()\[\]{}<>]*[^\s"'()\[\]{}<>])?/"""
"""Text that no parser takes for a value of another type."""

_TRIMMED_TEXT = r"/(\S((?s:.*)\S)?)?/"
"""Any text without space at its ends, because parsers strip it."""

_SAMPLES: Mapping[str, Sequence[Any]] = {
    "integer": (7, -3),
    "number": (1.5, -7),
    "boolean": (True, False),
    "null": (None,),
    "object": ({"a": "b"},),
    "array": ([1, "b"],),
}
_NUMBERS = {
    "integer": r"/-?(0|[1-9][0-9]{0,14})/",
    "number": r"/-?(0|[1-9][0-9]{0,14})(\.[0-9]{1,15})?/",
}
_BOUNDS = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"})
_COMBINATORS = ("anyOf", "oneOf", "allOf", "$ref", "not", "if")


@dataclass(frozen=True, slots=True)
class XmlToolSyntax:
    """Calls that write each argument by itself. The module's docstring shows where each text stands."""

    parser: ToolCallParser
    """Reads such calls, and has the delimiters ``start`` and ``end``."""
    before_name: str
    no_arguments: str
    before_key: str
    after_key: str
    between_arguments: str
    after_last: str
    true: str
    """How the value true is written."""
    false: str
    """How the value false is written."""
    between_calls: str | None = None
    """The text between two calls; None where no second call can follow."""

    @property
    def value_end(self) -> str:
        """The text that ends every value, the last as well as the others; empty where there is none."""
        found = re.match(r"\s*(<[^<>\s]*>|[^\s<]+)", self.between_arguments)
        return found[0] if found and (self.after_last + self.parser.end).startswith(found[0]) else ""

    @property
    def reserved(self) -> list[str]:
        """Texts that cannot stand in a value, because they would end it."""
        texts = f"{self.between_arguments} {self.after_last} {self.parser.end} {self.parser.start}"
        return sorted(set(re.findall(r"<[^<>\s]+>?", texts) or texts.split()))

    def inside(self, name: str, arguments: Sequence[tuple[str, str]]) -> str:
        """The text between the delimiters of a call with these keys and written values."""
        if not arguments:
            return self.before_name + name + self.no_arguments
        written = self.between_arguments.join(key + self.after_key + value for key, value in arguments)
        return self.before_name + name + self.before_key + written + self.after_last

    def write(self, value: Any) -> str:
        """A value as it stands in a call."""
        if isinstance(value, bool):
            return self.true if value else self.false
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    def loses(self, span: str, calls: Sequence[ToolCall]) -> bool:
        """Whether ``span`` has more marks of this syntax than the calls read in it, so that a value was cut."""
        written = self.parser.end.join(
            self.inside(call.name, [(key, self.write(value)) for key, value in call.arguments.items()])
            for call in calls
        )
        marks = {*self.reserved, *re.findall(r"<[^<>\s]+", self.before_name)}
        is_longer = any(span.count(mark) > written.count(mark) for mark in marks)
        return is_longer or not re.fullmatch(_pattern_of_calls(self), span, re.DOTALL)

    def offering(self, tool: Tool) -> XmlToolSyntax:
        """The same syntax, whose parser is told of this tool."""
        return replace(self, parser=self.parser.offering(tool))

    def read_back(self, name: str, arguments: Sequence[tuple[str, str]]) -> Mapping[str, Any] | None:
        """The arguments that the parser reads in a call of the tool ``name``; None where it reads no such call."""
        try:
            calls = self.parser.parse(self.inside(name, arguments))
        except ValueError:
            return None
        return calls[0].arguments if len(calls) == 1 and calls[0].name == name else None

    def is_read_back(self) -> bool:
        """Whether the parser reads calls in this syntax, with up to two strings, as what they are."""
        name, properties = PROBE_NAMES[0], {key: {"type": "string"} for key in _KEYS}
        told = self.offering(function_tool(name, {"type": "object", "properties": properties}))
        pairs = [(key, _RAW_TEXT) for key in _KEYS]
        return all(told.read_back(name, pairs[:count]) == dict(pairs[:count]) for count in range(3))

    def rules(self, rule: str, tool: Tool, lark: Lark) -> list[str]:
        """See `ToolSyntax.rules`."""
        return _CallRules(self, rule, tool, lark).rules()


# Learning the syntax


def learn_xml_syntax(template: ChatTemplate, parser: ToolCallParser) -> XmlToolSyntax | None:
    """The syntax in which the template renders calls; None where it has no such syntax, or it is not read back."""
    try:
        syntax = _learn(template, parser)
    except ValueError:
        return None
    return syntax if syntax.value_end and syntax.is_read_back() else None


def _learn(template: ChatTemplate, parser: ToolCallParser) -> XmlToolSyntax:
    """Read the syntax off rendered calls.

    Raises:
        ValueError: a part of it is not found, or the template refuses the calls.
    """

    def rendered(arguments: Mapping[str, Any]) -> str:
        return _inside_of_first(render_calls(template, arguments), parser)

    before_name, rest = _split(rendered(dict(zip(_KEYS, _VALUES, strict=True))), PROBE_NAMES[0])
    before_key, rest = _split(rest, _KEYS[0])
    after_key, rest = _split(rest, _VALUES[0])
    between_arguments, rest = _split(rest, _KEYS[1])
    after_second_key, after_last = _split(rest, _VALUES[1])
    if after_second_key != after_key:
        raise ValueError("the two keys are not followed by the same text")

    def value(given: Any) -> str:
        text = rendered({_KEYS[0]: given})
        return _split(_split(text, _KEYS[0] + after_key)[1], after_last)[0]

    if value(_RAW_TEXT) != _RAW_TEXT:
        raise ValueError("strings are not written as they are")
    return XmlToolSyntax(
        parser,
        before_name=before_name,
        no_arguments=_split(rendered({}), PROBE_NAMES[0])[1],
        before_key=before_key,
        after_key=after_key,
        between_arguments=between_arguments,
        after_last=after_last,
        true=value(True),
        false=value(False),
        between_calls=_between_calls(template, parser),
    )


def _between_calls(template: ChatTemplate, parser: ToolCallParser) -> str | None:
    """The text between two calls; None where the second does not begin with the same delimiter."""
    first, second = PROBE_NAMES
    text = render_calls(template, {}, {})
    after_first = text.index(parser.end, text.index(first) + len(first)) + len(parser.end)
    between, delimiter, rest = text[after_first:].partition(parser.start)
    return between if delimiter and second in rest else None


def _inside_of_first(text: str, parser: ToolCallParser) -> str:
    """The text between the delimiters of the first call; without an end delimiter, all that follows the first."""
    name = text.index(PROBE_NAMES[0])
    begin = text.rindex(parser.start, 0, name) + len(parser.start)
    return text[begin : text.index(parser.end, name + len(PROBE_NAMES[0]))] if parser.end else text[begin:]


def _split(text: str, word: str) -> tuple[str, str]:
    at = text.index(word)
    return text[:at], text[at + len(word) :]


def _pattern_of_calls(syntax: XmlToolSyntax) -> str:
    """A pattern for calls in a syntax with any white space around its marks, and no text outside of values."""
    value_end = _spaced(syntax.value_end)
    value = f"(?:(?!{value_end}).)*{value_end}"
    after_value = syntax.between_arguments[len(syntax.value_end) :]
    first = f"{_spaced(syntax.before_key)}[^<>]+?{_spaced(syntax.after_key)}{value}"
    more = f"{_spaced(after_value)}[^<>]+?{_spaced(syntax.after_key)}{value}"
    ending = syntax.after_last.removeprefix(syntax.value_end)
    arguments = f"(?:{first}(?:{more})*{_spaced(ending)}|{_spaced(syntax.no_arguments)})"
    return rf"(?:{_spaced(syntax.before_name)}[^<>]+?{arguments}\s*)+"


def _spaced(text: str) -> str:
    return r"\s*" + "".join(re.escape(part) + r"\s*" for part in text.split())


# The rules of a grammar


class _CallRules:
    """The rules of one tool's calls. Their names begin with ``rule``."""

    def __init__(self, syntax: XmlToolSyntax, rule: str, tool: Tool, lark: Lark) -> None:
        self._rule, self._lark = rule, lark
        self._name, self._schema = tool_name(tool), tool_parameters(tool)
        self._syntax = syntax.offering(function_tool(self._name, self._schema))

    def rules(self) -> list[str]:
        """See `ToolSyntax.rules`.

        ``RULE_none_N`` is what follows where none of the first N parameters was written, ``RULE_some_N`` where one was.
        The second begins after the end of a value.
        """
        if combined := [word for word in _COMBINATORS if word in self._schema]:
            raise self._refusal(f"its parameters are combined by {combined[0]}")
        syntax, literal, rule = self._syntax, self._lark.literal, self._rule
        properties: Mapping[str, Any] = self._schema.get("properties") or {}
        required = self._schema.get("required") or ()
        lines = [f"{rule}: {literal(syntax.before_name + self._name)} {rule}_none_0"]
        for at, (key, schema) in enumerate(properties.items()):
            lines += self._parameter(at, key, optional=key not in required)
            lines += self._value(at, key, schema)
        end = syntax.parser.end
        lines.append(f"{rule}_none_{len(properties)}: {literal(syntax.no_arguments + end)}")
        if properties:
            after_value = (syntax.after_last + end)[len(syntax.value_end) :]
            lines.append(f"{rule}_some_{len(properties)}: {literal(after_value)}")
        return lines

    def _parameter(self, at: int, key: str, *, optional: bool) -> list[str]:
        """The rules for parameter number ``at``: where none was written before it, and where some was."""
        syntax, rule = self._syntax, self._rule
        written = f"{rule}_value_{at} {rule}_some_{at + 1}"
        before = {"none": syntax.before_key}
        if at > 0:
            before["some"] = syntax.between_arguments[len(syntax.value_end) :]
        lines = []
        for state, text in before.items():
            skipped = f" | {rule}_{state}_{at + 1}" if optional else ""
            begin = self._lark.literal(text + key + syntax.after_key)
            lines.append(f"{rule}_{state}_{at}: {begin} {written}{skipped}")
        return lines

    def _value(self, at: int, key: str, schema: Any) -> list[str]:
        """The rules for a value of parameter number ``at``, with the text that ends a value."""
        rule = f"{self._rule}_value_{at}"
        simple, nested, lines = [], [], []
        for found in schema_types(schema, self._schema):
            bounded = found.name in _NUMBERS and _BOUNDS & found.schema.keys()
            if bounded or found.name in ("object", "array"):
                nested += self._json(key, found)
            elif found.name == "string" and (text := self._text(key, found.schema)):
                simple.append(f"{rule.upper()}_TEXT")
                lines.append(f"{rule.upper()}_TEXT: {text}")
            elif found.name != "string":
                simple += self._listed(key, found)
        if not simple and not nested:
            raise self._refusal(f"parameter {key!r} with the schema {json.dumps(schema, default=str)}")
        choices, ending = self._ended(rule, simple) if simple else ([], [])
        return [f"{rule}: {' | '.join([*choices, *nested])}", *ending, *lines]

    def _ended(self, rule: str, simple: Sequence[str]) -> tuple[list[str], list[str]]:
        """Values that are one lexeme, which ends where the end of a value first appears: choices, and their rules."""
        value_end, terminal = self._syntax.value_end, rule.upper()
        values = "(" + " | ".join(dict.fromkeys(simple)) + ")"
        before = self._lark.before_special(value_end)
        if before is None:
            lexeme = f"{terminal}: {values} /{escaped(value_end)}/"
            return [f"{rule}_ended"], [lexeme, f"{rule}_ended[lazy]: {terminal}"]
        lead = f" /{escaped(before)}/" if before else ""
        special = self._lark.literal(value_end[len(before) :])
        return [f"{terminal} {special}"], [f"{terminal}: {values}{lead}"]

    def _json(self, key: str, found: SchemaType) -> list[str]:
        """Values that are written as JSON; empty where they do not come back."""
        if not self._come_back(key, _SAMPLES[found.name]):
            return []
        named = {word: self._schema[word] for word in ("$defs", "definitions") if word in self._schema}
        return [f"{json_of({**named, **found.schema})} {self._lark.literal(self._syntax.value_end)}"]

    def _listed(self, key: str, found: SchemaType) -> list[str]:
        """Numbers without bounds, and those values of a list that come back."""
        if found.name in _NUMBERS:
            return [_NUMBERS[found.name]] if self._come_back(key, _SAMPLES[found.name]) else []
        values = found.schema["enum"] if found.name == "enum" else _SAMPLES[found.name]
        texts = [self._syntax.write(value) for value in values if self._come_back(key, [value])]
        reserved = self._syntax.reserved
        return [
            json.dumps(text, ensure_ascii=False)
            for text in texts
            if text and not any(word in text for word in reserved)
        ]

    def _text(self, key: str, schema: Mapping[str, Any]) -> str:
        """A terminal for free text; empty where none comes back as a string, or its format cannot be held."""
        if "format" in schema or not (parts := self._strings(key)):
            return ""
        parts += [f"~/(?s:.*){escaped(word)}(?s:.*)/" for word in self._syntax.reserved]
        least, most = schema.get("minLength", 0), schema.get("maxLength", "")
        if least or most != "":
            parts.append(f"/(?s:.{{{least},{most}}})/")
        if "pattern" in schema:
            parts.append(_matched_anywhere(schema["pattern"]))
        return " & ".join(parts)

    def _strings(self, key: str) -> list[str]:
        """Expressions that all have to match a text for the parser to read it as a string; empty if none does."""
        if self._come_back(key, _CONFUSABLE_TEXTS):
            parts = [_TRIMMED_TEXT] if self._come_back(key, [""]) else [_TRIMMED_TEXT, "/(?s:.+)/"]
            lost = [word for word in _NULL_WORDS if not self._come_back(key, [word, word.title()])]
            return [*parts, f"~/(?i:{'|'.join(lost)})/"] if lost else parts
        return [_PLAIN_WORD, f"~/{_NO_PLAIN_WORD}/"] if self._come_back(key, _PLAIN_WORDS) else []

    def _come_back(self, key: str, values: Sequence[Any]) -> bool:
        """Whether the parser reads each of these values of a parameter as itself, and as of its own type."""
        for value in values:
            arguments = self._syntax.read_back(self._name, [(key, self._syntax.write(value))])
            if arguments is None or list(arguments) != [key]:
                return False
            found = arguments[key]
            if found != value or isinstance(found, bool) != isinstance(value, bool):
                return False
        return True

    def _refusal(self, why: str) -> InvalidRequest:
        return InvalidRequest(
            f"the tool {self._name!r} cannot be forced in this model's tool syntax: {why}. Leave tool_choice alone, "
            "or give the parameter a plain type."
        )


def _matched_anywhere(expression: str) -> str:
    """A JSON schema's ``pattern``, which may match anywhere in a text, as one that matches the whole text."""
    begins, ends = expression.startswith("^"), expression.endswith("$") and not expression.endswith(r"\$")
    inner = expression[begins : len(expression) - ends].replace("/", r"\/")
    return f"/{'' if begins else '(?s:.*)'}({inner}){'' if ends else '(?s:.*)'}/"
