"""A request's form (a JSON schema, a tool it has to call) as masks over the model's next token.

A form becomes one grammar in llguidance's Lark dialect, compiled once and copied for each request. JSON is written
as chat templates write it (", " and ": " between items, properties in the schema's order), and a tool call in the
very letters in which the model's template renders one, so that the next prompt repeats what was generated. An
object that names its properties has no others unless its schema says so.

    answer       the schema's JSON, or calls instead where tools are offered too
    calls        one forced call, or several where tool_choice is "required" and parallel calls are allowed
    free         any text, and at most one call at its end: parallel_tool_calls off
    plain        any text but the delimiter that begins a call: tool_choice "none"; the tools stay in the prompt, so
                 that it begins as the session's other prompts do

Calls whose arguments are written one by one and not as JSON have rules of their own, see `parameter_form`.

A think block may come before each of them. Marks that are one token of the vocabulary are matched as that token and
can then not occur in the JSON itself; where they are spelled in letters, or a model spells them so inside a string,
the call is cut there and reported as invalid. llguidance is an optional extra.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tool_parsers import json_tools

from agent_memory_core.errors import InvalidRequest
from agent_memory_core.messages import ChatRequest, Message, ToolCall
from agent_memory_core.structured.mask import Ban, LogitsProcessor, Mask
from agent_memory_core.structured.tool_calls import ToolCallParser, model_parser
from agent_memory_core.structured.tool_syntax_xml import (
    Letters,
    ParameterForm,
    ParameterRules,
    parameter_form,
)
from agent_memory_core.text.chat_template import ChatTemplate
from agent_memory_core.text.detokenizer import starts_in_reasoning
from agent_memory_core.text.token_text import Prompt

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

KEPT = 64
"""How many compiled grammars a model keeps."""

_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_SPACE = r"/\n{0,2}/"
_SPEAKS_OF_OTHERS = frozenset({"additionalProperties", "patternProperties"})
_PARTS = frozenset({"$ref", "allOf", "anyOf", "oneOf", "if"})
_PROBE = '{"x": 1}'


@dataclass(frozen=True, slots=True)
class CallForm:
    """The letters of a tool call: start, head, name, middle, arguments as JSON, tail, end; joint between two.

    ``joint`` None means that no second call can follow.
    """

    start: str = json_tools.tool_call_start
    head: str = '\n{"name": "'
    middle: str = '", "arguments": '
    tail: str = "}\n"
    end: str = json_tools.tool_call_end
    joint: str | None = "\n"

    def inside(self, name: str, arguments: str) -> str:
        """What stands between the delimiters."""
        return self.head + name + self.middle + arguments + self.tail


def call_form(tokenizer: TokenizerWrapper, template: ChatTemplate) -> CallForm | ParameterForm | None:
    """How the model's template writes a call, else the <tool_call> JSON convention; None if neither is read back."""
    parser = model_parser(tokenizer)
    convention = CallForm(start=parser.start, end=parser.end)
    rendered = _rendered_form(template, convention)
    if rendered is not None and _is_read(parser, rendered):
        return rendered
    one_by_one = parameter_form(template, parser)
    if one_by_one is not None:
        return one_by_one
    return convention if _is_read(parser, convention) else None


def _rendered_form(template: ChatTemplate, delimiters: CallForm) -> CallForm | None:
    """The form found in two calls that the template renders."""
    names = ("probe_one", "probe_two")
    calls = tuple(ToolCall(name, {"x": 1}, f"call_{name}") for name in names)
    request = ChatRequest((Message("user", "ask"), Message("assistant", "", tool_calls=calls)))
    try:
        text = template.render(request, generation_prompt=False)
    except InvalidRequest:
        return None
    head, start = text.find(names[0]), text.rfind(delimiters.start, 0, max(0, text.find(names[0])))
    arguments = text.find(_PROBE, head)
    end = text.find(delimiters.end, arguments + len(_PROBE))
    if min(head, start, arguments, end) < 0:
        return None
    form = replace(
        delimiters,
        head=text[start + len(delimiters.start) : head],
        middle=text[head + len(names[0]) : arguments],
        tail=text[arguments + len(_PROBE) : end],
        joint=None,
    )
    rest = text[end + len(form.end) :]
    joint, found, _ = rest.partition(form.start + form.inside(names[1], _PROBE) + form.end)
    return replace(form, joint=joint) if found else form


