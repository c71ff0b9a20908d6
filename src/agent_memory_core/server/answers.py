"""Answers as all dialects have them: a sequence of pieces, whole or as it is made.

Each dialect only writes down pieces, so that a streamed answer and a whole one say the same in all of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from agent_memory_core import Delta, InvalidToolCall, TokenLogprob, TurnReport
from agent_memory_core.adapter import id_of


class Piece(NamedTuple):
    """What became known of an answer: text, a thought, or arguments of a call."""

    kind: Literal["text", "reasoning", "call"]
    text: str
    """For a call a part of its arguments, as JSON text; empty where only its name is known."""
    call_id: str = ""
    """Which call it belongs to."""
    name: str = ""
    """The tool."""


class PieceReader:
    """Deltas of one answer to pieces."""

    def __init__(self) -> None:
        self._begun: set[str] = set()

    def read(self, delta: Delta) -> Iterator[Piece]:
        """The pieces that ``delta`` adds, in order."""
        if delta.reasoning:
            yield Piece("reasoning", delta.reasoning)
        if delta.text:
            yield Piece("text", delta.text)
        for part in delta.call_pieces:
            self._begun.add(part.id)
            yield Piece("call", part.arguments, part.id, part.name)
        for call in delta.tool_calls:
            if call.id not in self._begun:
                yield Piece("call", as_json(call.arguments), id_of(call), call.name)
        for wrong in delta.invalid_tool_calls:
            # Nobody can act on a call that cannot be read, but what the model wrote is not lost.
            if wrong.id not in self._begun:
                yield Piece("text", wrong.text)


@dataclass(slots=True)
class Answer:
    """A whole answer."""

    pieces: list[Piece] = field(default_factory=list)
    """In order; neighbours of one kind and call are put together."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    report: TurnReport | None = None

    def continues(self, piece: Piece) -> bool:
        """Whether a piece goes on with the last one."""
        last = self.pieces[-1] if self.pieces else None
        return last is not None and (last.kind, last.call_id) == (piece.kind, piece.call_id)

    def add(self, piece: Piece) -> None:
        """Put another piece to the end."""
        if self.continues(piece):
            last = self.pieces[-1]
            self.pieces[-1] = last._replace(text=last.text + piece.text)
        else:
            self.pieces.append(piece)

    def take(self, delta: Delta, reader: PieceReader) -> list[Piece]:
        """Put what a delta says to the end, and return its pieces; the last one brings the report."""
        pieces = list(reader.read(delta))
        for piece in pieces:
            self.add(piece)
        for wrong in delta.invalid_tool_calls:
            self.withdraw_call(wrong)
        self.logprobs += delta.logprobs
        self.report = delta.report
        return pieces

    def withdraw_call(self, wrong: InvalidToolCall) -> None:
        """Turn a call of which pieces were read, and which cannot be read as a whole, into text."""
        for index, piece in enumerate(self.pieces):
            if piece.kind == "call" and piece.call_id == wrong.id:
                self.pieces[index] = Piece("text", wrong.text)

    def of(self, kind: Literal["text", "reasoning", "call"]) -> list[Piece]:
        """The pieces of one kind."""
        return [piece for piece in self.pieces if piece.kind == kind]

    def text(self, kind: Literal["text", "reasoning"] = "text") -> str:
        """All text of a kind."""
        return "".join(piece.text for piece in self.of(kind))

    @property
    def ended(self) -> TurnReport:
        """What the turn did."""
        assert self.report is not None, "the answer was read to its end"
        return self.report


def as_json(value: Mapping[str, Any]) -> str:
    """JSON as the chat templates are given it, so that a call that comes back has the tokens that it had."""
    return json.dumps(value, ensure_ascii=False, default=str)
