"""ModelManager: several models of several kinds in one memory.

with ModelManager("config.json") as manager:
    model = manager.get_model("small")
    print(model.generate("My name is Ada."))
"""

from __future__ import annotations

import atexit
import importlib
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from agent_memory_core import AgentMemory, AgentMemoryError, BackendMissing, InvalidSetting
from agent_memory_core.manager.backends import mlx, openai
from agent_memory_core.manager.backends.base import Backend
from agent_memory_core.manager.backends.gguf import GgufBackend
from agent_memory_core.manager.backends.huggingface import HuggingFaceBackend
from agent_memory_core.manager.backends.mlx import GivenMlx, MlxBackend, config_of
from agent_memory_core.manager.backends.openai import OpenAIBackend
from agent_memory_core.manager.books import Books, Entry, State
from agent_memory_core.manager.config import (
    MIB,
    ManagerConfig,
    ModelConfig,
)
from agent_memory_core.manager.errors import ModelLoadFailed, UnknownModel
from agent_memory_core.manager.events import Callbacks
from agent_memory_core.manager.handle import ManagedModel
from agent_memory_core.manager.machine import default_limit, gauges
from agent_memory_core.manager.parameters import near
from agent_memory_core.manager.pool import Pool, Slot, engine_of, unwatch, watch
from agent_memory_core.manager.stats import ModelStats, stats_of

log = logging.getLogger("agent_memory")

BACKENDS: dict[str, Backend] = {
    "mlx": MlxBackend(),
    "gguf": GgufBackend(),
    "huggingface": HuggingFaceBackend(),
    "openai": OpenAIBackend(),
}
"""What runs each type of models."""

FRAMEWORKS = {"langchain": "langchain_agent_memory", "llama_index": "llama_index_agent_memory"}
"""The packages whose ``managed`` module makes a framework's model of a managed one."""