def _is_read(parser: ToolCallParser, form: CallForm) -> bool:
    """Whether the model's parser reads a call of this form as what it is."""
    tool = {"type": "function", "function": {"name": "probe", "parameters": {"type": "object"}}}
    try:
        calls = parser.offering(tool).parse(form.inside("probe", _PROBE))
    except ValueError:
        return False
    return [(call.name, call.arguments) for call in calls] == [("probe", {"x": 1})]


@dataclass(frozen=True, slots=True)
class Grammar:
    """A compiled form. ``matcher`` stands at the beginning and is copied for each sequence."""

    text: str
    matcher: LLMatcher

    def mask(self, prompt_tokens: int) -> Mask:
        """The processor of a sequence whose prompt has so many tokens."""
        return Mask(self.matcher.deep_copy(), prompt_tokens)


class Grammars:
    """The forms of one model's requests. Not for several threads at once."""

    def __init__(self, tokenizer: TokenizerWrapper, template: ChatTemplate) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._parser = model_parser(tokenizer)
        self._start, self._end = self._parser.start, self._parser.end
        delimiters = (self._start, self._end, tokenizer.think_start, tokenizer.think_end)
        added = tokenizer.added_tokens_decoder.items()
        self._delimiters: dict[str, int] = {str(t): i for i, t in added if str(t) in delimiters}
        self._vocabulary: LLTokenizer | None = None
        self._special: dict[str, int] = {}
        self._specials = re.compile("(?!)")
        self._form: CallForm | ParameterForm | None = None
        self._compiled: OrderedDict[str, Grammar] = OrderedDict()

    def processors(self, request: ChatRequest, prompt: Prompt) -> list[LogitsProcessor]:
        """What holds the answer to ``request`` to its form; nothing where it is free.

        Raises:
            InvalidRequest: llguidance is missing, or it cannot hold this model to this form.
        """
        choice = request.tool_choice or "auto"
        if request.response_schema is None:
            if not request.tools or (choice == "auto" and request.parallel_tool_calls):
                return []
            if choice == "none" and self._start in self._delimiters:
                return [Ban(self._delimiters[self._start])]
        return [self.grammar(request, prompt.text).mask(len(prompt.token_ids))]

    def grammar(self, request: ChatRequest, prompt: str) -> Grammar:
        """The compiled form of ``request``, whose prompt ends as ``prompt`` does.

        Raises:
            InvalidRequest: as `processors`.
        """
        if self._tokenizer.response_transitions or self._tokenizer.structural_markers:
            raise InvalidRequest("this model answers in channels, which cannot be held to a form yet.")
        vocabulary = self._vocabulary = self._vocabulary or self._read_vocabulary()
        text = "\n".join(["%llguidance {}", *self._thinking(prompt), *self._body(request)])
        grammar = self._compiled.pop(text, None) or Grammar(text, _compile(vocabulary, text, request))
        self._compiled[text] = grammar
        if len(self._compiled) > KEPT:
            self._compiled.popitem(last=False)
        return grammar

    def _read_vocabulary(self) -> LLTokenizer:
        vocabulary = _vocabulary(self._tokenizer, self._delimiters)
        added = self._tokenizer.added_tokens_decoder.items()
        self._special = {str(t): i for i, t in added if vocabulary.is_special_token(i)}
        longest_first = sorted(self._special, key=len, reverse=True)
        self._specials = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
        return vocabulary

    # The grammar's text

    def _body(self, request: ChatRequest) -> list[str]:
        choice, schema = request.tool_choice or "auto", request.response_schema
        calls = self._calls(request, choice) if request.tools and choice != "none" else []
        if schema is not None:
            answer = f"answer: {_schema(schema or {'type': 'object'})}"
            return [f"body: answer{' | calls' if calls else ''}", answer, *calls]
        if choice not in ("auto", "none"):
            return ["body: calls", *calls]
        plain = f"PLAIN: /(?s:.+)/ & ~/(?s:.*){_escaped(self._start)}(?s:.*)/"
        if choice == "none":
            return ["body: PLAIN?", plain]
        return ["body: PLAIN? | opening call", plain, self._until("opening", self._start), *calls]

    def _calls(self, request: ChatRequest, choice: str) -> list[str]:
        """Rules for ``calls`` and, behind its start delimiter, one ``call``."""
        self._form = self._form or call_form(self._tokenizer, self._template)
        try:
            call, joint = self._held_call(self._form, request, choice)
        except InvalidRequest:
            if choice != "auto":
                raise
            call, joint = [self._until("call", self._end) if self._end else "call: /(?s:.+)/"], None
        several = joint is not None and request.parallel_tool_calls and choice in ("auto", "required")
        start = self._literal(self._start)
        more = f" ({self._literal(joint or '')} {start} call)*" if several else ""
        return [f"calls: {start} call{more}", *call]

    def _held_call(
        self, form: CallForm | ParameterForm | None, request: ChatRequest, choice: str
    ) -> tuple[list[str], str | None]:
        """Rules for a ``call`` of one of the tools of this choice, in its own form, and what joins two."""
        if form is None:
            raise InvalidRequest("this model's tool syntax cannot be forced yet: leave tool_choice alone.")
        tools = [tool for tool in request.tools if choice in ("auto", "required", tool_name(tool))]
        rules = ["call: " + " | ".join(f"call_{i}" for i in range(len(tools)))]
        for i, tool in enumerate(tools):
            rules += self._call_of(tool, form, f"call_{i}")
        return rules, form.joint

    def _call_of(self, tool: Mapping[str, Any], form: CallForm | ParameterForm, rule: str) -> list[str]:
        if isinstance(form, ParameterForm):
            letters = Letters(self._literal, _schema, self._specials.search)
            return ParameterRules(form, self._parser, letters, tool, rule).rules()
        name = json.dumps(tool_name(tool), ensure_ascii=False)[1:-1]
        before, after = self._literal(form.head + name + form.middle), self._literal(form.tail + form.end)
        return [f"{rule}: {before} {_schema(_parameters(tool))} {after}"]

    def _thinking(self, prompt: str) -> list[str]:
        """A block that the template opened has to be closed; else the model may write one, unless it is closed."""
        tokenizer = self._tokenizer
        if not tokenizer.has_thinking or prompt.rstrip().endswith(tokenizer.think_end):
            return ["start: body"]
        thought = self._until("thought", tokenizer.think_end)
        if starts_in_reasoning(tokenizer, prompt):
            return [f"start: thought {_SPACE} body", thought]
        return [f"start: ({self._literal(tokenizer.think_start)} thought {_SPACE})? body", thought]

    def _literal(self, text: str) -> str:
        """``text`` as strings and, where it spells special tokens, those tokens."""
        said = [
            f"<[{self._special[part]}]>" if part in self._special else json.dumps(part, ensure_ascii=False)
            for part in self._specials.split(text)
            if part
        ]
        return " ".join(said) or '""'

    def _until(self, rule: str, delimiter: str) -> str:
        """A rule for any text up to the end of ``delimiter``."""
        if self._specials.match(delimiter):
            return f"{rule}: /(?s:.+)/? {self._literal(delimiter)}"
        return f"{rule}[lazy]: /(?s:.*){_escaped(delimiter)}/"


