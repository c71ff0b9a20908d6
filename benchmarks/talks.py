"""Held-out conversations of tiny-chat, walked turn by turn as the engine would: every turn on a restored cache."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from agent_memory_core.kv.codec import Encoded, KvCodec, Segment

sys.path.append(str(Path(__file__).parents[1]))

from training.tiny_chat.corpus import LETTERS_PER_TOKEN, Conversation, Turn as Message, conversation
from training.tiny_chat.evaluate import different_facts, fill, tell
from training.tiny_chat.talk import brief
from training.tiny_chat.tools import make_result, make_tools, request
from training.tiny_chat.words import Source

BLOCK = 128
CHAT_TOKENS, CHAT_KNOWN = 700, 300
"""About how long a chat is, and how much of it is known at first."""
OPENING, FILLER, FACTS, REQUESTS = 150, 260, 5, 2
"""Tokens, about, before what is asked for is told, so that it does not lie in the first block; and after it."""
Talk = tuple[Conversation, int]
"""A conversation, and how many of its turns make its first prompt."""


@dataclass(frozen=True, slots=True)
class Turn:
    """Tokens [start, stop) of a conversation, of which those from ``answer`` on are the assistant's."""

    kind: str
    start: int
    answer: int
    stop: int


@dataclass(frozen=True, slots=True)
class Walk:
    """A conversation in tokens: the first ``known`` are evaluated in one go, then ``turns`` follow."""

    ids: list[int]
    known: int
    turns: list[Turn]


@dataclass(frozen=True, slots=True)
class Score:
    """What the model made of one answer: nats of each token, and its first choice in place of each."""

    kind: str
    nats: list[float]
    choices: list[int]
    right: bool
    """Whether a greedy answer would have been exactly this one."""


def chat(seed: int) -> Talk:
    """Facts, tools, results and small talk in turn."""
    talk = conversation(seed, held_out=True, tokens=CHAT_TOKENS)
    said = Conversation(tools=talk.tools)
    for turn in talk.turns:
        if said.letters() > LETTERS_PER_TOKEN * CHAT_KNOWN and said.turns[-1].role == "assistant":
            break
        said.turns.append(turn)
    return talk, len(said.turns)


def recall(seed: int) -> Talk:
    """A block of talk, facts told, two blocks of talk, then each of the facts asked for."""
    source = _source(seed)
    talk = Conversation()
    fill(source, talk, OPENING)
    facts = different_facts(source, FACTS)
    tell(source, talk, facts)
    fill(source, talk, FILLER)
    known = len(talk.turns)
    for fact in facts:
        talk.exchange(fact.asked(source), fact.answer, "recall")
    return talk, known


def tool_calls(seed: int) -> Talk:
    """A brief of a block, tools offered, a block and more of talk, then requests for them."""
    source = _source(seed)
    sentences = brief(source, int(OPENING * LETTERS_PER_TOKEN))
    talk = Conversation([Message("system", " ".join(sentences))], make_tools(source, 2))
    fill(source, talk, FILLER // 2)
    known = len(talk.turns)
    for _ in range(REQUESTS):
        tool = source.rng.choice(talk.tools)
        asked, call = request(source, tool)
        talk.user(asked)
        talk.assistant("", "call", call)
        result = make_result(source, tool)
        talk.returned(result)
        talk.assistant(result.answer, "result")
    return talk, known


KINDS: dict[str, Callable[[int], Talk]] = {"chat": chat, "recall": recall, "tool calls": tool_calls}


def _source(seed: int) -> Source:
    """Values that training never saw; every other seed has wordings that it never saw either."""
    return Source(seed, held_values=True, held_wordings=seed % 2 == 0)


def tokenize(tokenizer: Any, talk: Talk) -> Walk:
    """A conversation as the chat template writes it."""
    spoken, known = talk
    messages, tools = spoken.messages(), spoken.schemas() or None

    def ids(count: int, *, prompt: bool = False) -> list[int]:
        return list(
            tokenizer.apply_chat_template(messages[:count], tools=tools, add_generation_prompt=prompt)
        )

    whole, start, turns = ids(len(messages)), len(ids(known)), []
    for i in range(known, len(messages)):
        if messages[i]["role"] != "assistant":
            continue
        answer = len(ids(i, prompt=True))
        stop = whole.index(tokenizer.eos_token_id, answer) + 1
        turns.append(Turn(spoken.turns[i].kind, start, answer, stop))
        start = stop
    return Walk(whole, len(ids(known)), turns)


class Memory:
    """One conversation's KV as a codec keeps it: full blocks encoded, the rest of the tokens as they are.

    ``first`` is another codec for the first block, where the tokens stand that all others look at.
    """

    def __init__(self, model: Any, codec: KvCodec, first: KvCodec | None = None) -> None:
        self._model = model
        self._codec, self._first = codec, first or codec
        self._blocks: list[Encoded] = []

    def turn(self, cache: Sequence[Any], length: int) -> list[Any]:
        """What the next turn starts from: the first ``length`` tokens of a live cache, stored and restored."""
        full = length // BLOCK
        for index in range(len(self._blocks), full):
            codec = self._codec if index else self._first
            self._blocks.append(codec.encode(_cut(cache, index * BLOCK, (index + 1) * BLOCK)))
        tail = _cut(cache, full * BLOCK, length)
        segments = (
            [self._first.decode(self._blocks[:1]), self._codec.decode(self._blocks[1:])] if full > 1 else []
        )
        return _join(self._model, [*segments, tail])


def walk(model: Any, talk: Walk, prompt: Sequence[Any], memory: Memory) -> list[Score]:
    """Answer every turn; ``prompt`` is a live cache of the tokens known at first, and is left as it was."""
    scores, cache = [], list(prompt)
    for turn in talk.turns:
        cache = memory.turn(cache, turn.start)
        logits = model(mx.array([talk.ids[turn.start : turn.stop]]), cache=cache)[0].astype(mx.float32)
        scores.append(_score(turn, talk.ids, logits[turn.answer - turn.start - 1 : -1]))
    return scores


def begin(model: Any, talk: Walk) -> list[Any]:
    """A live cache of the tokens that are known at first."""
    cache: list[Any] = make_prompt_cache(model)
    model(mx.array([talk.ids[: talk.known]]), cache=cache)
    mx.eval([x for layer in cache for x in (layer.keys, layer.values)])
    return cache


def _score(turn: Turn, ids: list[int], logits: mx.array) -> Score:
    answer = mx.array(ids[turn.answer : turn.stop])
    nats = mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, answer[:, None], axis=-1)[:, 0]
    choices = mx.argmax(logits, axis=-1)
    mx.eval(nats, choices)
    return Score(turn.kind, nats.tolist(), choices.tolist(), bool(mx.array_equal(choices, answer)))


def _cut(cache: Sequence[Any], start: int, stop: int) -> Segment:
    return {
        f"0.{name[0]}": mx.stack([getattr(layer, name)[0, :, start:stop] for layer in cache])
        for name in ("keys", "values")
    }


def _join(model: Any, segments: Sequence[Segment]) -> list[Any]:
    cache: list[Any] = make_prompt_cache(model)
    for index, layer in enumerate(cache):
        layer.keys, layer.values = (
            mx.concatenate([segment[name][index : index + 1] for segment in segments], axis=2)
            for name in ("0.k", "0.v")
        )
        layer.offset = layer.keys.shape[2]
    return cache