class ModelManager:
    """Loads models when they are used, and unloads others to make room, by priority and last use.

    Any number of threads may use it. A model in use is never unloaded to make room; a request that needs its room
    waits, and is served in the order in which requests came.

    Args:
        config: a configuration, or the path of a .json or .toml file; None begins with no models.
        clock: seconds, monotonic; by it idle times and waiting times count.

    Raises:
        InvalidSetting: the configuration cannot be used.
    """

    def __init__(
        self,
        config: ManagerConfig | str | os.PathLike[str] | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._callbacks = Callbacks()
        self._config = ManagerConfig()
        self._warned: set[str] = set()
        self._preloaded = threading.Event()
        books = Books(default_limit())
        self._pool = Pool(books, clock, self._config.load_timeout, self._callbacks.tell)
        self._handles: dict[str, ManagedModel] = {}
        if config is not None:
            self.load_config(config)
        else:
            self._preloaded.set()
        self._keeper = threading.Thread(target=self._keep_house, name="agent-memory-manager", daemon=True)
        self._keeper.start()
        _managers.add(self)

    # -- configuration ------------------------------------------------------------------------------------

    def load_config(self, config: ManagerConfig | str | os.PathLike[str]) -> None:
        """Replace the configuration. A model that is loaded and no longer configured is unloaded when it is idle.

        Raises:
            InvalidSetting: it cannot be used; then nothing changes.
        """
        self._pool.check_open()
        new = config if isinstance(config, ManagerConfig) else ManagerConfig.from_file(config)
        limit = new.max_memory_mb * MIB if new.max_memory_mb is not None else default_limit()
        pool, books = self._pool, self._pool.books
        with pool.changed:
            slots = [self._slot_for(model, limit) for model in new.models]
            self._config = new
            pool.load_timeout = new.load_timeout
            books.limit = limit
            books.fair_after, books.min_loaded_time = new.fair_after, new.min_loaded_time
            books.strict_priority = new.strict_priority
            for slot in pool.slots.values():
                slot.entry.leaves = True
            for slot in slots:
                self._put(slot)
            self._warn_of_pinned()
            self._preloaded.clear()
            pool.changed.notify_all()

    def add_model_config(self, config: ModelConfig) -> None:
        """Add a model.

        Raises:
            InvalidSetting: there is another one of that name, or the same one under another name; nothing changes.
        """
        self._add(config, None)

    def add_engine(self, memory: AgentMemory) -> ManagedModel:
        """Add an engine that is there already, under the name of its model. Whoever made it closes it.

        Raises:
            InvalidSetting: there is another model of that name; nothing changes.
        """
        config = config_of(memory)
        self._add(config, GivenMlx(memory))
        return self._handles[config.name]

    def _add(self, config: ModelConfig, backend: Backend | None) -> None:
        self._pool.check_open()
        with self._pool.changed:
            known = {model.name: model for model in self._config.models}
            if config.name in known:
                if known[config.name] == config and backend is None:
                    return
                raise InvalidSetting(f"there is another model called {config.name!r}: choose another name.")
            changed = self._config.replaced(models=(*self._config.models, config))
            slot = self._slot_for(config, self._pool.books.limit, backend)
            self._config = changed
            self._put(slot)

    def remove_model_config(self, name: str) -> None:
        """Remove a model that is not in memory.

        Raises:
            UnknownModel: there is none of that name.
            InvalidSetting: it is in memory or waited for, or another setting names it; nothing changes.
        """
        slot, pool = self._slot(name), self._pool
        with pool.changed:
            if not pool.is_idle(slot):
                raise InvalidSetting(f"the model {name!r} is in memory: unload it first.")
            rest = tuple(model for model in self._config.models if model.name != name)
            self._config = self._config.replaced(models=rest)
            unwatch(pool, slot)
            del pool.slots[name], pool.books.entries[name], self._handles[name]

    def _slot_for(self, config: ModelConfig, limit: int, backend: Backend | None = None) -> Slot:
        """What a model is managed by: what is there for it already, or a new one, which is not managed yet."""
        old = self._pool.slots.get(config.name)
        if old is not None and old.config == config and backend is None:
            return old
        if old is not None and not self._pool.is_idle(old):
            raise InvalidSetting(f"the model {config.name!r} is loaded with other settings: unload it first.")
        backend = backend or BACKENDS[config.type]
        entry = Entry(
            config.name,
            priority=config.memory_priority,
            idle_limit=config.idle_limit,
            pinned=config.pinned,
            need=backend.estimate(config, limit),
        )
        gate = threading.Semaphore(config.concurrency) if config.concurrency is not None else None
        slot = Slot(config, entry, backend, limit, gate=gate)
        engine_of(slot)
        return slot

    def _put(self, slot: Slot) -> None:
        """Manage a model from now on."""
        pool, name = self._pool, slot.name
        if (old := pool.slots.get(name)) is not None and old is not slot:
            unwatch(pool, old)
        pool.slots[name] = slot
        pool.books.entries[name] = slot.entry
        slot.entry.leaves = False
        self._handles.setdefault(name, ManagedModel(pool, name))
        watch(pool, slot)

    def _warn_of_pinned(self) -> None:
        entries = [slot.entry for slot in self._pool.slots.values() if not slot.entry.leaves]
        pinned = sum(entry.need for entry in entries if entry.pinned)
        largest = max((entry.need for entry in entries if not entry.pinned), default=0)
        if pinned and pinned + largest > self._pool.books.limit:
            log.warning(
                "the pinned models and the largest other one need %d MiB together, and all models may take %d: that "
                "one can never be loaded beside them",
                (pinned + largest) // MIB,
                self._pool.books.limit // MIB,
            )

    def list_available_models(self) -> list[str]:
        """The names of the configured models."""
        return [model.name for model in self._config.models]

    def list_loaded_models(self) -> list[str]:
        """The names of the models in memory."""
        return [slot.name for slot in self._pool.slots.values() if slot.entry.state is State.READY]

    # -- models -------------------------------------------------------------------------------------------

    def get_model(
        self, name: str, *, load: bool = True, fallback: bool = True, timeout: float | None = None
    ) -> ManagedModel:
        """The model of a name: the same object every time, whether it is loaded or not.

        Args:
            load: load it now, so that an error comes from here.
            fallback: take one of the models that its configuration names where it cannot be loaded.
            timeout: seconds to wait for it; None is ``load_timeout`` of the configuration.

        Raises:
            UnknownModel: there is none of that name.
            ModelLoadFailed: neither it nor a fallback can be loaded; of several errors, the first.
            BackendMissing: the library that runs it is not installed.
        """
        slot = self._slot(name)
        if load:
            try:
                self._pool.acquire(slot, timeout)
                self._pool.release(slot)
            except (ModelLoadFailed, BackendMissing) as error:
                return self._fallback(slot, timeout, error if fallback else None) or _raise(error)
        return self._handles[name]

    def _fallback(
        self, slot: Slot, timeout: float | None, error: AgentMemoryError | None
    ) -> ManagedModel | None:
        for name in slot.config.fallback if error is not None else ():
            try:
                model = self.get_model(name, timeout=timeout)
            except (ModelLoadFailed, BackendMissing) as other:
                log.warning(
                    "the model %r, in place of %r, cannot be loaded either: %s", name, slot.name, other
                )
            else:
                log.warning("the model %r is taken in place of %r: %s", model.name, slot.name, error)
                self._callbacks.tell("fallback", model.name)
                return model
        return None

    def _slot(self, name: str) -> Slot:
        self._pool.check_open()
        names = self.list_available_models()
        if name not in names:
            raise UnknownModel(f"there is no model {name!r}: {near(name, names)}")
        return self._pool.slots[name]

    def get_model_for_agent(self, agent_name: str, *, load: bool = True) -> ManagedModel:
        """The model of an agent, by the configuration's ``agents``, or the default one.

        Raises:
            UnknownModel: there is no model at all.
        """
        return self.get_model(self.model_name_for_agent(agent_name), load=load)

    @property
    def default_model(self) -> str | None:
        """The name of the model of whoever has none of his own; None where no model is configured."""
        config = self._config
        return config.default_model or (config.models[0].name if config.models else None)

    def engine(self, name: str) -> AgentMemory:
        """The engine of a model on MLX, loaded or not. Each of its turns loads it, and holds a lease.

        Raises:
            UnknownModel: there is none of that name.
            InvalidSetting: it is of another type.
        """
        memory = engine_of(self._slot(name))
        if memory is None:
            raise InvalidSetting(f"the model {name!r} has no engine: it is not of the type mlx.")
        return memory

    def model_name_for_agent(self, agent_name: str) -> str:
        """The name of the model of an agent.

        Raises:
            UnknownModel: there is no model at all.
        """
        config = self._config
        if agent_name in config.agents:
            return config.agents[agent_name]
        name = self.default_model
        if name is None:
            raise UnknownModel(f"there is no model for the agent {agent_name!r}: no model is configured.")
        if agent_name not in self._warned:
            self._warned.add(agent_name)
            log.warning(
                "the agent %r is not under agents in the configuration and gets the model %r",
                agent_name,
                name,
            )
        return name

    def get_chat_model(self, name: str, framework: str = "langchain", **overrides: Any) -> Any:
        """A framework's own chat model of a managed one; it asks for the model at every call, and loads nothing now.

        Args:
            framework: langchain or llama_index.
            overrides: further fields of that model.

        Raises:
            UnknownModel: there is none of that name.
            InvalidSetting: the framework is unknown.
            BackendMissing: it is not installed.
        """
        slot = self._slot(name)
        package = FRAMEWORKS.get(framework)
        if package is None:
            raise InvalidSetting(f"framework={framework!r} is not valid: {near(framework, FRAMEWORKS)}")
        try:
            managed = importlib.import_module(f"{package}.managed")
        except ImportError as error:
            extra = framework.replace("_", "-")
            raise BackendMissing(f"pip install 'agent-memory-mlx[{extra}]' ({error}).") from error
        settings = slot.config.sampling | self.settings_of(slot.config)
        return managed.chat_model(self._handles[name], {**settings, **overrides})

    def settings_of(self, config: ModelConfig) -> dict[str, Any]:
        """How others reach a model: on MLX the settings of its engine, of an endpoint the fields of a client."""
        if config.type == "mlx":
            return mlx.settings_of(config, self._pool.slots[config.name].limit)
        return openai.client_of(config) if config.type == "openai" else {}

    # -- memory -------------------------------------------------------------------------------------------

    def unload_model(self, name: str, force: bool = False, timeout: float | None = None) -> bool:
        """Unload a model; return whether it was unloaded. One that is in use stays, unless ``force``.

        Args:
            force: let no new call in, wait for those under way, then withdraw them: their readers get `Cancelled`.
            timeout: seconds to wait for them; None is ``drain_timeout`` of the configuration, and 0 without ``force``.

        Raises:
            UnknownModel: there is none of that name.
        """
        usual = self._config.drain_timeout if force else 0.0
        patience = usual if timeout is None else timeout
        return self._pool.unload(self._slot(name), force=force, timeout=patience)

    def set_memory_limit(self, mb: int) -> int:
        """Change the memory of all models together, and unload idle ones until it is kept.

        Returns:
            The MiB that models in use are still over it.

        Raises:
            InvalidSetting: ``mb`` is not a number above 0.
        """
        if not isinstance(mb, int) or mb < 1:
            raise InvalidSetting(f"mb={mb!r} is not valid: a number of MiB from 1 on.")
        self._pool.check_open()
        with self._pool.changed:
            self._pool.books.limit = mb * MIB
            self._pool.changed.notify_all()
        return -(-self._pool.shrink("the new limit") // MIB)

    def get_memory_usage(self) -> dict[str, Any]:
        """MiB that models take, by the manager's books, and what the process and MLX themselves say they hold."""
        with self._pool.changed:
            books = self._pool.books
            models = {e.name: round(e.nbytes / MIB, 1) for e in books.entries.values() if e.nbytes}
            total, limit = books.used, books.limit
        return {
            "total_mb": round(total / MIB, 1),
            "limit_mb": limit // MIB,
            "available_mb": round(max(0, limit - total) / MIB, 1),
            "loaded_models": self.list_loaded_models(),
            "models": models,
            **gauges(),
        }

    def get_model_stats(self) -> dict[str, ModelStats]:
        """What became of each model so far, by its name."""
        with self._pool.changed:
            now = self._pool.clock()
            return {slot.name: stats_of(slot, now) for slot in self._pool.slots.values()}

    def estimate(self, name: str) -> int:
        """The bytes that a model will take, before it is loaded; what it took, after."""
        return self._slot(name).entry.need

    # -- events -------------------------------------------------------------------------------------------

    def register_callback(self, event: str, callback: Callable[[str], object]) -> Callable[[], None]:
        """Call a function with a model's name at every event of a kind; return what ends that.

        It is called in the thread that caused the event, and may use the manager. What it raises is logged.

        Args:
            event: one of `EVENTS`.

        Raises:
            InvalidSetting: there is no such event.
        """
        return self._callbacks.register(event, callback)

    # -- its thread, and its end --------------------------------------------------------------------------

    def preloaded(self, timeout: float | None = None) -> bool:
        """Wait until the models that are to be loaded ahead were tried; return whether they were within ``timeout``."""
        return self._preloaded.wait(timeout)

    def _keep_house(self) -> None:
        pool = self._pool
        while not pool.closed:
            if not self._preloaded.is_set():
                self._preload()
                self._preloaded.set()
            pool.expire()
            with pool.changed:
                if pool.closed or not self._preloaded.is_set():
                    continue
                expiry = pool.books.next_expiry()
                pool.changed.wait(None if expiry is None else max(0.05, expiry - pool.clock() + 0.01))

    def _preload(self) -> None:
        models = [model for model in self._config.models if model.preload]
        for model in sorted(models, key=lambda model: model.memory_priority):
            slot = self._pool.slots[model.name]
            if self._pool.begin_preload(slot):
                try:
                    self._pool.load(slot, leased=False)
                except AgentMemoryError as error:
                    log.warning("the model %r was not loaded ahead: %s", model.name, error)

    @property
    def closed(self) -> bool:
        """Whether it was shut down."""
        return self._pool.closed

    def shutdown(self, timeout: float = 30) -> None:
        """Let no more calls in, wait for those under way, withdraw those that stay, and unload all models.

        Engines that were given to it are left to whoever made them.

        Args:
            timeout: seconds to wait for calls.
        """
        pool = self._pool
        with pool.changed:
            already, pool.closed = pool.closed, True
            pool.changed.notify_all()
        if already:
            return
        self._keeper.join()
        end = time.monotonic() + timeout
        for slot in list(pool.slots.values()):
            if not isinstance(slot.backend, GivenMlx):
                pool.unload(slot, force=True, timeout=max(0.0, end - time.monotonic()))
            unwatch(pool, slot)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()


def _raise(error: BaseException) -> ManagedModel:
    raise error


_managers: weakref.WeakSet[ModelManager] = weakref.WeakSet()
_process = os.getpid()


@atexit.register
def _shut_all_down() -> None:
    if os.getpid() == _process:
        for manager in list(_managers):
            manager.shutdown(timeout=0)
