"""The models that are served: one that is meant where a request names none, and those of a configuration."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from agent_memory_core import AgentMemory, AgentMemoryError, BlocksEvicted, InvalidSetting, TurnEvent
from agent_memory_core.manager import ManagerConfig, ModelManager
from agent_memory_core.server.errors import BUSY, MODEL_NOT_FOUND, SWAP_FAILED, ApiError
from agent_memory_core.server.logs import log

Observer = Callable[[TurnEvent | BlocksEvicted], None]
OpenModel = Callable[[str], AgentMemory]

_NO_LIMIT = sys.maxsize >> 20
"""MiB of the models of a server that has only one at a time: it takes what it takes."""


class Host:
    """Holds the models, through a manager that loads, unloads and swaps them.

    Args:
        source: the engine that is served, which its owner closes; or the manager of several models, all on MLX, of
            which those stay that are configured in it.
        open_model: makes the engine of another model, without loading it.

    Raises:
        InvalidSetting: a configured model is not on MLX, or there is none.
    """

    def __init__(self, source: AgentMemory | ModelManager, open_model: OpenModel | None = None) -> None:
        self._owns_manager = isinstance(source, AgentMemory)
        self._brought: dict[str, AgentMemory | None] = {}
        """Models that are served in place of the configured ones, with the engines that are closed here."""
        if isinstance(source, AgentMemory):
            self.manager = ModelManager(ManagerConfig(max_memory_mb=_NO_LIMIT))
            self.served = self.manager.add_engine(source).name
            self._brought[self.served] = None
        else:
            self.manager = source
            self.served = _first_of(source)
        self._open = open_model or self._like_the_served
        self._watching: dict[Observer, dict[AgentMemory, Callable[[], None]]] = {}
        self._lock = threading.Lock()
        self._changing = asyncio.Lock()
        self._contexts: dict[str, int] = {}
        self.swaps: Counter[str] = Counter()
        """How many swaps ended, by "done" and "failed"."""

    @property
    def memory(self) -> AgentMemory:
        """The engine that is meant where no model is named."""
        return self.engine(self.served)

    @property
    def load_seconds(self) -> float:
        """How long the last load of the model took that is meant where none is named."""
        return self.manager.get_model_stats()[self.served].load_seconds

    def engine(self, name: str) -> AgentMemory:
        """The engine of a model, loaded or not; a turn of it loads it."""
        memory = self.manager.engine(name)
        with self._lock:
            for observer, watched in self._watching.items():
                if memory not in watched:
                    watched[memory] = memory.observe(observer)
        return memory

    def names(self) -> list[str]:
        """The models that requests can name, the one that is meant where they name none first."""
        names = self.manager.list_available_models()
        return sorted(names, key=lambda name: name != self.served)

    def with_cold_tier(self) -> list[AgentMemory]:
        """The engines that keep a copy of their sessions in an object store, one of each store."""
        found = {memory.config.cache_dir: memory for memory in map(self.engine, self.names())}
        return [memory for folder, memory in found.items() if folder is not None and memory.config.cold_url]

    def context_of(self, name: str) -> int:
        """Most tokens of prompt and answer of a model; 0 until it says it."""
        return self._contexts.get(name) or self.engine(name).stated_context_length or 0

    def sampling_of(self, name: str) -> dict[str, Any]:
        """What the configuration of a model says of its answers, where requests do not."""
        return self.manager.get_model(name, load=False).config.sampling

    def observe(self, observer: Observer) -> Callable[[], None]:
        """Tell ``observer`` what happens to turns of any model; call the result to stop that."""
        self._watching[observer] = {}
        for name in self.names():
            self.engine(name)

        def stop() -> None:
            for stop_one in self._watching.pop(observer).values():
                stop_one()

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
        await asyncio.to_thread(self._load, self.served)

    def _load(self, name: str) -> None:
        self.manager.get_model(name, fallback=False)
        self._contexts[name] = self.engine(name).context_length

    async def offload(self, seconds: float, name: str = "") -> bool:
        """Free a model once no turn is in flight, and say whether that was so in time. The next turn loads it."""
        async with self._alone():
            model = self.manager.get_model(name or self.served, load=False)
            done = await asyncio.to_thread(self.manager.unload_model, model.name, timeout=seconds)
            return done or not model.loaded

    async def free_idle(self, limits: Mapping[str, float]) -> list[str]:
        """Free those of the models that nobody has used for as many seconds as each of them is kept; return them."""
        freed: list[str] = []
        if self._changing.locked():
            return freed
        stats = self.manager.get_model_stats()
        for name in limits.keys() & stats.keys():
            one = stats[name]
            is_idle = one.state == "ready" and not one.leases and one.idle_seconds >= limits[name]
            if is_idle and await asyncio.to_thread(self.manager.unload_model, name):
                log.info("the model %s was not used and was freed", name)
                freed.append(name)
        return freed

    async def swap(self, name: str, seconds: float) -> None:
        """Serve another model where requests name none. Turns in flight of the one before get so long to end, and it
        has left memory before the other one is loaded.

        Raises:
            ApiError: the model is not here, or cannot be loaded; then the one before is served on.
        """
        async with self._alone():
            await asyncio.to_thread(self._swap, name, seconds)

    def close(self) -> None:
        """Close the engines that were opened here."""
        if self._owns_manager:
            self.manager.shutdown(timeout=0)
        for memory in self._brought.values():
            if memory is not None:
                memory.close()

    def _swap(self, name: str, seconds: float) -> None:
        old = self.served
        if name not in self.manager.list_available_models():
            name = self._bring(name)
        if not self.manager.unload_model(old, force=True, timeout=seconds) and self._is_loaded(old):
            raise ApiError(BUSY, f"The model {old!r} is in use and was not swapped: ask again later.")
        try:
            self._load(name)
        except AgentMemoryError as error:
            self.swaps["failed"] += 1
            log.error("the model was not swapped: %s", old)
            self._drop(name, unless=old)
            self._load(old)
            message = f"{name!r} cannot be loaded, {old!r} is served as before: {error}"
            raise ApiError(SWAP_FAILED, message) from error
        self.served = name
        self.swaps["done"] += 1
        self._drop(old, unless=name)

    def _is_loaded(self, name: str) -> bool:
        return self.manager.get_model(name, load=False).loaded

    def _bring(self, name: str) -> str:
        """Manage a model that is on this machine and not configured; return its name here."""
        try:
            memory = self._open(name)
            if memory.stated_context_length is None:
                raise ApiError(
                    MODEL_NOT_FOUND, f"The model {name!r} is not on this machine: download it first."
                )
            known = self.manager.add_engine(memory).name
        except AgentMemoryError as error:
            raise ApiError(MODEL_NOT_FOUND, str(error), param="model_id") from error
        self._brought[known] = memory
        return known

    def _drop(self, name: str, *, unless: str) -> None:
        """Manage a model no more that is not configured, and close its engine, if it was opened here."""
        if name not in self._brought or name == unless:
            return
        memory = self.manager.engine(name)
        # A turn that began before the swap may have loaded it once more.
        self.manager.unload_model(name, force=True, timeout=0)
        self.manager.remove_model_config(name)
        with self._lock:
            for watched in self._watching.values():
                watched.pop(memory, lambda: None)()
        if (opened := self._brought.pop(name)) is not None:
            opened.close()

    def _like_the_served(self, name: str) -> AgentMemory:
        config = self.memory.config
        return AgentMemory(model=name, cache_dir=config.cache_dir, disk_budget_mb=config.disk_budget_mb)

    def _alone(self) -> asyncio.Lock:
        """For one change of the model at a time.

        Raises:
            ApiError: another one is going on.
        """
        if self._changing.locked():
            raise ApiError(BUSY, "The model is being changed already: ask again when that is done.")
        return self._changing


def _first_of(manager: ModelManager) -> str:
    """The model that is meant where no model is named."""
    for name in manager.list_available_models():
        kind = manager.get_model(name, load=False).type
        if kind != "mlx":
            raise InvalidSetting(
                f"the model {name!r} is of the type {kind}, and the server serves models on MLX: leave it out."
            )
    if (first := manager.default_model) is None:
        raise InvalidSetting("no model is configured: name at least one.")
    return first
