"""Token ids of one answer to text, reasoning and tool calls, as they become certain.

The text is exactly what the ids decode to: the streamed pieces put together are the whole. One thing is left out:
whitespace at the end of text in which, or after which, a tool call stands, because templates write that whitespace
themselves. An answer that consists of calls only has no text.

Stop strings are looked for in the answer's text only, also where they are spread over several tokens. The one that is
complete first wins, and nothing from its beginning on is ever handed out. mlx-lm's state machine finds where thinking
and tool calls begin and end. What a call says is for a `CallParser` to read (see `structured/tool_calls.py`).
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, Protocol

from mlx_lm.generate import TextStateMachine, make_text_state_machine
from mlx_lm.tokenizer_utils import TokenizerWrapper
from transformers.convert_slow_tokenizer import bytes_to_unicode

from agent_memory_core.messages import (
    Delta,
    InvalidToolCall,
    TokenLogprob,
    ToolCall,
    ToolCallPiece,
    new_call_id,
)
from agent_memory_core.text.token_text import TextDecoder


class AmbiguousCall(ValueError):
    """A call is complete, and a value in it holds marks, so that it cannot be told where that value ends."""


class CallReader(Protocol):
    """Reads one call while it is written."""

    name: str
    """The tool; empty until it is known."""

    def feed(self, text: str) -> str:
        """Take more of the text after a start delimiter; return what became certain of the arguments, as JSON text."""

    def rest(self, arguments: Mapping[str, Any]) -> str | None:
        """What is to be added to the text so far, once the call turned out to have these arguments.

        None where the text so far is not the beginning of any JSON that says the same.
        """


class CallParser(Protocol):
    """Parses tool calls: where they stand in an answer, and what they say."""

    @property
    def start(self) -> str:
        """The delimiter that begins a call."""

    @property
    def end(self) -> str:
        """The delimiter that ends a call; empty where a call ends with the answer."""

    @property
    def ends_are_certain(self) -> bool:
        """Whether text after a call that cannot be read is outside of it.

        If not, it may be a part of a value, and a call that stands there must not be run.
        """

    def parse(self, span: str) -> list[ToolCall]:
        """The calls in the text between two delimiters.

        Raises:
            AmbiguousCall: the text is a call, and a value in it cannot be told from the marks in it.
            ValueError: the text is not a call.
        """

    def is_open(self, span: str) -> bool:
        """Whether the end delimiter after ``span`` may stand inside a value, so that the call goes on after it."""

    def reader(self) -> CallReader | None:
        """What reads a call while it is written; None where its arguments are known at its end only."""


def starts_in_reasoning(tokenizer: TokenizerWrapper, prompt: str | Sequence[int]) -> bool:
    """Whether ``prompt`` ends inside a think block that the template opened, with only whitespace after its start."""
    if not tokenizer.has_thinking:
        return False
    text = prompt if isinstance(prompt, str) else TextDecoder(tokenizer).inner(prompt[-32:])
    return text.rstrip().endswith(tokenizer.think_start)


_BYTE_OF: dict[str, int] = {character: byte for byte, character in bytes_to_unicode().items()}
"""The bytes that byte-level tokenizers write as characters."""


def token_bytes(tokenizer: TokenizerWrapper, token_id: int) -> bytes:
    """The bytes of a token that may be a part of a character: it names one byte, or writes bytes as characters."""
    name: str = tokenizer.convert_ids_to_tokens(token_id)
    if byte := re.fullmatch("<0x([0-9A-F]{2})>", name):
        return bytes.fromhex(byte[1])
    if not all(character in _BYTE_OF for character in name):
        return name.encode()
    return bytes(_BYTE_OF[character] for character in name)


class Detokenizer:
    """Reads one answer. Not for several threads at once."""

    stop_string: str | None
    """The stop string that is complete, so that nothing after it is wanted."""
    text: str
    """All answer text handed out so far."""

    def __init__(
        self,
        tokenizer: TokenizerWrapper,
        *,
        stop: Sequence[str] = (),
        calls: CallParser | None = None,
        in_reasoning: bool = False,
    ) -> None:
        """Read the answer to one request.

        Args:
            stop: the answer ends where the first of these strings begins.
            calls: parses the tool calls; without it their delimiters are text.
            in_reasoning: the prompt ends inside a think block, see `starts_in_reasoning`.
        """
        self.stop_string, self.text = None, ""
        self._tokenizer, self._calls = tokenizer, calls
        self._decoder = TextDecoder(tokenizer)
        self._characters = _CharacterStream(self._decoder)
        reasons = in_reasoning and tokenizer.has_thinking
        initial = tokenizer.response_initial_state or ("reasoning" if reasons else "normal")
        self._machine = make_text_state_machine(_Delimiters(tokenizer, calls))
        self._spans = self._machine.make_state(initial)
        self._stop_strings = {f"stop {i}": string for i, string in enumerate(stop) if string}
        self._stops = _stop_machine(self._stop_strings).make_state("normal")
        self._characters_read = 0
        self._tokens_before_stop: int | None = None
        self._call = ""
        self._piecewise: _PiecewiseCall | None = None
        self._broken: _BrokenCall | None = None
        self._distrusts = False
        self._held_space, self._after_call = "", False

    @property
    def stopped(self) -> bool:
        """Whether a stop string is complete."""
        return self.stop_string is not None

    @property
    def tokens_before_stop(self) -> int:
        """How many of the pushed tokens stand wholly before the stop string: all of them where there is none."""
        return self._characters.pushed if self._tokens_before_stop is None else self._tokens_before_stop

    @property
    def is_reasoning(self) -> bool:
        """Whether the next token stands inside a think block."""
        return bool(self._spans[0] == "reasoning")

    def push(self, token_id: int) -> Delta:
        """Take the next token (never an EOS) and return what became certain, without token ids."""
        return Delta() if self.stopped else self._advance(self._characters.push(token_id)).build()

    def finish(self) -> Delta:
        """Return what was held back, once, at the end of the generation. A stop string may be found here."""
        if self.stopped:
            return Delta()
        delta = self._advance(self._characters.flush())
        self._flush(delta)
        if not self.stopped:
            self._end_text(delta)
            self._end_answer(delta)
        return delta.build()

    def _flush(self, delta: _DeltaBuilder) -> None:
        """Hand out what the delimiters held back."""
        self._spans, rest, state = TextStateMachine.flush(self._spans)
        while state == "tool" and (broken := self._broken) is not None:
            # No further end delimiter completed the call.
            self._give_up(broken, rest, delta)
            self._spans, rest, state = TextStateMachine.flush(self._spans)
        if self.stopped:
            return
        if state == "tool":
            self._last_call(rest, delta)
        else:
            self._add(state, rest, self._characters_read - len(rest), delta)

    def logprob(self, sampled: Sequence[tuple[int, float]]) -> TokenLogprob:
        """The log-probability of the first token, which was sampled, and of the others, the likeliest in its place."""
        logprobs = [self._token_logprob(token_id, logprob) for token_id, logprob in sampled]
        return replace(logprobs[0], top=tuple(logprobs[1:]))

    def _token_logprob(self, token_id: int, logprob: float) -> TokenLogprob:
        text = self._decoder.inner([token_id])
        exact = token_bytes(self._tokenizer, token_id) if "\ufffd" in text else text.encode()
        return TokenLogprob(text, logprob, exact)

    def _advance(self, text: str, delta: _DeltaBuilder | None = None) -> _DeltaBuilder:
        delta = _DeltaBuilder() if delta is None else delta
        # One character at a time, so that the position of each span in the whole answer is known.
        for character in text:
            start = self._characters_read - len(self._spans[3])
            self._spans, segments = TextStateMachine.split(self._spans, character)
            self._characters_read += 1
            state, span = segments[0]
            self._add(state, span, start, delta)
            if len(segments) > 1 and not self.stopped:
                self._end_span(state, delta)
            if self.stopped:
                break
        return delta

    def _add(self, state: str, span: str, start: int, delta: _DeltaBuilder) -> None:
        """Add ``span``, which begins at the position ``start`` of the whole answer."""
        if state == "reasoning":
            delta.reasoning += span
        elif state == "tool":
            self._add_to_call(span, delta)
        elif state == "normal":
            self._stops, segments = TextStateMachine.split(self._stops, span)
            self._add_text(segments[0][1], delta)
            if len(segments) > 1:
                name, after = segments[1]
                end = start + len(span) - len(after)
                self._stop_at(end, self._stop_strings[name], delta)

    def _end_span(self, state: str, delta: _DeltaBuilder) -> None:
        """A delimiter was read, which ends ``state``."""
        if state == "normal":
            self._end_text(delta)
        elif state == "tool":
            self._end_call(delta)

    def _end_text(self, delta: _DeltaBuilder) -> None:
        """What was held back because it might have become a stop string is text."""
        self._stops, rest, _ = TextStateMachine.flush(self._stops)
        self._add_text(rest, delta)

    def _add_text(self, text: str, delta: _DeltaBuilder) -> None:
        """Hand out text; whitespace at its end waits for what follows if calls may follow."""
        text = self._held_space + text
        ready = text.rstrip() if self._calls is not None else text
        self._held_space = text[len(ready) :]
        if ready:
            self._after_call = False
        delta.text += ready
        self.text += ready

    def _end_answer(self, delta: _DeltaBuilder) -> None:
        """Whitespace that was held back is text, unless it stands after a call."""
        if not self._after_call:
            delta.text += self._held_space
            self.text += self._held_space
        self._held_space = ""

    def _stop_at(self, end: int, stop_string: str, delta: _DeltaBuilder) -> None:
        self.stop_string = stop_string
        self._tokens_before_stop = self._characters.tokens_before(end - len(stop_string))
        self._end_answer(delta)

    def _end_call(self, delta: _DeltaBuilder) -> None:
        """Parse the call that ended. If it cannot be, a value may hold the end delimiter: then the call goes on."""
        assert self._calls is not None, "without a parser no delimiter begins a call"
        text = self._call
        try:
            delta.calls += self._whole_call(self._calls.parse(text), delta)
        except ValueError as error:
            found = _BrokenCall(text, str(error))
            broken = found if isinstance(error, AmbiguousCall) else self._broken or found
            if self._calls.is_open(text):
                self._broken = broken
                self._add_to_call(self._calls.end, delta)
                self._spans = self._machine.make_state("tool")
            else:
                self._call += self._calls.end
                self._give_up(broken, "", delta)
        else:
            self._begin_no_call()

    def _add_to_call(self, text: str, delta: _DeltaBuilder) -> None:
        """Add to the text of a call, and hand out what that says of its arguments."""
        assert self._calls is not None, "without a parser no delimiter begins a call"
        self._call += text
        if self._piecewise is None:
            self._piecewise = _PiecewiseCall(self._calls.reader())
        delta.pieces += self._piecewise.feed(text)

    def _whole_call(self, calls: list[ToolCall], delta: _DeltaBuilder) -> list[ToolCall]:
        """The calls of a span, of which the first may have been handed out in pieces.

        Raises:
            AmbiguousCall: the pieces say something else.
        """
        if self._distrusts:
            raise AmbiguousCall("it may be a part of the call before it, which could not be read")
        piecewise = self._piecewise
        if piecewise is None or not piecewise.id:
            return calls
        rest = piecewise.rest(calls)
        if rest is None:
            raise AmbiguousCall("its arguments are not those that were read while it was written")
        delta.pieces += rest
        return [replace(calls[0], id=piecewise.id)]

    def _begin_no_call(self) -> None:
        """Be ready for what follows a call."""
        self._call, self._piecewise, self._broken, self._after_call = "", None, None, True

    def _invalid(self, text: str, error: str) -> InvalidToolCall:
        assert self._calls is not None
        self._distrusts = not self._calls.ends_are_certain
        return InvalidToolCall(text, error, self._piecewise.id if self._piecewise else "")

    def _give_up(self, broken: _BrokenCall, rest: str, delta: _DeltaBuilder) -> None:
        """Let a call end at its first end delimiter, as what it is, and read what followed it as usual."""
        assert self._calls is not None
        delta.invalid.append(self._invalid(broken.text, broken.error))
        after = self._call[len(broken.text) + len(self._calls.end) :] + rest
        self._begin_no_call()
        self._characters_read -= len(after)
        self._spans = self._machine.make_state("normal")
        self._advance(after, delta)

    def _last_call(self, rest: str, delta: _DeltaBuilder) -> None:
        """Parse a call that the answer's end ended; ``rest`` is the beginning of an end delimiter."""
        assert self._calls is not None, "without a parser no delimiter begins a call"
        text = self._call
        try:
            delta.calls += self._whole_call(self._calls.parse(text), delta)
        except ValueError as error:
            delta.invalid.append(self._invalid(text + rest, str(error)))
        self._begin_no_call()


