"""The model that is served: one at a time, and another one in its place while the server goes on."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable

from agent_memory_core import AgentMemory, AgentMemoryError, BlocksEvicted, TurnEvent
from agent_memory_core.server.errors import BUSY, MODEL_NOT_FOUND, SWAP_FAILED, ApiError
from agent_memory_core.server.logs import log

Observer = Callable[[TurnEvent | BlocksEvicted], None]
OpenModel = Callable[[str], AgentMemory]


class Host:
    """Holds the memory of the model that is served.

    Args:
        memory: the first one, which its owner closes; others are closed here.
        open_model: makes the memory of another model, without loading it.
    """

    def __init__(self, memory: AgentMemory, open_model: OpenModel | None = None) -> None:
        self.memory, self._first = memory, memory
        self._open = open_model or self._like_the_first
        self._watching: dict[Observer, Callable[[], None]] = {}
        self._changing = asyncio.Lock()
        self.swaps: Counter[str] = Counter()
        """How many swaps ended, by "done" and "failed"."""
        self.load_seconds = 0.0
        """How long the last load took."""

    def observe(self, observer: Observer) -> Callable[[], None]:
        """Tell ``observer`` what happens to turns, whichever model is served; call the result to stop that."""
        self._watching[observer] = self.memory.observe(observer)

        def stop() -> None:
            self._watching.pop(observer)()

        return stop

    @property
    def is_changing(self) -> bool:
        """Whether the model is being swapped, freed or loaded."""
        return self._changing.locked()

    async def load(self) -> None:
        """Load the model that is served.

        Raises:
            AgentMemoryError: it cannot be loaded.
        """
        began = time.perf_counter()
        await asyncio.to_thread(self.memory.load)
        self.load_seconds = time.perf_counter() - began

    async def offload(self, seconds: float) -> bool:
        """Free the model once no turn is in flight, and say whether that was so in time. The next turn loads it."""
        async with self._alone():
            return await asyncio.to_thread(self.memory.unload, seconds)

    async def swap(self, name: str, seconds: float) -> None:
        """Serve another model. No two of them are in memory, so turns in flight get so long to end.

        Raises:
            ApiError: the model is not here, or cannot be loaded; then the one before is served on.
        """
        new = await asyncio.to_thread(self._opened, name)
        async with self._alone():
            old = self.memory
            await asyncio.to_thread(old.unload, seconds, cancel=True)
            self._put(new)
            try:
                await self.load()
            except AgentMemoryError as error:
                await self._back_to(old, new)
                message = f"{name!r} cannot be loaded, {old.model_name!r} is served as before: {error}"
                raise ApiError(SWAP_FAILED, message) from error
            self.swaps["done"] += 1
            if old is not self._first:
                await asyncio.to_thread(old.close)

    def close(self) -> None:
        """Close the memory that is served, unless its owner does."""
        if self.memory is not self._first:
            self.memory.close()

    def _like_the_first(self, name: str) -> AgentMemory:
        config = self._first.config
        return AgentMemory(model=name, cache_dir=config.cache_dir, disk_budget_mb=config.disk_budget_mb)

    def _opened(self, name: str) -> AgentMemory:
        """The memory of a model that is on this machine."""
        try:
            memory = self._open(name)
            if memory.stated_context_length is None:
                raise ApiError(
                    MODEL_NOT_FOUND, f"The model {name!r} is not on this machine: download it first."
                )
        except AgentMemoryError as error:
            raise ApiError(MODEL_NOT_FOUND, str(error), param="model_id") from error
        return memory

    async def _back_to(self, old: AgentMemory, failed: AgentMemory) -> None:
        self.swaps["failed"] += 1
        await asyncio.to_thread(failed.close)
        self._put(old)
        await self.load()
        log.error("the model was not swapped: %s", old.model_name)

    def _put(self, memory: AgentMemory) -> None:
        for observer, stop in self._watching.items():
            stop()
            self._watching[observer] = memory.observe(observer)
        self.memory = memory

    def _alone(self) -> asyncio.Lock:
        """For one change of the model at a time.

        Raises:
            ApiError: another one is going on.
        """
        if self._changing.locked():
            raise ApiError(BUSY, "The model is being changed already: ask again when that is done.")
        return self._changing
