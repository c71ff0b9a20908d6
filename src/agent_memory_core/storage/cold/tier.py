"""The cold tier of one store: what runs the uploads, and what the rest of the program asks.

One daemon thread has an event loop, in which all requests to the object store run. Changed sessions wait in a queue
that the catalog keeps (`book`), so it survives a restart; one push of a session carries all its changes. A push that
fails is tried again, ever more rarely, as long as the process runs and when the next one opens the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, TimeoutError as TooLate
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Self, TypeVar

from agent_memory_core.config import ColdAck, EngineConfig
from agent_memory_core.errors import StoreError
from agent_memory_core.storage.cold.book import WHOLE, Book, Owner
from agent_memory_core.storage.cold.mirror import Mirror
from agent_memory_core.storage.cold.names import Namespaces
from agent_memory_core.storage.cold.objects import ColdFailure, Objects, open_bucket
from agent_memory_core.storage.cold.sweep import Swept, sweep
from agent_memory_core.storage.cold.texts import Texts
from agent_memory_core.storage.master_key import read_master_key

if TYPE_CHECKING:
    from agent_memory_core.storage.block_store import BlockStore

log = logging.getLogger("agent_memory")

T = TypeVar("T")

FRESH = 60.0
"""Seconds for which a head that was looked at is not looked at again."""

PUSHERS = 4
"""Most sessions that are uploaded at a time."""

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
"""Seconds until a push that failed is tried again: at first, and at most."""

_MOST_LOOKED = 10_000
_WITHOUT_LIMIT = 10 * 365 * 24 * 3600.0


@dataclass(frozen=True, slots=True)
class ColdStatus:
    """What a cold tier has done since it was opened, and what it has still to do."""

    waiting: int
    """sessions that have changed and are not uploaded yet"""
    waiting_turns: int
    """commits of these since they were uploaded last, one for each turn and each prompt that was read ahead: no more is
    lost with this disk"""
    forgetting: int
    """sessions that are still to be forgotten there"""
    failure: str
    """why the last upload failed; empty if it did not"""
    pushed: int
    """sessions uploaded, counted each time"""
    pulled: int
    """sessions downloaded, counted each time"""
    conflicts: int
    """heads that somebody else changed at the same time; each was read and written again"""
    misses: int
    """records that the bucket lacked, or had damaged"""
    uploaded_bytes: int
    downloaded_bytes: int
    requests: dict[str, int]
    """by kind"""

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values."""
        return asdict(self)


