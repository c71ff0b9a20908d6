"""Which session a call belongs to, read from everything LlamaIndex lets a model see.

Order, first found wins:

    1  ``session_id=`` of the call
    2  instrumentation tags (`memory_session`, ``instrument_tags``): ``agent_memory_session_id``, ``session_id``,
       ``thread_id``
    3  ``agent_memory_session_id`` in the store of the workflow's `Context`
    4  ``session_id`` of the `Memory` that the workflow runs on, if a person chose it
    5  ``agent_memory_session_id`` of a callback handler
    6  ``prompt_cache_key=`` of the call, as OpenAI's models take it
    7  ``session_id=`` of the model
    8  ``session_id`` that a `Memory` in a database made up
    9  nothing: an anonymous turn, shared by content in memory and never on disk

A `Memory` that is given no id makes up a UUID. If it lives in the process alone, nobody can find it again later, so its
id is no session and nothing is written to disk under it. The id of one in a database is kept with the history there.

The namespace is ``namespace=`` of the call, else ``agent_memory_namespace`` from tags or store, else the model's.
The lane is the tag ``agent_memory_lane``, else the name of the agent whose step is running. Only coroutines can read
the store of a workflow, so steps 3 and 4 work for ``achat`` and the other async methods, which agents call.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple
from uuid import UUID

from llama_index_instrumentation.dispatcher import active_instrument_tags, instrument_tags
from workflows import Context
from workflows.errors import WorkflowRuntimeError

from agent_memory_core import SessionKey
from agent_memory_core.adapter import chosen_text, session_text

logger = logging.getLogger("agent_memory.llama_index")

_SESSION = "agent_memory_session_id"
_NAMESPACE = "agent_memory_namespace"
_LANE = "agent_memory_lane"
_AGENT = "current_agent_name"
_TAGS = (_SESSION, "session_id", "thread_id")


class Surroundings(NamedTuple):
    """What a call can see around it that may name a session."""

    tags: Mapping[str, Any] = {}
    """The instrumentation tags in force."""
    state: Mapping[str, Any] = {}
    """Those entries of the workflow's store that name a session, a namespace or an agent."""
    memory: object = None
    """The session of the memory that the workflow runs on, if a person chose it."""
    made_up: object = None
    """The session that this memory made up, if it is kept in a database."""
    handler: object = None
    """The session that a callback handler names."""
    agent: object = None
    """The agent whose step is running."""


def look_around(handlers: Iterable[object] = ()) -> Surroundings:
    """Return what a call that is not a coroutine sees; ``handlers`` are the model's callback handlers."""
    named = (session_text(getattr(handler, _SESSION, None)) for handler in handlers)
    return Surroundings(
        tags=active_instrument_tags.get() or {},
        handler=next(filter(None, named), None),
        agent=_agent_of_step(),
    )


async def alook_around(handlers: Iterable[object] = ()) -> Surroundings:
    """`look_around` for coroutines, which see the workflow's store too."""
    seen = look_around(handlers)
    context = _step_context()
    if context is None:
        return seen
    state = {key: await context.store.get(key, default=None) for key in (_SESSION, _NAMESPACE, _AGENT)}
    memory = await context.store.get("memory", default=None)
    chosen, made_up = _of_memory(memory)
    return seen._replace(state=state, memory=chosen, made_up=made_up)


def _of_memory(memory: object) -> tuple[object, object]:
    """The session id of a memory: as one that a person chose, or as one that it made up and that lasts."""
    session_id = getattr(memory, "session_id", None)
    if not _is_made_up(session_id):
        return session_id, None
    lasts = _lasts(getattr(memory, "sql_store", None))
    if not lasts:
        logger.info(
            "a Memory without a session_id is kept in memory only: give it one, or the model, to keep its turns on disk"
        )
    return None, session_id if lasts else None


def _lasts(store: object) -> bool:
    """Whether the store of a memory outlives the process: any database but SQLite's in memory."""
    engine = getattr(store, "_async_engine", None)
    address = engine.url if engine is not None else getattr(store, "async_database_uri", "")
    return store is not None and ":memory:" not in str(address)


def _is_made_up(session_id: object) -> bool:
    """Whether an id is a random UUID, as LlamaIndex makes one."""
    try:
        found = UUID(session_id) if isinstance(session_id, str) else None
    except ValueError:
        return False
    return found is not None and found.version == 4 and str(found) == session_id


def resolve_session(
    seen: Surroundings,
    *,
    session_id: object = None,
    namespace: object = None,
    default_session_id: str | None = None,
    default_namespace: str = "default",
) -> SessionKey:
    """Return the key of the session that a call belongs to.

    Args:
        seen: what the call sees around it.
        session_id: the caller's own choice; None leaves it to ``seen``.
        namespace: the same for the namespace.
        default_session_id: the model's session, used where nothing names one.
        default_namespace: the model's namespace.

    Raises:
        InvalidRequest: the caller's own choice is not text.
    """
    return SessionKey(
        session_id=chosen_text(session_id, "session_id")
        or _first(*(seen.tags.get(key) for key in _TAGS), seen.state.get(_SESSION), seen.memory, seen.handler)
        or default_session_id
        or _first(seen.made_up),
        namespace=chosen_text(namespace, "namespace")
        or _first(seen.tags.get(_NAMESPACE), seen.state.get(_NAMESPACE))
        or default_namespace,
        lane=_first(seen.tags.get(_LANE), seen.agent, seen.state.get(_AGENT)) or "",
    )


@contextmanager
def memory_session(
    session_id: str, *, namespace: str | None = None, lane: str | None = None
) -> Iterator[None]:
    """Give every call made inside the block this session, whatever agent, workflow or engine makes it.

        with memory_session("ada"):
            answer = await agent.run("My name is Ada.")

    It adds to the instrumentation tags already in force; a bare ``instrument_tags`` inside would replace them.

    Raises:
        InvalidRequest: an argument is not text.
    """
    tags = {_SESSION: session_id, _NAMESPACE: namespace, _LANE: lane}
    given = {tag: text for tag, value in tags.items() if (text := chosen_text(value, tag)) is not None}
    with instrument_tags({**(active_instrument_tags.get() or {}), **given}):
        yield


def _step_context() -> Context[Any] | None:
    """The context of the workflow step that is running, if one is."""
    try:
        return Context.get_step_context()
    except WorkflowRuntimeError:
        return None


def _agent_of_step() -> object:
    """The agent of the running step. With a single agent only the step's event names it."""
    # There is no public way to it. If a release moves it, the lane comes from the store or is empty.
    module = sys.modules.get("workflows.runtime.types.results")
    variable = getattr(module, "StepWorkerStateContextVar", None)
    step = variable.get(None) if variable is not None else None
    return getattr(getattr(step, "event", None), _AGENT, None)


def _first(*values: object) -> str | None:
    return next(filter(None, map(session_text, values)), None)
