"""A managed model of any type in the shape of an `AgentMemory`, as far as the frameworks' models use one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any

from agent_memory_core import (
    ChatRequest,
    ChatResult,
    Delta,
    EngineConfig,
    InvalidRequest,
    SessionKey,
    whole_answer,
)
from agent_memory_core.closing import AsyncClosing

if TYPE_CHECKING:
    from agent_memory_core.manager.handle import ManagedModel, ManagedStream


class AsyncManagedStream(AsyncClosing, AsyncIterator[Delta]):
    """The deltas of a call for coroutines; a thread waits for each."""

    def __init__(self, answer: ManagedStream) -> None:
        self._answer = answer

    async def __anext__(self) -> Delta:
        delta: Delta | None = await asyncio.to_thread(next, self._answer, None)
        if delta is None:
            raise StopAsyncIteration
        return delta

    async def aclose(self) -> None:
        """Withdraw the call, if it has not ended."""
        self._answer.close()


class ManagedMemory:
    """Runs turns on a managed model. What it is asked besides is answered as far as the model's library can."""

    def __init__(self, model: ManagedModel) -> None:
        self._model = model
        # Profiles are of models on MLX: no name here is one of theirs.
        self.config = EngineConfig(model=f"managed:{model.name}", cache_dir=None)

    def chat(self, request: ChatRequest, session: SessionKey | None = None, *, stream: bool = False) -> Any:
        """Run one turn; a `ChatResult`, or with ``stream`` a `ManagedStream`."""
        answer = self._model.stream(request, session=session)
        return answer if stream else _whole(answer)

    async def achat(
        self, request: ChatRequest, session: SessionKey | None = None, *, stream: bool = False
    ) -> Any:
        """`chat` for coroutines."""
        answer = AsyncManagedStream(
            await asyncio.to_thread(lambda: self._model.stream(request, session=session))
        )
        if stream:
            return answer
        async with answer:
            return whole_answer([delta async for delta in answer])

    def encode(self, text: str) -> list[int]:
        """The token ids of a text. Loads the model."""
        tokenizer = self._model.tokenizer
        if self._model.type == "gguf":
            return list(tokenizer.encode(text, add_bos=False))
        return list(tokenizer.encode(text, add_special_tokens=False))

    def count_tokens(self, request: ChatRequest) -> int:
        """Not known before the model answers.

        Raises:
            InvalidRequest: always.
        """
        raise InvalidRequest(f"the model {self._model.name!r} cannot count the tokens of a prompt ahead.")

    @property
    def stated_context_length(self) -> int | None:
        """The context length that the configuration states."""
        return self._model.config.context_length

    @property
    def stated_reasoning(self) -> bool | None:
        """Not known."""
        return None

    @property
    def context_length(self) -> int:
        """The most tokens of prompt and answer together. Loads the model where the configuration does not say it."""
        if self._model.config.context_length is not None:
            return self._model.config.context_length
        with self._model.lease() as native:
            return int(
                native.n_ctx() if self._model.type == "gguf" else native.config.max_position_embeddings
            )


def _whole(answer: Iterator[Delta]) -> ChatResult:
    return whole_answer(list(answer))
