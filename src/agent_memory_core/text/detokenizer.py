"""Token ids of one answer to text, reasoning and tool calls, as they become certain.

Text is what the ids decode to, letter for letter: streamed pieces put together are the whole. One thing is left
out: whitespace at the end of the text with tool calls in or after it, since templates write it themselves round
a call. An answer of calls only has no text.

Stop strings are looked for in the answer's text only, across token pieces; the one that is complete first wins
and nothing after its beginning is ever handed out. Spans are told apart by mlx-lm's state machine and read by
its parser for the model; a model without one is read by the <tool_call> JSON convention if tools were offered.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import uuid4

from mlx_lm.generate import TextStateMachine, make_text_state_machine
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tool_parsers import json_tools

from agent_memory_core.messages import Delta, InvalidToolCall, TokenLogprob, ToolCall
from agent_memory_core.structured.tool_schema import plainly_typed
from agent_memory_core.text.chat_template import TextDecoder

# What mlx-lm's parsers raise on text that is no call: json, ast and regular expressions that did not match.
# RecursionError and MemoryError are how json and ast refuse deep nesting, OverflowError how int refuses infinity.
UNREADABLE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    SyntaxError,
    TypeError,
    ValueError,
)


def starts_in_reasoning(tokenizer: TokenizerWrapper, prompt: str | Sequence[int]) -> bool:
    """Whether ``prompt`` ends inside a think block that the template opened: nothing but space follows its mark."""
    if not tokenizer.has_thinking:
        return False
    text = prompt if isinstance(prompt, str) else TextDecoder(tokenizer).inner(prompt[-32:])
    return text.rstrip().endswith(tokenizer.think_start)


def token_bytes(tokenizer: TokenizerWrapper, token_id: int) -> bytes:
    """The bytes of a token that may be a part of a character: a byte of its own, or byte-level letters."""
    name: str = tokenizer.convert_ids_to_tokens(token_id)
    if byte := re.fullmatch("<0x([0-9A-F]{2})>", name):
        return bytes.fromhex(byte[1])
    letters = [_BYTE_OF.get(letter) for letter in name]
    return bytes(byte for byte in letters if byte is not None) if None not in letters else name.encode()


def _byte_letters() -> dict[str, int]:
    """The letters that byte-level tokenizers write for bytes: printable ones as they are, the rest from 256 on."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + n): byte for n, byte in enumerate(hidden)}


_BYTE_OF = _byte_letters()


class Detokenizer:
    """Reads one answer. Not for several threads at once."""

    stopped: bool
    """A stop string is complete: what follows is not wanted."""
    text: str
    """All answer text handed out so far."""

    def __init__(
        self,
        tokenizer: TokenizerWrapper,
        *,
        stop: Sequence[str] = (),
        tools: Sequence[Mapping[str, Any]] = (),
        in_reasoning: bool = False,
        reads_calls: bool = True,
    ) -> None:
        self.stopped, self.text = False, ""
        self._tools = [plainly_typed(tool) for tool in tools] or None
        delimiters = _delimiters(tokenizer, tools=bool(tools), reads_calls=reads_calls)
        self._parse = delimiters.tool_parser
        self._holds_space: bool = delimiters.has_tool_calling
        reasons = in_reasoning and tokenizer.has_thinking
        initial = tokenizer.response_initial_state or ("reasoning" if reasons else "normal")
        self._spans = make_text_state_machine(delimiters).make_state(initial)
        # Each stop string leads to a state of its own, which tells afterwards which it was.
        self._stop_of = {f"stop {i}": s for i, s in enumerate(stop) if s}
        edges = {
            "normal": [(s, name) for name, s in self._stop_of.items()],
            **{name: [] for name in self._stop_of},
        }
        self._stops = TextStateMachine(edges).make_state("normal")
        self._decoder = TextDecoder(tokenizer)
        self._letters = _Letters(self._decoder)
        self._tokenizer = tokenizer
        self._read = 0
        self._kept: int | None = None
        self._call, self._space, self._after_call = "", "", False

    @property
    def kept(self) -> int:
        """How many pushed tokens stand for what precedes the stop string: what the branch may keep."""
        return self._letters.pushed if self._kept is None else self._kept

    def push(self, token_id: int) -> Delta:
        """Take the next token (never an EOS) and return what became certain, without token ids."""
        return Delta() if self.stopped else self._advance(self._letters.push(token_id)).delta()

    def logprob(self, found: Sequence[tuple[int, float]]) -> TokenLogprob:
        """A sampled token's log-probability, followed in ``found`` by the likeliest tokens in its place."""
        said = [TokenLogprob(*self._spelled(token_id, logprob)) for token_id, logprob in found]
        return replace(said[0], top=tuple(said[1:]))

    def _spelled(self, token_id: int, logprob: float) -> tuple[str, float, bytes]:
        text = self._decoder.inner([token_id])
        return text, logprob, token_bytes(self._tokenizer, token_id) if "\ufffd" in text else text.encode()

    def finish(self) -> Delta:
        """Return what was held back, once, at the end of the generation. A stop string may come to light here."""
        if self.stopped:
            return Delta()
        out = self._advance(self._letters.flush())
        if not self.stopped:
            self._spans, rest, state = TextStateMachine.flush(self._spans)
            if state == "tool":
                self._end_call(out, rest)
            else:
                self._take(state, rest, self._read - len(rest), out)
        if not self.stopped:
            self._leave_text(out)
            self._let_go(out)
        return out.delta()

    def _advance(self, text: str) -> _Out:
        out = _Out()
        for letter in text:
            # One at a time, so that the place of each span in the whole is known.
            start = self._read - len(self._spans[3])
            self._spans, segments = TextStateMachine.split(self._spans, letter)
            self._read += 1
            state, span = segments[0]
            self._take(state, span, start, out)
            if self.stopped:
                break
            if len(segments) > 1:
                self._cross(state, out)
        return out

    def _take(self, state: str, span: str, start: int, out: _Out) -> None:
        """Take ``span``, which begins at ``start`` of the whole."""
        if state == "reasoning":
            out.reasoning += span
        elif state == "tool":
            self._call += span
        elif state == "normal":
            self._stops, parts = TextStateMachine.split(self._stops, span)
            self._say(parts[0][1], out)
            if len(parts) > 1:
                name, after = parts[1]
                end = start + len(span) - len(after)
                self._stop_at(end - len(self._stop_of[name]), out)

    def _cross(self, state: str, out: _Out) -> None:
        """A marker was read: ``state`` ends."""
        if state == "normal":
            self._leave_text(out)
        elif state == "tool":
            self._end_call(out)

    def _leave_text(self, out: _Out) -> None:
        """What might have become a stop string did not."""
        self._stops, rest, _ = TextStateMachine.flush(self._stops)
        self._say(rest, out)

    def _say(self, text: str, out: _Out) -> None:
        text = self._space + text
        said = text.rstrip() if self._holds_space else text
        self._space = text[len(said) :]
        if said:
            self._after_call = False
        out.text += said
        self.text += said

    def _let_go(self, out: _Out) -> None:
        """The answer ends: whitespace held back is text unless a call stands in it."""
        if not self._after_call:
            out.text += self._space
            self.text += self._space
        self._space = ""

    def _stop_at(self, place: int, out: _Out) -> None:
        self.stopped = True
        self._kept = self._letters.tokens_before(place)
        self._let_go(out)

    def _end_call(self, out: _Out, rest: str = "") -> None:
        """Read the span that ended; ``rest`` is the beginning of an end marker that never came."""
        text, self._call, self._after_call = self._call, "", True
        try:
            parsed = self._parse(text, self._tools)
            out.calls += [_tool_call(call) for call in (parsed if isinstance(parsed, list) else [parsed])]
        except UNREADABLE as error:
            out.invalid.append(InvalidToolCall(text + rest, f"{type(error).__name__}: {error}"))