def tool_name(tool: Mapping[str, Any]) -> str:
    """The name in an OpenAI function schema."""
    return str(tool.get("function", tool).get("name"))


def _parameters(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"type": "object", **(tool.get("function", tool).get("parameters") or {"properties": {}})}


def _escaped(text: str) -> str:
    return re.escape(text).replace("/", r"\/")


def _schema(schema: Mapping[str, Any]) -> str:
    """A JSON schema as a part of a rule."""
    try:
        closed = schema if _conjoins(schema) else _closed(schema)
        return "%json " + json.dumps({**closed, "x-guidance": _JSON_STYLE})
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"the schema is not JSON: {error}") from error


def _closed(schema: Any) -> Any:
    """``schema`` with no further properties where an object lists its own and does not speak of others.

    What fits the result fits ``schema``; without it, weak models invent properties without end.
    """
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, Mapping):
        return schema
    closed: dict[str, Any] = {}
    for key, value in schema.items():
        if key in ("properties", "$defs", "definitions") and isinstance(value, Mapping):
            value = {name: _closed(part) for name, part in value.items()}
        elif key in ("items", "additionalProperties", "prefixItems", "anyOf", "oneOf", "allOf"):
            value = _closed(value)
        closed[key] = value
    if "properties" in schema and not _SPEAKS_OF_OTHERS & schema.keys():
        closed["additionalProperties"] = False
    return closed


