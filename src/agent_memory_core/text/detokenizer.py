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
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from mlx_lm.generate import TextStateMachine, make_text_state_machine
from mlx_lm.tokenizer_utils import TokenizerWrapper

from agent_memory_core.messages import Delta, InvalidToolCall, TokenLogprob, ToolCall
from agent_memory_core.text.token_text import TextDecoder


class CallParser(Protocol):
    """Parses tool calls: where they stand in an answer, and what they say."""

    @property
    def start(self) -> str:
        """The delimiter that begins a call."""

    @property
    def end(self) -> str:
        """The delimiter that ends a call; empty where a call ends with the answer."""

    def parse(self, span: str) -> list[ToolCall]:
        """The calls in the text between two delimiters.

        Raises:
            ValueError: the text is not a call.
        """


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
        calls: CallParser | None = None,
        in_reasoning: bool = False,
    ) -> None:
        """Read the answer to one request.

        Args:
            stop: the answer ends where the first of these strings begins.
            calls: parses the tool calls; without it their delimiters are text.
            in_reasoning: the prompt ends inside a think block, see `starts_in_reasoning`.
        """
        self.stopped, self.text = False, ""
        self._calls = calls
        reasons = in_reasoning and tokenizer.has_thinking
        initial = tokenizer.response_initial_state or ("reasoning" if reasons else "normal")
        self._spans = make_text_state_machine(_Delimiters(tokenizer, calls)).make_state(initial)
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
        said = text.rstrip() if self._calls is not None else text
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
        assert self._calls is not None, "without a parser no delimiter begins a call"
        try:
            out.calls += self._calls.parse(text)
        except ValueError as error:
            out.invalid.append(InvalidToolCall(text + rest, str(error)))


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
class _Out:
    """A Delta in the making."""

    text: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    invalid: list[InvalidToolCall] = field(default_factory=list)

    def delta(self) -> Delta:
        return Delta(self.text, self.reasoning, tuple(self.calls), tuple(self.invalid))
