"""Models behind HTTP: what every path that runs turns has in common."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response

from agent_memory_core import AgentMemory, AgentMemoryError, InvalidSetting, StoreError, TurnReport
from agent_memory_core.manager import ModelManager
from agent_memory_core.server.answers import Answer
from agent_memory_core.server.catalog import Catalog
from agent_memory_core.server.choices import Choices
from agent_memory_core.server.coordination import Talks
from agent_memory_core.server.deadlines import time_limit
from agent_memory_core.server.errors import GONE, ApiError, from_core
from agent_memory_core.server.health import Health
from agent_memory_core.server.host import Host, OpenModel
from agent_memory_core.server.keys import Keys
from agent_memory_core.server.logs import log
from agent_memory_core.server.metrics import Metrics
from agent_memory_core.server.process import release_freed_memory
from agent_memory_core.server.rates import Rates
from agent_memory_core.server.recent import RecentTurns
from agent_memory_core.server.records import Records
from agent_memory_core.server.requests import Asked, Body, Client, Reader
from agent_memory_core.server.sessions import NO_THREAD, Thread, session_of
from agent_memory_core.server.settings import ServerSettings
from agent_memory_core.server.sse import EventStream, Writer, encoded, events
from agent_memory_core.server.threads import Threads
from agent_memory_core.server.turns import Call, Turn, Turns

T = TypeVar("T")

_STEP = 0.2
"""Seconds that uploads are waited for before it is looked whether there is time left."""

_LOOK = 5.0
"""Seconds after which it is looked again for memory and for models that can be freed."""

_LEAST_LOOK = 0.1
"""The same where a model is kept for less."""


class Server:
    """One model behind HTTP, or several, see `Host`."""

    def __init__(
        self,
        source: AgentMemory | ModelManager,
        settings: ServerSettings,
        open_model: OpenModel | None = None,
    ) -> None:
        self.settings = settings
        self.host = Host(source, open_model)
        self.keys = Keys(settings)
        self.turns = Turns(self.host, settings, self.keys)
        self.catalog = Catalog(self.host, settings)
        self.health = Health(self.host, self.turns)
        self.reader = Reader(self.host, settings)
        self.rates = Rates(settings)
        self.records = Records(self.host, settings.keep_days)
        self.threads = Threads(self.records)
        self.metrics = Metrics(self.host, self.turns, settings.metrics_dialect)
        self.recent = RecentTurns(self.host)
        self.talks = Talks(self.host, settings)
        self.on_failure: Callable[[], None] = lambda: None
        """What is done where the model cannot be loaded."""
        self.read_settings: Callable[[], ServerSettings] = lambda: settings
        """Reads the settings again."""
        self.closing: list[Callable[[], None]] = []
        """What ends with the server."""

    async def load(self) -> None:
        """Load the model; meanwhile, and if that fails, the server says that it is not ready."""
        try:
            await self.host.load()
        except AgentMemoryError as error:
            self.health.failure = error
            self.on_failure()
            return
        self.turns.loaded = True

    async def free_memory(self) -> None:
        """Give back to the system what was freed, again and again until it is cancelled."""
        while True:
            await asyncio.sleep(_LOOK)
            await asyncio.to_thread(release_freed_memory)

    async def free_models(self) -> None:
        """Free each model that had no turn for as long as it is kept, until it is cancelled."""
        keeping = self.turns.keeping
        while True:
            # Settings may be read again meanwhile.
            limits = keeping.limits(self.host.names(), self.settings.ttl)
            await keeping.asked(max(_LEAST_LOOK, min([_LOOK, *limits.values()])))
            if self.turns.loaded:
                now = keeping.limits(self.host.names(), self.settings.ttl)
                for model in await self.host.free_idle(now):
                    keeping.freed(model)

    def reload(self) -> bool:
        """Take other keys, limits, names of the model and another log level, while requests go on.

        Where a setting is wrong, those that are there stay, the log tells why, and the result is False.
        """
        try:
            settings = self.read_settings()
            self.keys.read(settings)
        except InvalidSetting as error:
            log.error("the settings stay as they are: %s", error)
            return False
        self.rates.read(settings)
        self.catalog.read(settings)
        log.setLevel(settings.log_level.upper())
        log.info("the settings were read again")
        self.settings = settings
        return True

    async def drain(self, seconds: float) -> bool:
        """Take no more turns, let those in flight end, then upload what waits for the object store; all of it within so
        many seconds. Say whether everything is there.
        """
        deadline = time.monotonic() + seconds
        await self.turns.drain(seconds)
        try:
            for memory in self.host.with_cold_tier():
                await asyncio.to_thread(memory.flush)
                # In short steps, so that a second signal ends it.
                while not await asyncio.to_thread(memory.cold.flush, _STEP):
                    if time.monotonic() > deadline:
                        return False
        except StoreError as error:
            log.warning("nothing can be uploaded: %s", error)
            return False
        return True

    def close(self) -> None:
        """Stop watching the memory, and close what was opened here."""
        for close in self.closing:
            close()
        self.turns.close()
        self.metrics.close()
        self.records.close()
        self.recent.close()
        self.talks.close()
        self.host.close()

    async def run(
        self,
        request: Request,
        call: Call,
        whole: Callable[[Call, Answer], dict[str, Any]],
        writer: Callable[[Call], Writer],
    ) -> Response:
        """Answer a call, whole or as a stream."""
        self.rates.check(request.state.tenant, call.key)
        turn = request.state.turn = await self.turns.begin(call, request.state.request_id)
        headers = _headers(call)
        if call.stream:
            return _stream(turn, writer(call), self.settings.keep_alive, headers)
        try:
            answer = await _unless_gone(request, turn.answer())
        except AgentMemoryError as error:
            raise from_core(error) from error
        finally:
            await turn.close()
        return json_response(whole(call, answer), headers | _of_report(answer.ended))

    async def run_several(
        self,
        request: Request,
        call: Call,
        count: int,
        whole: Callable[[Call, list[Answer]], dict[str, Any]],
        stream: Callable[[Choices, Call, float], tuple[AsyncIterator[bytes], Writer]],
    ) -> Response:
        """Answer a call ``count`` times, whole or as a stream."""
        self.rates.check(request.state.tenant, call.key)
        first = request.state.turn = await self.turns.begin(call, request.state.request_id)
        choices, headers = Choices(self.turns, first, count), _headers(call)
        if call.stream:
            return EventStream(choices, *stream(choices, call, self.settings.keep_alive), headers)
        try:
            answers = await _unless_gone(request, choices.answers())
        except AgentMemoryError as error:
            raise from_core(error) from error
        finally:
            await choices.close()
        return json_response(whole(call, answers), headers | _of_report(answers[0].ended))

    async def count(self, call: Call) -> int:
        """How many tokens the prompt of a call has.

        Raises:
            ApiError: the model is not loaded, or its template refuses the messages.
        """
        self.turns.check_loaded()
        try:
            return await asyncio.to_thread(self.host.engine(call.served).count_tokens, call.request)
        except AgentMemoryError as error:
            raise from_core(error) from error

    def time_limit(self, request: Request, *, stream: bool) -> float | None:
        """The seconds that an answer gets; None is no limit. Raises as `deadlines.time_limit` does."""
        return time_limit(request.state.headers, self.settings, stream=stream)

    def client(self, request: Request, body: Body, thread: Thread = NO_THREAD, *, stream: bool) -> Client:
        """Who asks. ``thread`` is the conversation that the server holds."""
        state = request.state
        said = body.model_dump(include={"session_id", "prompt_cache_key", "metadata"})
        session = session_of(state.headers, said, thread)
        return Client(state.tenant, session, self.time_limit(request, stream=stream))

    def asked(
        self,
        request: Request,
        body: Body,
        asked: Callable[[], Asked],
        thread: Thread = NO_THREAD,
        *,
        stream: bool,
        **more: Any,
    ) -> Call:
        """The call of a request in any dialect."""
        served = self.catalog.find(body.model)
        try:
            client = self.client(request, body, thread, stream=stream)
            return self.reader.call(asked(), body, client, served=served, stream=stream, **more)
        except AgentMemoryError as error:
            raise from_core(error) from error


def _stream(turn: Turn, writer: Writer, silence: float, headers: Mapping[str, str]) -> EventStream:
    return EventStream(turn, events(turn, writer, silence), writer, headers)


async def apart(work: Callable[[], T]) -> T:
    """The result of what may wait for a disk, off the event loop; an error of the core as one for a client."""
    try:
        return await asyncio.to_thread(work)
    except AgentMemoryError as error:
        raise from_core(error) from error


def json_response(value: dict[str, Any], headers: dict[str, str], status: int = 200) -> Response:
    """An answer in JSON."""
    return Response(encoded(value), status, headers, "application/json")


def _of_report(report: TurnReport) -> dict[str, str]:
    """What a turn reused, as a header; streams tell it in their last event."""
    said = {
        "hit": report.hit_tier,
        "cached": report.usage.cache_read,
        "computed": report.usage.cache_creation,
        "miss": report.miss_reason,
        "restore_ms": round(report.restore_seconds * 1000),
        "ttft_ms": round(report.time_to_first_token * 1000),
    }
    return {"X-Agent-Memory": "; ".join(f"{name}={value}" for name, value in said.items())}


def _headers(call: Call) -> dict[str, str]:
    headers = {"X-Agent-Memory-Session-Source": call.session.source}
    if call.ignored:
        headers["X-Agent-Memory-Ignored"] = ", ".join(sorted(set(call.ignored)))
    if call.session.session_id is not None and call.session.session_id.isascii():
        headers["X-Session-ID"] = call.session.session_id
    return headers


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is given up when the client goes away."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(GONE, "The client went away.")
        return task.result()
    finally:
        gone.cancel()
        task.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