class ColdTier:
    """Keeps a copy of every session of a store in an object store, and fetches those that are not here.

    Any thread may call it. Nothing here raises because the object store is slow, failing, full or gone, but for what
    somebody asks for by hand: `push`, `pull`, `sweep`.

    Args:
        store: the local store.
        bucket: a store of ``obstore``.
        ack: whether a turn is acknowledged when it is on this disk, or when it is in the bucket.
        timeout: seconds that a turn waits for the object store, at its beginning and at its end, and for one request.
        ttl_days: after which a sweep deletes a session that nobody has used; None keeps it.
        master: the master key that seals what is uploaded; None uploads it as it is.
    """

    def __init__(
        self,
        store: BlockStore,
        bucket: Any,
        *,
        ack: ColdAck = "local",
        timeout: float = 10.0,
        ttl_days: float | None = None,
        master: bytes | None = None,
    ) -> None:
        self._ack = ack
        self._timeout = timeout
        self._ttl_days = ttl_days
        self._counts: Counter[str] = Counter()
        self._book = Book(store)
        self._objects = Objects(bucket, timeout)
        self._namespaces = Namespaces(self._objects, master)
        self._texts = Texts(self._objects, self._namespaces)
        self._mirror = Mirror(store, self._book, self._objects, self._namespaces, self._counts)
        self._looking = threading.Lock()
        self._looked: OrderedDict[Owner, float] = OrderedDict()
        self._queue: OrderedDict[Owner, list[Callable[[str], None]]] = OrderedDict()
        self._busy: set[Owner] = set()
        self._pauses: dict[Owner, float] = {}
        self._failure = ""
        self._in_vain = False
        self._closing = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="agent-memory-cold", daemon=True)
        self._thread.start()
        self._soon(self._take_up)

    @classmethod
    def of_config(cls, store: BlockStore, config: EngineConfig) -> Self:
        """The cold tier that the settings name.

        Raises:
            InvalidSetting: ``cold_url`` cannot be used.
        """
        assert config.cold_url is not None
        master = None if config.encryption == "off" else read_master_key(config.encryption)
        return cls(
            store,
            open_bucket(config.cold_url, config.cold_timeout_seconds),
            ack=config.cold_ack,
            timeout=config.cold_timeout_seconds,
            ttl_days=config.cold_ttl_days,
            master=master,
        )

    # -- what a store tells -------------------------------------------------------------------------------

    def committing(self, namespace: str, session_id: str) -> None:
        """Note that a session is to be uploaded, in the transaction that changes it."""
        self._book.mark((namespace, session_id))

    def committed(self, namespace: str, session_id: str) -> None:
        """Upload a session soon."""
        self._soon(self._enqueue, (namespace, session_id))

    def forgetting(self, namespace: str, session_id: str) -> None:
        """Note that a session is to be forgotten there, and do it soon."""
        self._book.mark_forgotten((namespace, session_id))
        self._soon(self._enqueue, (namespace, session_id))

    def forgetting_namespace(self, namespace: str) -> None:
        """Note that a whole namespace is to be deleted there, and do it soon."""
        self.forgetting(namespace, WHOLE)

    def acknowledge(self, namespace: str, session_id: str, done: Callable[[str], None]) -> None:
        """Call ``done`` when a turn is uploaded, at the latest after the timeout; at once if that need not be."""
        if self._ack == "local" or not self._soon(self._enqueue, (namespace, session_id), done):
            done("")

    # -- what a turn needs --------------------------------------------------------------------------------

    def must_look(self, namespace: str, session_id: str) -> bool:
        """Whether a turn should call `look` before it begins: not while what is known of the session is fresh."""
        looked = self._looked.get((namespace, session_id))
        return looked is None or time.monotonic() - looked > FRESH

    def look(self, namespace: str, session_id: str) -> None:
        """Fetch what the bucket has of a session and this store has not. Waits for the timeout at most."""
        if not self.must_look(namespace, session_id):
            return
        owner = (namespace, session_id)
        try:
            self._call(self._mirror.pull(owner, self._timeout)).result(self._timeout + 1.0)
        except (StoreError, OSError, TooLate) as error:
            log.warning(
                "session %r is not looked for in the object store: %s", session_id, str(error) or "too late"
            )
        # Also where it failed: a store that is gone must not make every turn wait.
        self._saw(owner)

    def _saw(self, owner: Owner) -> None:
        with self._looking:
            self._looked[owner] = time.monotonic()
            self._looked.move_to_end(owner)
            while len(self._looked) > _MOST_LOOKED:
                self._looked.popitem(last=False)

    # -- what people ask ----------------------------------------------------------------------------------

    def status(self) -> ColdStatus:
        """What was done and what is to be done."""
        names = ("pushed", "pulled", "conflicts", "misses", "uploaded_bytes", "downloaded_bytes")
        unsent = self._book.unsent()
        return ColdStatus(
            waiting=len(unsent),
            waiting_turns=sum(unsent.values()),
            forgetting=len(self._book.all_forgotten()),
            failure=self._failure,
            requests=dict(self._objects.requests),
            **{name: self._counts[name] for name in names},
        )

    def push(self, session_id: str, namespace: str = "default") -> None:
        """Upload a session now, changed or not.

        Raises:
            ColdFailure: the object store cannot be reached.
        """
        self._call(self._mirror.push((namespace, session_id))).result()

    def pull(self, session_id: str, namespace: str = "default") -> bool:
        """Fetch a session now, however long it takes; say whether there was something to fetch.

        Raises:
            ColdFailure: the object store cannot be reached.
            StoreError: the local store cannot take it.
        """
        return self._call(self._mirror.pull((namespace, session_id), _WITHOUT_LIMIT)).result()

    def read_text(self, kind: str, name: str, namespace: str = "default") -> tuple[bytes, str] | None:
        """A text that was written by `write_text` on any machine, and its e_tag; None if there is none.

        Raises:
            ColdFailure: the object store cannot be reached.
        """
        return self._in_time(self._texts.read(namespace, kind, name))

    def write_text(
        self, kind: str, name: str, text: bytes, e_tag: str | None, namespace: str = "default"
    ) -> bool:
        """Write a text, if nobody has changed it since it had that e_tag, or was not there; say whether it was written.

        Raises:
            ColdFailure: the object store cannot be reached.
        """
        return self._in_time(self._texts.write(namespace, kind, name, text, e_tag))

    def sweep(self, *, dry_run: bool = False) -> Swept:
        """Delete what is too old, and what no session has any more; with ``dry_run`` only count it.

        Raises:
            ColdFailure: the object store cannot be reached.
        """
        return self._call(sweep(self._objects, self._namespaces, self._ttl_days, dry_run=dry_run)).result()

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until every changed session is uploaded, and say whether that is so."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self._book.marked() or self._book.all_forgotten():
            if deadline is not None and time.monotonic() > deadline:
                self._in_vain = True
                return False
            self._soon(self._take_up)
            time.sleep(0.02)
        self._in_vain = False
        return True

    def close(self) -> None:
        """Upload what is waiting, for the timeout at most, and end; the next opening of the store uploads the rest.

        Whoever has waited for that in vain does not wait once more.
        """
        if self._closing:
            return
        if not self._in_vain and not self._failure and self._objects.breaker.wait == 0:
            self.flush(self._timeout)
        self._closing = True
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    # -- the thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            for task in asyncio.all_tasks(self._loop):
                task.cancel()
            self._loop.run_until_complete(_ended(self._loop))
            for waiters in self._queue.values():
                for done in waiters:
                    done("the store was closed before the turn was uploaded.")
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()

    def _soon(self, function: Callable[..., None], *args: Any) -> bool:
        """Call a function in the loop; say whether there is one."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *args)
            return not self._closing
        return False

    def _call(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _in_time(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of a few requests; those of a tier that is closed meanwhile never end."""
        if self._closing:
            work.close()
            raise ColdFailure("the store is closed.")
        try:
            return self._call(work).result(3 * self._timeout)
        except TooLate as error:
            raise ColdFailure(
                f"the object store has not answered for {3 * self._timeout:g} seconds."
            ) from error

    def _take_up(self) -> None:
        """Queue what an earlier process left, and what was put off."""
        for owner in {*self._book.marked(), *self._book.all_forgotten()}:
            if owner not in self._pauses:
                self._enqueue(owner)

    def _enqueue(self, owner: Owner, done: Callable[[str], None] | None = None) -> None:
        waiters = self._queue.setdefault(owner, [])
        if done is not None:
            waiters.append(done)
        self._start()

    def _start(self) -> None:
        for owner in list(self._queue):
            if len(self._busy) >= PUSHERS:
                return
            if not any(map(partial(_exclude, owner), self._busy)):
                self._busy.add(owner)
                self._loop.create_task(self._upload(owner, self._queue.pop(owner)))

    async def _upload(self, owner: Owner, waiters: list[Callable[[str], None]]) -> None:
        work = asyncio.ensure_future(self._bring(owner))
        try:
            await asyncio.wait([work], timeout=self._timeout)
            why = "" if work.done() else f"the object store has not taken it for {self._timeout:g} seconds."
            why = why or await work
            for done in waiters:
                done(why)
            why = await work
        finally:
            work.cancel()
            self._busy.discard(owner)
        self._failure = why
        if why:
            self._put_off(owner, why)
        else:
            self._pauses.pop(owner, None)
        self._start()

    async def _bring(self, owner: Owner) -> str:
        """Do what is noted for a session; return why that cannot be done now."""
        try:
            when = await asyncio.to_thread(self._book.forgotten, owner)
            if when is not None:
                await (
                    self._mirror.forget_namespace(owner[0])
                    if owner[1] == WHOLE
                    else self._mirror.forget(owner, when)
                )
                await asyncio.to_thread(self._book.done_forgetting, owner)
            if await asyncio.to_thread(self._book.mark_of, owner) is not None:
                await self._mirror.push(owner)
                self._saw(owner)
        except (StoreError, OSError) as error:
            return str(error)
        except Exception:
            # The outermost of what this thread does: one fault must not leave a turn waiting, or end all uploads.
            log.exception("the cold tier met a fault")
            return "the cold tier met a fault, see the log."
        return ""

    def _put_off(self, owner: Owner, why: str) -> None:
        if owner not in self._pauses:
            log.warning("session %r is not uploaded until this is mended: %s", owner[1], why)
        pause = self._pauses[owner] = min(2 * self._pauses.get(owner, FIRST_PAUSE / 2), LONGEST_PAUSE)
        self._loop.call_later(pause, self._enqueue, owner)


def _exclude(one: Owner, other: Owner) -> bool:
    """Whether two must not be uploaded at a time: one session twice, or a session and all of its namespace."""
    return one == other or (one[0] == other[0] and WHOLE in (one[1], other[1]))


async def _ended(loop: asyncio.AbstractEventLoop) -> None:
    others = asyncio.all_tasks(loop) - {asyncio.current_task()}
    await asyncio.gather(*others, return_exceptions=True)


__all__ = ["ColdFailure", "ColdStatus", "ColdTier", "Swept"]