def _conjoins(schema: Any) -> bool:
    """Whether a value may have to fit several schemas at once: closed, each would forbid the others' properties."""
    if isinstance(schema, Mapping):
        every = schema.get("allOf")
        if isinstance(every, list) and len(every) > 1:
            return True
        return bool("properties" in schema and _PARTS & schema.keys()) or any(map(_conjoins, schema.values()))
    return isinstance(schema, list) and any(map(_conjoins, schema))


# llguidance


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise InvalidRequest(
            "holding an answer to a schema or a tool needs llguidance: install 'agent-memory-mlx[grammar]'."
        ) from error
    return llguidance


def _vocabulary(tokenizer: TokenizerWrapper, delimiters: Mapping[str, int]) -> LLTokenizer:
    """The tokenizer as llguidance knows it, with the delimiters as tokens that no text spells."""
    llguidance = _llguidance()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InvalidRequest(
            "this model's tokenizer is not of the fast kind, so it cannot be held to a form."
        )
    description = json.loads(backend.to_str()) | {"padding": None, "truncation": None}
    for token in description["added_tokens"]:
        token["special"] = token["special"] or token["id"] in delimiters.values()
    try:
        made: LLTokenizer = llguidance.LLTokenizer(
            json.dumps(description), eos_token=sorted(tokenizer.eos_token_ids)
        )
    except ValueError as error:
        raise InvalidRequest(f"this model's tokenizer cannot be held to a form: {error}") from error
    return made


def _compile(vocabulary: LLTokenizer, text: str, request: ChatRequest) -> LLMatcher:
    matcher: LLMatcher = _llguidance().LLMatcher(vocabulary, text, log_level=0)
    if matcher.is_error():
        raise InvalidRequest(
            f"answers cannot be held to {_whose_fault(request)}: {_reason(matcher.get_error())}."
        )
    return matcher


def _whose_fault(request: ChatRequest) -> str:
    """Which schema of a request cannot be compiled."""
    check = _llguidance().LLMatcher.validate_grammar
    for tool in request.tools:
        if _reason(check(f"start: {_schema(_parameters(tool))}")):
            return f"the parameters of tool {tool_name(tool)!r}"
    return "response_schema" if request.response_schema is not None else "the tools' form"


def _reason(error: str) -> str:
    """What llguidance says went wrong, without where, and without the lines of our grammar that follow."""
    words = re.sub(r"^at \d+\(\d+\): ", "", re.split(r"\n\s*\d+ \| ", error)[0])
    return " ".join(words.removeprefix("WARNING:").split())
