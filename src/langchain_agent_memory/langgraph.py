"""KV that follows LangGraph's threads: a thread that a checkpointer deletes or copies is deleted or copied here too.

    checkpointer = follow(SqliteSaver(connection), llm.memory)

The checkpoints hold the conversation, and KV is only a cache of it that is found by tokens. So new checkpoints, forks
and time travel need no notice. Only the end of a thread, and its copy, cannot be seen in tokens:

    delete_thread                    the session is forgotten
    copy_thread                      the new thread's session begins with all that the old one has, stored once
    prune, strategy "delete"         the sessions are forgotten
    prune, strategy "keep_latest"    nothing: branches that are no longer used make room when room is needed
    delete_for_runs                  sessions of threads of which nothing is left are forgotten

The session of a thread is the one with the thread's id. A conversation that was given a ``session_id`` of its own
may span threads; only its owner forgets it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import wraps
from types import MethodType
from typing import Any, NamedTuple, TypeVar

from langchain_core.runnables import RunnableConfig

from agent_memory_core import AgentMemory, InvalidRequest, SessionNotFound

try:
    from langgraph.checkpoint.base import BaseCheckpointSaver, CheckpointTuple
except ImportError as error:
    raise ImportError(
        "langchain_agent_memory.langgraph needs LangGraph: install the extra langgraph, "
        "pip install 'agent-memory-mlx[langgraph]'."
    ) from error

Saver = TypeVar("Saver", bound=BaseCheckpointSaver[Any])

_FOLLOWERS = "_agent_memory_followers"
"""The attribute under which a saver keeps who follows it."""


def follow(checkpointer: Saver, memory: AgentMemory, namespace: str = "default") -> Saver:
    """Let the sessions of a namespace follow the threads of a checkpointer, and return the checkpointer.

    It stays what it is: the same object, with some methods of this instance wrapped. Following twice changes
    nothing; several memories or namespaces may follow one checkpointer. The checkpointer goes first: where it
    fails nothing is done here, and where this fails (a closed memory) the checkpoints are gone all the same and the
    error says so.
    """
    if _follower(checkpointer, memory, namespace) is None:
        follower = _Follower(memory, namespace)
        for name, effects in _EFFECTS.items():
            _wrap(checkpointer, name, _sync(follower, effects))
            _wrap(checkpointer, f"a{name}", _async(follower, effects))
        _wrap(checkpointer, "delete_for_runs", _runs(follower))
        _wrap(checkpointer, "adelete_for_runs", _aruns(follower))
        _wrap(checkpointer, "put", _put(follower))
        _wrap(checkpointer, "aput", _put(follower))
        checkpointer.__dict__[_FOLLOWERS] = (*checkpointer.__dict__.get(_FOLLOWERS, ()), follower)
    return checkpointer


def reconcile(
    checkpointer: BaseCheckpointSaver[Any],
    memory: AgentMemory,
    namespace: str = "default",
    session_ids: Iterable[str] | None = None,
) -> list[str]:
    """Forget the sessions whose thread has vanished by other ways than this process; return which.

    For threads that a sweeper, a server or another process deletes. Only sessions that were threads are looked at,
    never one whose id the user chose.

    Args:
        checkpointer: where the threads are: all that this namespace has.
        memory: where the sessions are.
        namespace: the sessions' namespace.
        session_ids: ids that are threads, by the caller's word: one that has no checkpoint yet is forgotten. None
            means the sessions that were always named by a thread, also in earlier processes, and the threads that
            this process saw ``checkpointer`` write since ``follow``.

    Raises:
        InvalidRequest: no ids are given and this memory does not follow this checkpointer.
    """
    candidates = _candidates(checkpointer, memory, namespace, session_ids)
    gone = [name for name in _kept(memory, namespace, candidates) if not _exists(checkpointer, name)]
    return [name for name in gone if memory.forget(name, namespace)]


async def areconcile(
    checkpointer: BaseCheckpointSaver[Any],
    memory: AgentMemory,
    namespace: str = "default",
    session_ids: Iterable[str] | None = None,
) -> list[str]:
    """`reconcile` for checkpointers that are used from coroutines."""
    candidates = await asyncio.to_thread(_candidates, checkpointer, memory, namespace, session_ids)
    kept = await asyncio.to_thread(_kept, memory, namespace, candidates)
    gone = [name for name in kept if not await _aexists(checkpointer, name)]
    return [name for name in gone if await asyncio.to_thread(memory.forget, name, namespace)]


class _Effect(NamedTuple):
    """What happens to a session: it is forgotten, or its memory copied to ``target``."""

    session_id: str
    target: str | None = None


class _Follower:
    """A namespace of a memory that follows a checkpointer, and the threads it has seen there."""

    def __init__(self, memory: AgentMemory, namespace: str) -> None:
        self.memory = memory
        self.namespace = namespace
        self.seen: set[str] = set()

    def __deepcopy__(self, memo: object) -> _Follower:
        return self  # a copy of a checkpointer is followed by the same memory

    def do(self, effects: Collection[_Effect]) -> None:
        """Do to the sessions what was done to their threads; doing it twice changes nothing."""
        for effect in effects:
            if effect.target is None:
                self.memory.forget(effect.session_id, self.namespace)
                self.seen.discard(effect.session_id)
                continue
            self.seen.add(effect.target)
            # Nothing to copy, or done before; or an id that cannot be a session's, whose turns are refused anyway.
            with suppress(SessionNotFound, InvalidRequest):
                self.memory.fork(effect.session_id, effect.target, self.namespace)


_under_way: ContextVar[frozenset[tuple[_Follower, _Effect]]] = ContextVar("under_way", default=frozenset())
"""What a call further out will do itself: savers build some methods on others, and a coroutine that calls its
blocking twin would block the event loop here too."""


@contextmanager
def _announced(follower: _Follower, effects: Iterable[_Effect]) -> Iterator[list[_Effect]]:
    """Give those of ``effects`` that no outer call does, and keep inner calls from doing them."""
    outer = _under_way.get()
    own = [effect for effect in effects if (follower, effect) not in outer]
    token = _under_way.set(outer | {(follower, effect) for effect in own})
    try:
        yield own
    finally:
        _under_way.reset(token)


def _deleted(thread_id: object) -> list[_Effect]:
    return [_Effect(str(thread_id))]


def _copied(source_thread_id: object, target_thread_id: object) -> list[_Effect]:
    return [_Effect(str(source_thread_id), str(target_thread_id))]


def _pruned(thread_ids: Sequence[object], *, strategy: str = "keep_latest") -> list[_Effect]:
    return [_Effect(str(thread_id)) for thread_id in thread_ids] if strategy == "delete" else []


Effects = Callable[..., list[_Effect]]
Method = Callable[..., Any]
"""A method of a saver, with the saver as its first argument."""

_EFFECTS: dict[str, Effects] = {"delete_thread": _deleted, "copy_thread": _copied, "prune": _pruned}


def _wrap(saver: BaseCheckpointSaver[Any], name: str, wrapper: Callable[[Method], Method]) -> None:
    """Wrap one method of this instance, if its class has it."""
    if getattr(type(saver), name, None) is getattr(BaseCheckpointSaver, name, None):
        return
    bound = getattr(saver, name)
    method = getattr(bound, "__func__", None) or (lambda self, *args, **kwargs: bound(*args, **kwargs))
    # Bound to the saver, as a method is, so that a copy of the saver has the copy's.
    saver.__dict__[name] = MethodType(wraps(bound)(wrapper(method)), saver)


def _sync(follower: _Follower, effects: Effects) -> Callable[[Method], Method]:
    def wrapper(method: Method) -> Method:
        def followed(self: object, *args: Any, **kwargs: Any) -> Any:
            with _announced(follower, effects(*args, **kwargs)) as own:
                result = method(self, *args, **kwargs)
            follower.do(own)
            return result

        return followed

    return wrapper


def _async(follower: _Follower, effects: Effects) -> Callable[[Method], Method]:
    def wrapper(method: Method) -> Method:
        async def followed(self: object, *args: Any, **kwargs: Any) -> Any:
            with _announced(follower, effects(*args, **kwargs)) as own:
                result = await method(self, *args, **kwargs)
            if own:
                await asyncio.to_thread(follower.do, own)
            return result

        return followed

    return wrapper


def _runs(follower: _Follower) -> Callable[[Method], Method]:
    def wrapper(method: Method) -> Method:
        def followed(self: BaseCheckpointSaver[Any], run_ids: Sequence[object]) -> Any:
            found = {_thread(item) for run in run_ids for item in self.list(None, filter=_of_run(run))}
            result = method(self, run_ids)
            follower.do([_Effect(name) for name in found if not _exists(self, name)])
            return result

        return followed

    return wrapper


def _aruns(follower: _Follower) -> Callable[[Method], Method]:
    def wrapper(method: Method) -> Method:
        async def followed(self: BaseCheckpointSaver[Any], run_ids: Sequence[object]) -> Any:
            found = {_thread(i) for run in run_ids async for i in self.alist(None, filter=_of_run(run))}
            result = await method(self, run_ids)
            gone = [_Effect(name) for name in found if not await _aexists(self, name)]
            await asyncio.to_thread(follower.do, gone)
            return result

        return followed

    return wrapper


def _put(follower: _Follower) -> Callable[[Method], Method]:
    """For ``put`` and ``aput``: remember the thread, and hand on what either returns."""

    def wrapper(method: Method) -> Method:
        def followed(self: object, config: RunnableConfig, *args: Any, **kwargs: Any) -> Any:
            follower.seen.add(str(config["configurable"]["thread_id"]))
            return method(self, config, *args, **kwargs)

        return followed

    return wrapper


def _follower(saver: BaseCheckpointSaver[Any], memory: AgentMemory, namespace: str) -> _Follower | None:
    known: tuple[_Follower, ...] = saver.__dict__.get(_FOLLOWERS, ())
    return next((f for f in known if f.memory is memory and f.namespace == namespace), None)


def _candidates(
    saver: BaseCheckpointSaver[Any], memory: AgentMemory, namespace: str, session_ids: Iterable[str] | None
) -> set[str]:
    if session_ids is not None:
        return {str(name) for name in session_ids}
    follower = _follower(saver, memory, namespace)
    if follower is None:
        raise InvalidRequest(
            "reconcile cannot know that the threads of this namespace are this checkpointer's: give session_ids, "
            "or follow(checkpointer, memory, namespace) first."
        )
    threads = {session.session_id for session in memory.sessions(namespace) if session.is_thread}
    return follower.seen | threads


def _kept(memory: AgentMemory, namespace: str, candidates: Collection[str]) -> list[str]:
    return sorted(s.session_id for s in memory.sessions(namespace) if s.session_id in candidates)


def _exists(saver: BaseCheckpointSaver[Any], thread_id: str) -> bool:
    return next(iter(saver.list(_config(thread_id), limit=1)), None) is not None


async def _aexists(saver: BaseCheckpointSaver[Any], thread_id: str) -> bool:
    found: AsyncIterator[CheckpointTuple] = saver.alist(_config(thread_id), limit=1)
    return [item async for item in found] != []


def _config(thread_id: str) -> RunnableConfig:
    return {"configurable": {"thread_id": thread_id}}


def _of_run(run_id: object) -> dict[str, Any]:
    return {"run_id": str(run_id)}


def _thread(item: CheckpointTuple) -> str:
    return str(item.config["configurable"]["thread_id"])


__all__ = ["areconcile", "follow", "reconcile"]