class _PiecewiseCall:
    """A call that is handed out while it is written."""

    def __init__(self, reader: CallReader | None) -> None:
        self._reader = reader
        self.id = ""
        """Empty until a piece of it was handed out."""

    def feed(self, text: str) -> list[ToolCallPiece]:
        """What became known of the call with more of its text."""
        if self._reader is None:
            return []
        said = self._reader.feed(text)
        if not self.id and self._reader.name:
            self.id = new_call_id()
            return [self._piece(""), *([self._piece(said)] if said else [])]
        return [self._piece(said)] if said else []

    def rest(self, calls: Sequence[ToolCall]) -> list[ToolCallPiece] | None:
        """The pieces that end it, now that ``calls`` were read in its text; None where they contradict it."""
        reader = self._reader
        assert reader is not None, "only called where pieces were handed out"
        if len(calls) != 1 or calls[0].name != reader.name:
            return None
        rest = reader.rest(calls[0].arguments)
        if rest is None:
            return None
        return [self._piece(rest)] if rest else []

    def _piece(self, arguments: str) -> ToolCallPiece:
        assert self._reader is not None
        return ToolCallPiece(self.id, self._reader.name, arguments)


@dataclass(frozen=True, slots=True)
class _BrokenCall:
    """A call up to its first end delimiter, and why it could not be parsed there."""

    text: str
    error: str


