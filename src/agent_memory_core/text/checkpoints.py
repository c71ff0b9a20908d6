"""Checkpoints: the positions in a prompt at which other prompts are likely to differ from it.

They are found by rendering short probes with the model's own template, not by looking for words in the text.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import takewhile
from typing import Any

from agent_memory_core.blocks.block import common_prefix
from agent_memory_core.errors import InvalidRequest
from agent_memory_core.messages import ChatRequest, Message
from agent_memory_core.text.chat_template import TEMPLATE_ERRORS, ChatTemplate
from agent_memory_core.text.token_text import Prompt

MIN_OPENING = 64
"""The opening of a conversation gets no checkpoint if it is shorter than this many tokens."""

MAX_CACHE_POINTS = 4
"""How many of a prompt's cache points get a checkpoint: the last ones, as other providers have it."""

MAX_PROBES = 256
"""How many openings and generation prompts are remembered."""

_Key = tuple[str, str]
"""What was probed for ("opening" or "generation"), and the arguments as text or as a hash of it."""


class CheckpointFinder:
    """Finds the checkpoints of one model's prompts. Not for several threads at once."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._probes: OrderedDict[_Key, tuple[int, ...]] = OrderedDict()

    def find(self, request: ChatRequest, prompt: Prompt) -> tuple[int, ...]:
        """The checkpoints of ``prompt``, which is ``request`` as token ids, in ascending order.

        They are the end of what precedes the first user message (the system message and the tools), unless that is
        short, the end of the messages, where the generation prompt begins, and the cache points of messages.
        """
        ids = prompt.token_ids
        suffix = self._generation_prompt(request)
        end = len(ids) - max(1, len(suffix) if ids[len(ids) - len(suffix) :] == suffix else 1)
        opening = common_prefix(self._opening(request), ids)
        places = {opening if opening >= MIN_OPENING else 0, end, *self._cache_points(request, prompt)}
        return tuple(sorted(place for place in places if 0 < place < len(ids)))

    def _cache_points(self, request: ChatRequest, prompt: Prompt) -> Iterator[int]:
        """The positions of the messages' cache points, which are found by changing the text that follows each."""
        marked = [(i, point) for i, message in enumerate(request.messages) for point in message.cache_points]
        for index, point in marked[-MAX_CACHE_POINTS:]:
            message = request.messages[index]
            other = "1" if message.content[point : point + 1] == "a" else "a"
            changed = replace(message, content=message.content[:point] + other)
            messages = (*request.messages[:index], changed, *request.messages[index + 1 :])
            try:
                text = self._template.render(replace(request, messages=messages), generation_prompt=False)
            except (InvalidRequest, *TEMPLATE_ERRORS):
                continue
            at = common_prefix(text, prompt.text)
            yield self._template.tokenizer.tokens_before(prompt.token_ids, prompt.text, at)

    def _generation_prompt(self, request: ChatRequest) -> tuple[int, ...]:
        """The tokens that ask for an answer; empty where they depend on what precedes them."""
        probe = ChatRequest((Message("user", "ask"),), template_kwargs=request.template_kwargs)

        def find() -> tuple[int, ...]:
            whole = self._template.encode(probe).token_ids
            start = self._template.encode(probe, generation_prompt=False).token_ids
            return whole[len(start) :] if whole[: len(start)] == start else ()

        return self._probe(("generation", _json(dict(request.template_kwargs))), find)

    def _opening(self, request: ChatRequest) -> tuple[int, ...]:
        """The tokens that begin every conversation with these tools and this system message."""
        system = tuple(takewhile(lambda message: message.role == "system", request.messages))

        def conversation(first_words: str) -> ChatRequest:
            messages = (*system, Message("user", first_words))
            return ChatRequest(messages, request.tools, template_kwargs=request.template_kwargs)

        def find() -> tuple[int, ...]:
            one, other = (self._template.encode(conversation(word)).token_ids for word in ("a", "1"))
            return one[: common_prefix(one, other)]

        contents, tools = [message.content for message in system], [dict(tool) for tool in request.tools]
        described = _json([contents, tools, dict(request.template_kwargs)])
        return self._probe(("opening", hashlib.sha256(described.encode()).hexdigest()), find)

    def _probe(self, key: _Key, find: Callable[[], tuple[int, ...]]) -> tuple[int, ...]:
        """What ``find`` returned for this key the first time."""
        if key not in self._probes:
            try:
                found = find()
            except TEMPLATE_ERRORS:
                # Some templates refuse a conversation that is as short as a probe.
                found = ()
            self._probes[key] = found
            if len(self._probes) > MAX_PROBES:
                self._probes.popitem(last=False)
        return self._probes[key]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
