"""Long requests are rendered and tokenised on a thread of their own, so that the turns in flight do not wait for them.

A million characters take a second or so. The thread has a tokenizer and a template of its own, because neither is for
several threads at once, and a tokenizer works outside Python's lock. Short requests are done at once by the engine's
thread, which is quicker than to hand them over.
"""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import cached_property
from typing import TypeVar

from mlx_lm.tokenizer_utils import TokenizerWrapper

from agent_memory_core.config import ControlWords
from agent_memory_core.engine.results import Prepared, PreparedPrompt, Results
from agent_memory_core.engine.workers import Worker
from agent_memory_core.errors import AgentMemoryError, EngineStopped, InvalidRequest, PromptTooLong
from agent_memory_core.messages import ChatRequest
from agent_memory_core.text.chat_template import ChatTemplate
from agent_memory_core.text.checkpoints import CheckpointFinder
from agent_memory_core.text.token_text import Prompt, TokenText

log = logging.getLogger("agent_memory")

T = TypeVar("T")

LONG = 20_000
"""Characters from which a request is long: the engine's thread needs 20 milliseconds for as many."""

_CHARACTERS_A_TOKEN = 8
"""A text of so many characters for each token of the context is looked at in part first."""


class Preparation:
    """Renders and tokenises requests with one template. Not for several threads at once.

    Args:
        template: of the model.
        needs_checkpoints: whether they are looked for.
        context_length: most tokens that a prompt may have.
    """

    def __init__(self, template: ChatTemplate, needs_checkpoints: bool, context_length: int) -> None:
        self.template = template
        self._checkpoints = CheckpointFinder(template) if needs_checkpoints else None
        self._context_length = context_length

    def prepare(self, request: ChatRequest, known: Sequence[TokenText], *, asks: bool) -> PreparedPrompt:
        """The prompt of a request, which begins with the tokens of the ``known`` branch that agrees with it longest.

        Args:
            request: what is asked for.
            known: the branches of its session.
            asks: whether the answer is to follow the prompt.

        Raises:
            InvalidRequest: the template cannot render it, or renders nothing.
            PromptTooLong: a part of it has more tokens than the context holds.
        """
        text = self.template.render(request, generation_prompt=asks)
        self._refuse_far_too_long(text)
        prompt = self.template.tokenizer.encode(text, known)
        if not prompt.token_ids:
            raise InvalidRequest(
                "the model's chat template renders nothing for these messages: the prompt is empty."
            )
        return self.with_checkpoints(request, prompt)

    def with_checkpoints(self, request: ChatRequest, prompt: Prompt) -> PreparedPrompt:
        """The prompt of a request, with its checkpoints where they are needed."""
        found = self._checkpoints.find(request, prompt) if self._checkpoints is not None else ()
        return PreparedPrompt(prompt, found)

    def _refuse_far_too_long(self, text: str) -> None:
        """Look at the beginning of a text that can hardly fit, instead of tokenising all of it in vain."""
        length = self._context_length * _CHARACTERS_A_TOKEN
        if len(text) <= max(LONG, length):
            return
        # The last word of the part may be cut, and so be another token than in the whole.
        count = len(self.template.tokenizer.tokenize(text[:length])) - 1
        if count > self._context_length:
            raise PromptTooLong(
                f"the prompt has more than {count} tokens in the first {length} of its {len(text)} characters, and the "
                f"model's context holds {self._context_length}: shorten the conversation.",
                # As many a character as in its beginning: agents shorten a conversation by what this is too much.
                prompt_tokens=count * len(text) // length,
                limit=self._context_length,
            )


class Preparer:
    """Prepares long requests in the order that they come.

    Args:
        tokenizer: of the model; the thread works with a copy.
        control_words: see `EngineConfig`.
        own: what the engine's thread itself prepares with.
        make: makes a `Preparation` with another template.
        results: each long request's outcome is put here.
    """

    def __init__(
        self,
        tokenizer: TokenizerWrapper,
        control_words: ControlWords,
        own: Preparation,
        make: Callable[[ChatTemplate], Preparation],
        results: Results,
    ) -> None:
        self.own = own
        self._tokenizer = tokenizer
        self._control_words = control_words
        self._make = make
        self._results = results
        self._worker = Worker("agent-memory-preparer")

    def takes(self, request: ChatRequest) -> bool:
        """Whether a request is better prepared by the thread than by the caller."""
        return size(request) >= LONG

    def submit(self, seq_id: int, request: ChatRequest, known: Sequence[TokenText], *, asks: bool) -> None:
        """Prepare a request; the outcome is put into the results as a `Prepared`."""

        def job() -> None:
            result: PreparedPrompt | AgentMemoryError | None = None
            try:
                if self._apart is not None:
                    result = self._apart.prepare(request, known, asks=asks)
            except AgentMemoryError as error:
                result = error
            finally:
                self._results.put(Prepared(seq_id, result))

        self._worker.put(job)

    def ask(self, question: Callable[[ChatTemplate], T]) -> Future[T]:
        """Ask the template something. Any thread may; the engine's thread is not needed for it, but for few models."""
        future: Future[T] = Future()

        def job() -> None:
            try:
                future.set_result(question((self._apart or self.own).template))
            except AgentMemoryError as error:
                future.set_exception(error)

        if not self._worker.put(job):
            future.set_exception(EngineStopped("this engine was closed: open a new AgentMemory."))
        return future

    def close(self) -> None:
        """Finish what was asked for, and end the thread."""
        self._worker.close()

    @cached_property
    def _apart(self) -> Preparation | None:
        """What the thread prepares with, made there when it is first needed; None: the tokenizer cannot be copied."""
        try:
            tokenizer = copy.deepcopy(self._tokenizer)
        except (TypeError, AttributeError, NotImplementedError, pickle.PickleError) as error:
            log.warning(
                "the model's tokenizer cannot be copied, so long prompts hold up other turns: %s", error
            )
            return None
        return self._make(ChatTemplate(tokenizer, self._control_words))


def size(request: ChatRequest) -> int:
    """About how many characters a request has."""
    messages = sum(
        len(message.content)
        + len(message.reasoning or "")
        + sum(len(repr(call.arguments)) for call in message.tool_calls)
        for message in request.messages
    )
    return messages + sum(len(repr(tool)) for tool in request.tools)
