"""From a request to a grammar, which decides at each step what tokens the model may write next.

A response schema, or a tool that has to be called, becomes one grammar in llguidance's dialect of Lark. It is compiled
once and copied for each request. Where a request does not leave the answer to the model, the answer is

    response_schema        JSON that fits the schema, or tool calls where tools are offered too
    tool_choice a name     one call of that tool
    tool_choice required   one call; several where parallel calls are allowed
    parallel calls off     any text, and at most one call at its end
    tool_choice auto       any text; a call in it is held from the moment that its start delimiter is sampled, and
                           text before it costs nothing
    tool_choice none       any text in which no call begins; the tools stay in the prompt, so that the prompt begins
                           as the other prompts of the session do
    no tools               the same where the conversation has calls that the model could imitate; else any text, of
                           which nothing is read as a call

A think block may precede each of them. Calls are written exactly as the model's template renders them, see
`tool_syntax`. A delimiter that is one token of the vocabulary is matched as that token, and can then not occur inside
JSON. A delimiter that is spelled in several tokens can: a model that spells it inside a string ends the call there, and
the call is reported as invalid. llguidance is an optional extra.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from agent_memory_core.errors import InvalidRequest
from agent_memory_core.messages import ChatRequest
from agent_memory_core.structured.call_stream import call_reader
from agent_memory_core.structured.lark import Lark, escaped, json_of
from agent_memory_core.structured.mask import (
    Ban,
    CallMask,
    LogitsProcessor,
    Mask,
    SpelledCallMask,
    TokenCallMask,
)
from agent_memory_core.structured.tool_calls import ToolCallParser, model_parser, parser_for
from agent_memory_core.structured.tool_schema import tool_name
from agent_memory_core.structured.tool_syntax import (
    JsonToolSyntax,
    ToolSyntax,
    arguments_schema,
    learn_json_syntax,
)
from agent_memory_core.structured.tool_syntax_xml import XmlToolSyntax, learn_xml_syntax
from agent_memory_core.text.chat_template import ChatTemplate
from agent_memory_core.text.detokenizer import starts_in_reasoning
from agent_memory_core.text.token_text import Prompt

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_GRAMMARS = 64
"""How many compiled grammars are kept for a model."""

_SPACE = r"/\n{0,2}/"


def find_tool_syntax(template: ChatTemplate, parser: ToolCallParser) -> ToolSyntax | None:
    """The syntax in which the model's template writes calls, else the <tool_call> JSON convention.

    None if the model's parser reads back neither.
    """
    rendered = learn_json_syntax(template, parser)
    if rendered is not None and rendered.is_read_back():
        return rendered
    convention = JsonToolSyntax(parser)
    return learn_xml_syntax(template, parser) or (convention if convention.is_read_back() else None)


@dataclass(frozen=True, slots=True)
class Grammar:
    """A compiled grammar."""

    text: str
    """The grammar in Lark."""
    matcher: LLMatcher
    """Stands at the beginning of an answer, and is copied for each sequence."""

    def mask(self, prompt_tokens: int) -> Mask:
        """The logits processor of a sequence whose prompt has this many tokens."""
        return Mask(self.matcher.deep_copy(), prompt_tokens)


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """A model's tokens, as grammars name them."""

    tokens: LLTokenizer
    lark: Lark


