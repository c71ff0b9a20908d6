"""A managed model as its users hold it: it stays the same while the model is unloaded and loaded again."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, TypeVar

from agent_memory_core import (
    Cancelled,
    ChatRequest,
    ChatResult,
    ChatStream,
    Conversation,
    Delta,
    InvalidRequest,
    SessionKey,
    TurnReport,
    to_request,
    whole_answer,
)
from agent_memory_core.closing import Closing
from agent_memory_core.manager.as_memory import AsyncManagedStream, ManagedMemory
from agent_memory_core.manager.backends.base import CANCELLED, Asked
from agent_memory_core.manager.config import ModelConfig
from agent_memory_core.manager.errors import UnknownModel
from agent_memory_core.manager.parameters import checked_sampling
from agent_memory_core.manager.pool import Pool, Slot

T = TypeVar("T")


class HeldIterator(Closing, Iterator[T]):
    """What is read from a model, which stays in memory until the end of it, `close`, or the last reference."""

    def __init__(self, answer: Iterator[T], release: Callable[[], None]) -> None:
        self._answer = answer
        self._release = release
        self._reading = threading.Lock()
        self._closed = self._ended = False

    def __next__(self) -> T:
        with self._reading:
            if self._ended:
                raise StopIteration
            try:
                piece = next(self._answer)
            except BaseException:
                self._end()
                raise
        if self._closed:
            # By another thread, which found this one reading.
            self.close()
        return piece

    def close(self) -> None:
        """Read no more. Where another thread is reading, it ends after the piece that it waits for."""
        self._closed = True
        if not self._ended and self._reading.acquire(blocking=False):
            try:
                self._end()
            finally:
                self._reading.release()

    def _end(self) -> None:
        if not self._ended:
            self._ended = True
            close = getattr(self._answer, "close", None)
            if close is not None:
                close()
            self._release()

    def __del__(self) -> None:
        self.close()


class ManagedStream(HeldIterator[Delta]):
    """The deltas of a call as they are made. Any thread may close it; the next read then raises `Cancelled`."""

    def __init__(self, answer: Iterator[Delta], asked: Asked, release: Callable[[], None]) -> None:
        super().__init__(answer, release)
        self._asked = asked
        self._withdrawn = False
        self.report: TurnReport | None = None

    def __next__(self) -> Delta:
        if self._withdrawn and self.report is None:
            raise Cancelled(CANCELLED)
        delta = super().__next__()
        if delta.report is not None:
            self.report = delta.report
            super().close()
        return delta

    def close(self) -> None:
        """Withdraw the call, if it has not ended."""
        if self._ended:
            return
        self._withdrawn = True
        self._asked.cancel.set()
        if isinstance(self._answer, ChatStream):
            # Its reader wakes at once, also while the engine is busy.
            self._answer.close()
        super().close()


class ManagedModel:
    """A model of a `ModelManager`, by its name. Thread-safe, and cheap: it holds no weights.

    Every use loads the model, if it was unloaded meanwhile, and keeps it in memory until the use has ended. What is
    no attribute here is one of the model in the library that runs it, see `lease`. An object of that library that is
    kept for longer than a lease may be freed under its holder.
    """

    def __init__(self, pool: Pool, name: str) -> None:
        self._pool = pool
        self.name = name
        """Its name in the configuration."""

    @property
    def _slot(self) -> Slot:
        # Looked up, because a new configuration may have put another one in its place.
        slot = self._pool.slots.get(self.name)
        if slot is None:
            raise UnknownModel(f"the model {self.name!r} was removed from its manager.")
        return slot

    @property
    def type(self) -> str:
        """What runs it: mlx, gguf, huggingface or openai."""
        return self._slot.config.type

    @property
    def config(self) -> ModelConfig:
        """Its configuration."""
        return self._slot.config

    @property
    def loaded(self) -> bool:
        """Whether it is in memory now."""
        return self._slot.loaded is not None

    def __repr__(self) -> str:
        return f"ManagedModel({self.name!r}, type={self.type!r}, loaded={self.loaded})"

    @contextmanager
    def lease(self, timeout: float | None = None) -> Iterator[Any]:
        """Keep the model in memory for a block, and hand out the object of the library that runs it.

        That is an `AgentMemory`, a `llama_cpp.Llama`, a model of transformers or a client of openai.

        Args:
            timeout: seconds to wait for the model; None is the manager's ``load_timeout``.

        Raises:
            ModelLoadFailed: it cannot be loaded.
        """
        with self._pool.leased(self._slot, timeout) as loaded:
            yield loaded.native

    def hold(self, timeout: float | None = None) -> tuple[Any, Callable[[], None]]:
        """`lease` without a block: the object of the library, and what gives the lease back, once, in any thread."""
        slot = self._slot
        give_back = self._pool.hold(slot, timeout)
        assert slot.loaded is not None
        return slot.loaded.native, give_back

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer, as the library has it; for mlx the `AgentMemory`, which encodes; None for openai."""
        with self._pool.leased(self._slot) as loaded:
            return loaded.tokenizer

    # -- answers ------------------------------------------------------------------------------------------

    def generate(self, prompt: Any = None, **params: Any) -> Any:
        """Answer a prompt with text: one message of the user, or a list of messages.

        For a huggingface model, a tensor or ``input_ids`` goes to the model's own ``generate``.
        """
        is_native = not isinstance(prompt, (str, list, tuple, ChatRequest))
        if self.type == "huggingface" and (is_native or "input_ids" in params or "inputs" in params):
            with self.lease() as native:
                return native.generate(**params) if prompt is None else native.generate(prompt, **params)
        if is_native:
            raise InvalidRequest(
                f"a prompt of the type {type(prompt).__name__} is not valid: text or messages."
            )
        return self.chat(prompt, **params).text

    def chat(self, messages: Conversation, **options: Any) -> ChatResult:
        """Run one call; ``options`` are those of `stream`.

        Raises:
            InvalidRequest: a message or an option cannot be used.
            ModelLoadFailed: the model cannot be loaded.
            Cancelled: the model was unloaded by force meanwhile.
        """
        with self.stream(messages, **options) as answer:
            return whole_answer(list(answer))

    def stream(
        self,
        messages: Conversation,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        tool_choice: str | None = None,
        response_schema: Mapping[str, Any] | None = None,
        session: SessionKey | str | None = None,
        **params: Any,
    ) -> ManagedStream:
        """Begin one call and return its deltas.

        Args:
            messages: text of the user, messages, or a request, whose own sampling is kept.
            tools: OpenAI function schemas.
            tool_choice: as in `ChatRequest`.
            response_schema: a JSON schema that the answer must fit.
            session: whose memory it continues; only models on MLX have one, the others ignore it.
            params: sampling values, which go before those of the configuration.
        """
        asked = self._asked(messages, session, params)
        more: dict[str, Any] = {"tools": tuple(tools)} if tools else {}
        more |= {"tool_choice": tool_choice} if tool_choice is not None else {}
        more |= {"response_schema": response_schema} if response_schema is not None else {}
        if more:
            request = to_request(self._profile_name, dataclasses.replace(asked.request, **more), {})
            asked = dataclasses.replace(asked, request=request)
        return self._begin(asked)

    async def achat(self, messages: Conversation, **options: Any) -> ChatResult:
        """`chat` for coroutines."""
        return whole_answer([delta async for delta in self.astream(messages, **options)])

    async def astream(self, messages: Conversation, **options: Any) -> AsyncIterator[Delta]:
        """`stream` for coroutines; a thread waits for each delta."""
        async with AsyncManagedStream(
            await asyncio.to_thread(lambda: self.stream(messages, **options))
        ) as answer:
            async for delta in answer:
                yield delta

    @property
    def as_memory(self) -> ManagedMemory:
        """This model in the shape of an `AgentMemory`, for what runs turns on one."""
        return ManagedMemory(self)

    @property
    def _profile_name(self) -> str:
        # Profiles are of models on MLX.
        return self.config.path if self.type == "mlx" else ""

    def _asked(
        self, messages: Conversation, session: SessionKey | str | None, params: Mapping[str, Any]
    ) -> Asked:
        own = {} if isinstance(messages, ChatRequest) else self.config.sampling
        given = own | checked_sampling(params, InvalidRequest)
        return Asked(to_request(self._profile_name, messages, given), given, session)

    def _begin(self, asked: Asked) -> ManagedStream:
        pool, slot = self._pool, self._slot
        with pool.leased(slot) as loaded:
            # The stream's own lease. Taken before the block's, it would make the block wait behind others for itself.
            pool.acquire(slot)
            try:
                answer = loaded.chat(asked) if slot.gate is None else _one_of(slot.gate, slot, asked)
            except BaseException:
                pool.release(slot)
                raise
        stream = ManagedStream(answer, asked, partial(pool.release, slot))
        slot.calls.add(stream)
        return stream

    # -- what the library's model has ---------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        with self.lease() as native:
            value = getattr(native, name)
        if not callable(value):
            return value

        def call(*args: Any, **kwargs: Any) -> Any:
            return self._call_native(lambda native: getattr(native, name)(*args, **kwargs))

        return call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the object of the library that runs the model."""
        return self._call_native(lambda native: native(*args, **kwargs))

    def _call_native(self, call: Callable[[Any], Any]) -> Any:
        lease: AbstractContextManager[Any] = self.lease()
        with lease as native:
            result = call(native)
            if isinstance(result, Iterator):
                # It runs the model for as long as it is read.
                slot = self._slot
                self._pool.acquire(slot)
                return HeldIterator(result, partial(self._pool.release, slot))
            return result


def _one_of(gate: threading.Semaphore, slot: Slot, asked: Asked) -> Iterator[Delta]:
    """A call of a model that takes only so many at once."""
    while not gate.acquire(timeout=0.1):
        asked.check()
    try:
        assert slot.loaded is not None
        yield from slot.loaded.chat(asked)
    finally:
        gate.release()