class _Letters:
    """Ids to text; letters whose bytes are spread over tokens are held until they are whole."""

    def __init__(self, decoder: TextDecoder) -> None:
        self._decoder = decoder
        self._open: list[int] = []
        self._shown = 0
        self._length = 0
        self._ends: list[int] = []
        self.pushed = 0

    def push(self, token_id: int) -> str:
        self.pushed += 1
        self._open.append(token_id)
        text = self._decoder.inner(self._open)
        whole = text.rstrip("\ufffd")
        return self._show(whole, closes=whole == text)

    def flush(self) -> str:
        return self._show(self._decoder.inner(self._open), closes=True) if self._open else ""

    def _show(self, text: str, *, closes: bool) -> str:
        new = text[self._shown :]
        self._length += len(new)
        self._shown += len(new)
        if closes:
            self._ends += [self._length] * len(self._open)
            self._open, self._shown = [], 0
        return new

    def tokens_before(self, place: int) -> int:
        """How many leading tokens stand wholly before ``place``."""
        return bisect_right(self._ends, place)


class _NoTools:
    """A tokenizer whose model calls nothing: a mark in its answer is text as any other."""

    has_tool_calling = False

    def __init__(self, tokenizer: TokenizerWrapper) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


class _JsonTools(_NoTools):
    """A tokenizer read by the <tool_call> JSON convention."""

    has_tool_calling = True
    tool_call_start: str = json_tools.tool_call_start
    tool_call_end: str = json_tools.tool_call_end
    tool_parser = staticmethod(json_tools.parse_tool_call)


def _delimiters(tokenizer: TokenizerWrapper, *, tools: bool, reads_calls: bool) -> Any:
    """The tokenizer as the spans of this answer are told apart."""
    if not reads_calls:
        return _NoTools(tokenizer)
    return _JsonTools(tokenizer) if tools and not tokenizer.has_tool_calling else tokenizer


@dataclass(slots=True)
class _Out:
    """A Delta in the making."""

    text: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    invalid: list[InvalidToolCall] = field(default_factory=list)

    def delta(self) -> Delta:
        return Delta(self.text, self.reasoning, tuple(self.calls), tuple(self.invalid))


def _tool_call(parsed: Any) -> ToolCall:
    """What a parser returned, as a call. A model's own id is kept: its template may write it again."""
    name, arguments = parsed["name"], parsed.get("arguments", parsed.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(name, str) or not name:
        raise ValueError(f"the name of the tool is {name!r}")
    if not isinstance(arguments, Mapping):
        raise ValueError(f"the arguments of {name} are no object")
    own = parsed.get("id")
    return ToolCall(name, arguments, own if isinstance(own, str) and own else f"call_{uuid4().hex[:16]}")