class Grammars:
    """Makes the grammars of one model's requests. Not for several threads at once."""

    def __init__(self, tokenizer: TokenizerWrapper, template: ChatTemplate) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._parser = model_parser(tokenizer)
        delimiters = (self._parser.start, self._parser.end, tokenizer.think_start, tokenizer.think_end)
        added = {str(token): token_id for token_id, token in tokenizer.added_tokens_decoder.items()}
        self._delimiter_ids = {text: token_id for text, token_id in added.items() if text in delimiters}
        self._vocabulary: _Vocabulary | None = None
        self._syntax: ToolSyntax | None = None
        self._learnt = False
        self._compiled: OrderedDict[str, Grammar] = OrderedDict()

    def processors(self, request: ChatRequest, prompt: Prompt) -> list[LogitsProcessor]:
        """The logits processors that constrain the answer to ``request``; none where the model answers as it likes.

        Raises:
            InvalidRequest: llguidance is missing, or it cannot constrain this model's answers as requested.
        """
        if request.response_schema is None:
            choice = _choice(request)
            if choice == "auto" and request.parallel_tool_calls:
                return []
            if not request.tools and not any(message.tool_calls for message in request.messages):
                # A model imitates the calls of its conversation; without any, nothing is changed or waited for.
                return []
            if choice == "none" and self._parser.start in self._delimiter_ids:
                return [Ban(self._delimiter_ids[self._parser.start])]
            if not request.tools and not self._can_be_held:
                return []
        return [self.grammar(request, prompt.text).mask(len(prompt.token_ids))]

    def call_mask(self, request: ChatRequest, prompt: Prompt) -> CallMask | None:
        """What holds the calls in an answer that may be text or calls, as the model likes; None where nothing can.

        That is so where llguidance is missing, and where a tool cannot be written in the model's syntax.
        """
        free = _choice(request) == "auto" and request.response_schema is None and request.parallel_tool_calls
        if not self._parser.start or not free or not self._can_be_held:
            return None
        try:
            grammar = self._grammar_of_call(request)
        except InvalidRequest:
            return None
        start = self._delimiter_ids.get(self._parser.start)
        if start is not None:
            return TokenCallMask(start, grammar.mask, len(prompt.token_ids))
        exact = self._template.tokenizer
        return SpelledCallMask(
            self._parser.start, exact.text_inside, exact.tokenize, grammar.mask, len(prompt.token_ids)
        )

    def _grammar_of_call(self, request: ChatRequest) -> Grammar:
        """The compiled grammar of one call, from after its start delimiter to its end."""
        self._vocabulary = self._vocabulary or _read_vocabulary(self._tokenizer, self._delimiter_ids.values())
        rules, _ = self._constrained_call(request, "auto", self._vocabulary.lark)
        return self._compiled_of(["start: call", *rules], request)

    def call_parser(self, request: ChatRequest) -> ToolCallParser | None:
        """What parses the calls in the answer to ``request``; None where no tool may be called, so that all is text."""
        parser = parser_for(self._tokenizer, request)
        if parser is None:
            return None
        syntax = self._tool_syntax()
        loses = syntax.loses if isinstance(syntax, XmlToolSyntax) else None
        return replace(parser, loses=loses, read=partial(call_reader, syntax, request.tools))

    def _tool_syntax(self) -> ToolSyntax | None:
        """The syntax of this model's calls, learnt once; None where it has none that is known."""
        if not self._learnt:
            self._syntax, self._learnt = find_tool_syntax(self._template, self._parser), True
        return self._syntax

    @property
    def _can_be_held(self) -> bool:
        """Whether this model's answers can be held to a grammar."""
        fast = getattr(self._tokenizer, "backend_tokenizer", None) is not None
        return fast and not self._answers_in_channels and find_spec("llguidance") is not None

    @property
    def _answers_in_channels(self) -> bool:
        return bool(self._tokenizer.response_transitions or self._tokenizer.structural_markers)

    def grammar(self, request: ChatRequest, prompt: str) -> Grammar:
        """The compiled grammar of the answer to ``request``, whose prompt ends as ``prompt`` does.

        Raises:
            InvalidRequest: see `processors`.
        """
        if self._answers_in_channels:
            raise InvalidRequest(
                "this model answers in channels, which cannot be held to a schema or a tool yet."
            )
        self._vocabulary = self._vocabulary or _read_vocabulary(self._tokenizer, self._delimiter_ids.values())
        lark = self._vocabulary.lark
        return self._compiled_of([*self._start(prompt, lark), *self._body(request, lark)], request)

    def _compiled_of(self, rules: Sequence[str], request: ChatRequest) -> Grammar:
        """The grammar of these rules, compiled once."""
        assert self._vocabulary is not None
        text = "\n".join(["%llguidance {}", *rules])
        grammar = self._compiled.pop(text, None) or _compile(self._vocabulary, text, request)
        self._compiled[text] = grammar
        if len(self._compiled) > MAX_GRAMMARS:
            self._compiled.popitem(last=False)
        return grammar

    # Rules

    def _start(self, prompt: str, lark: Lark) -> list[str]:
        """The first rule: a think block that the template opened, or one that the model may write, and the body."""
        tokenizer = self._tokenizer
        if not tokenizer.has_thinking or prompt.rstrip().endswith(tokenizer.think_end):
            return ["start: body"]
        thought = lark.until("thought", tokenizer.think_end)
        if starts_in_reasoning(tokenizer, prompt):
            return [f"start: thought {_SPACE} body", thought]
        return [f"start: ({lark.literal(tokenizer.think_start)} thought {_SPACE})? body", thought]

    def _body(self, request: ChatRequest, lark: Lark) -> list[str]:
        choice, schema = _choice(request), request.response_schema
        calls = self._calls(request, choice, lark) if choice != "none" else []
        if schema is not None:
            answer = f"answer: {json_of(schema or {'type': 'object'})}"
            return [f"body: answer{' | calls' if calls else ''}", answer, *calls]
        if choice not in ("auto", "none"):
            return ["body: calls", *calls]
        start = self._parser.start
        plain = f"PLAIN: /(?s:.+)/ & ~/(?s:.*){escaped(start)}(?s:.*)/"
        if choice == "none":
            return ["body: PLAIN?", plain]
        return ["body: PLAIN? | opening call", plain, lark.until("opening", start), *calls]

    def _calls(self, request: ChatRequest, choice: str, lark: Lark) -> list[str]:
        """Rules for ``calls``, and for one ``call`` from after its start delimiter to its end."""
        try:
            call, between = self._constrained_call(request, choice, lark)
        except InvalidRequest:
            if choice != "auto":
                raise
            end = self._parser.end
            call, between = [lark.until("call", end) if end else "call: /(?s:.+)/"], None
        several = between is not None and request.parallel_tool_calls and choice in ("auto", "required")
        start = lark.literal(self._parser.start)
        more = f" ({lark.literal(between or '')} {start} call)*" if several else ""
        return [f"calls: {start} call{more}", *call]

    def _constrained_call(
        self, request: ChatRequest, choice: str, lark: Lark
    ) -> tuple[list[str], str | None]:
        """Rules for a ``call`` of one of the chosen tools, and the text between two calls."""
        syntax = self._tool_syntax()
        if syntax is None:
            raise InvalidRequest("this model's tool syntax cannot be forced yet: leave tool_choice alone.")
        tools = [tool for tool in request.tools if choice in ("auto", "required", tool_name(tool))]
        rules = ["call: " + " | ".join(f"call_{i}" for i in range(len(tools)))]
        for i, tool in enumerate(tools):
            rules += syntax.rules(f"call_{i}", tool, lark)
        return rules, syntax.between_calls