def _stop_machine(stop_strings: Mapping[str, str]) -> TextStateMachine:
    """Each stop string leads from text to a state that bears its name, which tells afterwards which one it was."""
    edges: dict[str, list[tuple[str, str]]] = {name: [] for name in stop_strings}
    edges["normal"] = [(string, name) for name, string in stop_strings.items()]
    return TextStateMachine(edges)


class _CharacterStream:
    """Ids to text. A character whose bytes are spread over several tokens is held back until it is whole."""

    def __init__(self, decoder: TextDecoder) -> None:
        self._decoder = decoder
        self._open: list[int] = []
        self._shown = 0
        self._length = 0
        self._ends: list[int] = []
        self.pushed = 0

    def push(self, token_id: int) -> str:
        """Take a token and return the text that became certain."""
        self.pushed += 1
        self._open.append(token_id)
        text = self._decoder.inner(self._open)
        whole = text.rstrip("\ufffd")
        return self._show(whole, closes=whole == text)

    def flush(self) -> str:
        """The rest, in which a character that never became whole is shown as U+FFFD."""
        return self._show(self._decoder.inner(self._open), closes=True) if self._open else ""

    def _show(self, text: str, *, closes: bool) -> str:
        new = text[self._shown :]
        self._length += len(new)
        self._shown += len(new)
        if closes:
            self._ends += [self._length] * len(self._open)
            self._open, self._shown = [], 0
        return new

    def tokens_before(self, position: int) -> int:
        """How many of the first tokens stand wholly before ``position``."""
        return bisect_right(self._ends, position)


