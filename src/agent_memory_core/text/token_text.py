"""Token ids with their text, and how a new text continues ids that are already known.

Where a new text begins with the text of a known branch, the branch's ids are taken over as they are, however the model
chose to spell its answer. Only the rest is tokenised. The two parts meet where the tokenizer itself would cut: after a
special token, before one, or, in templates without special tokens, at the end of a word or line.

A control word is the text of a special token, such as ``<|im_end|>``. Where it is only text, in a user's message or in
what a model spelled with other tokens, it has a `GUARD` behind its first character. So texts are equal only where their
tokens mean the same, and a guarded word is never tokenised as that token.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, takewhile
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from agent_memory_core.errors import InvalidRequest

GUARD = "\udfff"
"""Stands inside a control word that is only text. No message can hold it, since it is no valid Unicode."""


def unguarded(text: str) -> str:
    """A text as people read it."""
    return text.replace(GUARD, "")


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens [start, end) and their text. A special token is a piece of its own, a run of others is one."""

    start: int
    end: int
    text: str
    is_special: bool = False


@dataclass(frozen=True, slots=True)
class TokenText:
    """Token ids with the text they stand for, piece by piece."""

    token_ids: tuple[int, ...] = ()
    pieces: tuple[Piece, ...] = ()
    text: str = ""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as token ids."""

    token_ids: tuple[int, ...]
    text: str
    reused: int
    """How many of the first ids were taken over from a known branch."""
    source: int | None
    """The position of that branch among the known ones; None where there was none to choose from."""


class TextDecoder:
    """Decodes ids exactly: special tokens are shown and spaces are kept."""

    def __init__(self, tokenizer: TokenizerWrapper) -> None:
        self._tokenizer = tokenizer
        self._anchor: list[int] = tokenizer.encode("a", add_special_tokens=False)[-1:]
        self._anchor_text = self.whole(self._anchor)

    def whole(self, token_ids: Sequence[int]) -> str:
        """The text of ids that begin a text."""
        text: str = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def inner(self, token_ids: Sequence[int]) -> str:
        """The text of ids that stand after others.

        Some tokenizers drop the space of the first token they decode. After an anchor, no token is the first.
        """
        text = self.whole([*self._anchor, *token_ids])
        if not text.startswith(self._anchor_text):
            return self.whole(token_ids)
        return text[len(self._anchor_text) :]


class ExactTokenizer:
    """Text to ids and ids to text, so that ids that are already known never change."""

    def __init__(self, tokenizer: TokenizerWrapper, *, guards: bool = True) -> None:
        """Prepare the tokenizer; without ``guards``, text that spells a control word becomes that token."""
        self._tokenizer = tokenizer
        self._decoder = TextDecoder(tokenizer)
        added = tokenizer.added_tokens_decoder
        self._added: dict[int, str] = {token_id: self._decoder.inner([token_id]) for token_id in added}
        words = {str(token) for token in added.values() if _is_control_word(token)} if guards else set()
        ordered = sorted(words, key=len, reverse=True)
        self._control_words = re.compile("|".join(map(re.escape, ordered))) if ordered else None

    def guard(self, text: str) -> str:
        """``text``, in which control words are only text."""
        if self._control_words is None:
            return text
        return self._control_words.sub(lambda found: found[0][0] + GUARD + found[0][1:], text)

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a whole text. A BOS is in them only if it is in the text."""
        first, *others = text.split(GUARD)
        return [*self._ids(first), *chain.from_iterable(map(self._ids_inside, others))]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return ids

    def _ids_inside(self, text: str) -> list[int]:
        """Token ids of a text that stands after another: some tokenizers put a space before the first word."""
        ids = self._ids(text)
        # Behind another character no space is put; which one does not merge with the text depends on the text.
        after = (self._ids(character + text)[len(self._ids(character)) :] for character in "a.:\n")
        return next((found for found in chain([ids], after) if self._decoder.inner(found) == text), ids)

    def text_inside(self, token_ids: Sequence[int]) -> str:
        """The text of ids that stand after others."""
        return self._decoder.inner(token_ids) if token_ids else ""

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of ids that begin a text, as people read it.

        Raises:
            InvalidRequest: there is no such token.
        """
        size = len(self._tokenizer)
        wrong = next((token_id for token_id in token_ids if not 0 <= token_id < size), None)
        if wrong is not None:
            raise InvalidRequest(f"{wrong} is no token of this model: use ids from 0 to {size - 1}.")
        return self._decoder.whole(token_ids) if token_ids else ""

    def text_of(self, token_ids: Sequence[int]) -> TokenText:
        """The ids with their text, which is found from the ids alone."""
        return self.extend(TokenText(), token_ids)

    def extend(self, known: TokenText, token_ids: Sequence[int]) -> TokenText:
        """``known`` with more ids. Only the new ids and the unfinished run before them are decoded."""
        ids = (*known.token_ids, *token_ids)
        pieces, text = known.pieces, known.text
        start = len(known.token_ids)
        if pieces and known.token_ids[pieces[-1].start] not in self._added:
            # A character may have been cut in two.
            start = pieces[-1].start
            text = text[: len(text) - len(pieces[-1].text)]
            pieces = pieces[:-1]
        new = tuple(self._pieces(ids, start))
        return TokenText(ids, pieces + new, text + "".join(piece.text for piece in new))

    def _pieces(self, ids: tuple[int, ...], start: int) -> Iterator[Piece]:
        at = start
        for added, run in groupby(ids[start:], key=self._added.__contains__):
            for part in ([i] for i in run) if added else [list(run)]:
                decode = self._decoder.inner if at else self._decoder.whole
                text = self._added[part[0]] if added else self.guard(decode(part))
                yield Piece(at, at + len(part), text, added)
                at += len(part)

    def tokens_before(self, token_ids: Sequence[int], text: str, at: int) -> int:
        """How many of the first ids stand wholly before the character ``at`` of ``text``, which all of them spell.

        0 where the tokenizer does not decode ids to the text they came from.
        """
        at, text = at - text.count(GUARD, 0, at), unguarded(text)
        count = bisect_right(
            range(len(token_ids)), at, key=lambda i: len(self._decoder.whole(token_ids[: i + 1]))
        )
        return count if text.startswith(self._decoder.whole(token_ids[:count])) else 0

    def encode(self, text: str, known: Sequence[TokenText] = ()) -> Prompt:
        """Token ids of ``text``, beginning with those of the ``known`` branch that agrees with it the longest."""
        agreements = [_agreement(branch, text) for branch in known]
        source = max(range(len(known)), key=lambda i: agreements[i][1], default=None)
        if source is None:
            return Prompt(tuple(self.tokenize(text)), text, 0, None)
        return self._continue(known[source], source, agreements[source], text) or self._align(known, text)

    def _continue(
        self, branch: TokenText, source: int, agreement: tuple[int, int], text: str
    ) -> Prompt | None:
        """Take over the pieces that agree; None where no clean seam follows them."""
        count, at = agreement
        if not count:
            return None
        last, rest = branch.pieces[count - 1], text[at:]
        # The rest is tokenised after the last piece. So a tokenizer that puts a space before a text does not put one
        # here, and the tokenizer shows whether it cuts where the piece ends.
        new = self.tokenize(last.text + rest)[len(self.tokenize(last.text)) :]
        if self._decoder.inner(new) != unguarded(rest):
            return None
        return Prompt((*branch.token_ids[: last.end], *new), text, last.end, source)

    def _align(self, known: Sequence[TokenText], text: str) -> Prompt:
        """Compare tokens with tokens, for tokenizers whose ids do not decode to the text they came from."""
        fresh = self.text_of(self.tokenize(text))
        counts = [_common_pieces(branch, fresh) for branch in known]
        source = max(range(len(known)), key=counts.__getitem__)
        count = counts[source]
        if not count:
            return Prompt(fresh.token_ids, text, 0, None)
        end = known[source].pieces[count - 1].end
        ids = known[source].token_ids[:end] + fresh.token_ids[fresh.pieces[count - 1].end :]
        return Prompt(ids, text, end, source)


def _agreement(branch: TokenText, text: str) -> tuple[int, int]:
    """How many pieces and characters of ``branch`` stand at the beginning of ``text``."""
    if text.startswith(branch.text):
        return len(branch.pieces), len(branch.text)
    at = 0
    for count, piece in enumerate(branch.pieces):
        if not text.startswith(piece.text, at):
            return count, at
        at += len(piece.text)
    return len(branch.pieces), at


def _common_pieces(branch: TokenText, fresh: TokenText) -> int:
    pairs = zip(branch.pieces, fresh.pieces, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0].text == pair[1].text, pairs))


def _is_control_word(token: Any) -> bool:
    """Whether the text of an added token is one that no prose has: special tokens, and what looks like a mark."""
    text = str(token)
    is_mark = re.fullmatch(r"<.+>|\[[^\s\]]+\]", text, re.DOTALL) is not None
    return len(text) > 2 and not text.isspace() and (is_mark or bool(getattr(token, "special", False)))
