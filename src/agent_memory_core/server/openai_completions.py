"""OpenAI's completions, https://platform.openai.com/docs/api-reference/completions: a text goes on as it is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from agent_memory_core import Delta, Message
from agent_memory_core.adapter import measurements
from agent_memory_core.server.answers import Answer, PieceReader
from agent_memory_core.server.errors import UNSUPPORTED, ApiError
from agent_memory_core.server.ids import new_id
from agent_memory_core.server.openai_chat import DONE, SamplingBody, finish_reason, usage
from agent_memory_core.server.requests import Asked
from agent_memory_core.server.sse import data
from agent_memory_core.server.turns import Admitted, Call


class CompletionBody(SamplingBody):
    """A request for a completion."""

    prompt: str | list[Any]
    echo: bool | None = None
    suffix: str | None = None
    logprobs: int | None = None
    best_of: int | None = None

    def asked(self) -> Asked:
        """The turn that is asked for.

        Raises:
            ApiError: a part of the request cannot be used.
            InvalidRequest: the same.
        """
        prompts = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        refused = self.given("suffix", "logprobs") | (
            {"best_of": self.best_of} if (self.best_of or 1) > 1 else {}
        )
        if len(prompts) != 1 or not isinstance(prompts[0], str):
            is_text = all(isinstance(prompt, str) for prompt in prompts)
            refused["prompt"] = f"{len(prompts)} prompts" if is_text else "token ids"
        if refused:
            name, value = next(iter(refused.items()))
            raise ApiError(UNSUPPORTED, f"{name}={value!r} is not supported by this server.", param=name)
        return Asked([Message("user", prompts[0])], sampling=self.sampling(), is_raw=True)

    @property
    def echoed(self) -> str:
        """What stands before the answer's text."""
        if not self.echo:
            return ""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]


def _head(call: Call) -> dict[str, Any]:
    created = int(time.time())
    return {"id": new_id("cmpl-"), "object": "text_completion", "created": created, "model": call.model}


def _choice(text: str, finish: str | None) -> list[dict[str, Any]]:
    return [{"index": 0, "text": text, "logprobs": None, "finish_reason": finish}]


def whole(call: Call, answer: Answer, body: CompletionBody) -> dict[str, Any]:
    """A completion."""
    text = body.echoed + "".join(piece.text for piece in answer.pieces)
    report = answer.ended
    said = {"choices": _choice(text, finish_reason(report)), "usage": usage(report.usage)}
    return _head(call) | said | {"agent_memory": measurements(report)}


class CompletionWriter:
    """Streams a completion in chunks."""

    def __init__(self, call: Call, body: CompletionBody) -> None:
        self._call, self._echoed = call, body.echoed
        self._head, self._reader = _head(call), PieceReader()

    def begin(self) -> Iterator[bytes]:
        """What is echoed."""
        yield self._chunk(self._echoed)

    def admitted(self, event: Admitted) -> Iterator[bytes]:
        """Nothing: the usage comes at the end."""
        return iter(())

    def silence(self) -> Iterator[bytes]:
        """An empty chunk."""
        yield self._chunk("")

    def delta(self, delta: Delta) -> Iterator[bytes]:
        """The text of a delta."""
        for piece in self._reader.read(delta):
            yield self._chunk(piece.text)
        if delta.report is not None:
            yield self._chunk("", finish_reason(delta.report))
            if self._call.usage_in_stream:
                yield data(self._head | {"choices": [], "usage": usage(delta.report.usage)})
            yield DONE

    def failed(self, error: ApiError) -> Iterator[bytes]:
        """The error; the stream is closed without a last mark."""
        yield data(error.openai())

    def _chunk(self, text: str, finish: str | None = None) -> bytes:
        return data(self._head | {"choices": _choice(text, finish)})