def _choice(request: ChatRequest) -> str:
    """The request's tool choice. Without tools, none can be called."""
    return (request.tool_choice or "auto") if request.tools else "none"


# llguidance


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise InvalidRequest(
            "holding an answer to a schema or a tool needs llguidance: install 'agent-memory-mlx[grammar]'."
        ) from error
    return llguidance


def _read_vocabulary(tokenizer: TokenizerWrapper, delimiter_ids: Collection[int]) -> _Vocabulary:
    """The tokenizer as llguidance knows it. No text spells the tokens of delimiters, as it spells no special token."""
    llguidance = _llguidance()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InvalidRequest(
            "this model's tokenizer is not a fast one, so its answers cannot be constrained."
        )
    description = json.loads(backend.to_str()) | {"padding": None, "truncation": None}
    for token in description["added_tokens"]:
        token["special"] = token["special"] or token["id"] in delimiter_ids
    try:
        tokens = llguidance.LLTokenizer(json.dumps(description), eos_token=sorted(tokenizer.eos_token_ids))
    except ValueError as error:
        raise InvalidRequest(
            f"this model's tokenizer cannot be used for constrained answers: {error}"
        ) from error
    added = tokenizer.added_tokens_decoder.items()
    return _Vocabulary(tokens, Lark({str(t): i for i, t in added if tokens.is_special_token(i)}))


def _compile(vocabulary: _Vocabulary, text: str, request: ChatRequest) -> Grammar:
    matcher: LLMatcher = _llguidance().LLMatcher(vocabulary.tokens, text, log_level=0)
    if matcher.is_error():
        raise InvalidRequest(
            f"answers cannot be held to {_failing_schema(request)}: {_reason(matcher.get_error())}."
        )
    return Grammar(text, matcher)


def _failing_schema(request: ChatRequest) -> str:
    """The name of the schema that cannot be compiled."""
    check = _llguidance().LLMatcher.validate_grammar
    for tool in request.tools:
        if _reason(check(f"start: {json_of(arguments_schema(tool))}")):
            return f"the parameters of tool {tool_name(tool)!r}"
    return "response_schema" if request.response_schema is not None else "the tool syntax"


def _reason(error: str) -> str:
    """What llguidance says went wrong, without the place and without the lines of our grammar that follow."""
    words = re.sub(r"^at \d+\(\d+\): ", "", re.split(r"\n\s*\d+ \| ", error)[0])
    return " ".join(words.removeprefix("WARNING:").split())