class _Delimiters:
    """A tokenizer as mlx-lm's state machine reads it, with the delimiters of the calls that are looked for."""

    def __init__(self, tokenizer: TokenizerWrapper, calls: CallParser | None) -> None:
        self._tokenizer = tokenizer
        self.has_tool_calling = calls is not None
        self.tool_call_start = calls.start if calls else ""
        self.tool_call_end = calls.end if calls else ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


@dataclass(slots=True)
class _DeltaBuilder:
    """What one step adds to the answer."""

    text: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    invalid: list[InvalidToolCall] = field(default_factory=list)
    pieces: list[ToolCallPiece] = field(default_factory=list)

    def build(self) -> Delta:
        return Delta(
            self.text,
            self.reasoning,
            tuple(self.calls),
            tuple(self.invalid),
            call_pieces=tuple(_joined(self.pieces)),
        )


def _joined(pieces: Sequence[ToolCallPiece]) -> Iterator[ToolCallPiece]:
    """Pieces that follow each other as one; the first of a call, which only names it, stays by itself."""
    for call_id, run in groupby(pieces, key=lambda piece: piece.id):
        first, *others = run
        if not first.arguments:
            yield first
            first, *others = others or [first]
        if said := "".join(piece.arguments for piece in (first, *others)):
            yield ToolCallPiece(call_id, first.name, said)
