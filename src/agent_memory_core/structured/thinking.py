"""A bound on how long a model thinks before it answers."""

from __future__ import annotations

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from agent_memory_core.text.detokenizer import starts_in_reasoning
from agent_memory_core.text.token_text import Prompt


class ThinkingLimit:
    """A logits processor that ends a thought which has come to its budget. It does not wait for the last token.

    Args:
        start_id: the token that begins a thought.
        end_id: the token that ends one.
        budget: most tokens of all thoughts of the answer together.
        prompt_tokens: the length of the prompt.
        is_open: whether the prompt begins a thought.
    """

    def __init__(self, start_id: int, end_id: int, budget: int, prompt_tokens: int, is_open: bool) -> None:
        self._start_id, self._end_id, self._budget = start_id, end_id, budget
        self._prompt_tokens, self._is_open = prompt_tokens, is_open

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """Leave nothing but the end of the thought possible where the logits [1, vocab] follow ``budget`` tokens."""
        inside, thought = self._inside(tokens[self._prompt_tokens :])
        ends = mx.logical_and(inside, thought >= self._budget)
        is_end = mx.arange(logits.shape[-1]) == self._end_id
        return mx.where(mx.logical_or(mx.logical_not(ends), is_end), logits, -mx.inf)

    def _inside(self, answer: mx.array) -> tuple[mx.array, mx.array]:
        """Whether an answer ends inside a thought, and how many of its tokens are thoughts."""
        if not answer.shape[0]:
            return mx.array(self._is_open), mx.array(0)
        places = mx.arange(1, answer.shape[0] + 1)
        starts = mx.cummax(mx.where(answer == self._start_id, places, 0 if self._is_open else -2))
        ends = mx.cummax(mx.where(answer == self._end_id, places, -1))
        inside = starts > ends
        return inside[-1], mx.sum(mx.logical_and(inside, answer != self._start_id))


def thinking_limit(tokenizer: TokenizerWrapper, budget: int | None, prompt: Prompt) -> list[ThinkingLimit]:
    """What bounds the thoughts of an answer; nothing where there is no bound, or where the model's thoughts are not
    between two single tokens, so that there is no token that ends one.
    """
    if budget is None or not tokenizer.has_thinking:
        return []
    vocabulary = tokenizer.get_vocab()
    start, end = (vocabulary.get(word) for word in (tokenizer.think_start, tokenizer.think_end))
    if start is None or end is None:
        return []
    is_open = starts_in_reasoning(tokenizer, prompt.text)
    return [ThinkingLimit(start, end, budget, len(prompt.token_ids), is_open)]
