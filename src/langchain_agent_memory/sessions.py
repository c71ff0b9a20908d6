"""Which session a call belongs to, read from everything LangChain and LangGraph let a model see.

Order, first found wins; within a step the nearer source goes first (call configuration, LangGraph runtime
context, call metadata, surrounding configuration, surrounding metadata, inherited callback metadata):

    1  ``session_id=`` of the call: an argument, ``.bind(session_id=...)`` or middleware ``model_settings``
    2  ``agent_memory_session_id``
    3  ``session_id``
    4  ``agent_memory_session_id`` of a callback handler
    5  ``thread_id``
    6  ``conversation_id``, together with the ``user_id`` beside it, if there is one: users count their
       conversations each for themselves
    7  ``prompt_cache_key=`` of the call, as OpenAI's models take it
    8  ``session_id=`` of the model
    9  nothing: an anonymous turn, shared by content in memory and never on disk

The namespace is ``namespace=`` of the call, else ``agent_memory_namespace`` from the same sources, else the
model's. The lane is ``agent_memory_lane``, else agent name, graph path and middleware purpose.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import ensure_config, var_child_runnable_config

from agent_memory_core import SessionKey
from agent_memory_core.adapter import chosen_text, session_text

_SESSION_KEYS = ("agent_memory_session_id", "session_id")
_THREAD_KEYS = ("thread_id",)
_CONVERSATION_KEYS = ("conversation_id", "user_id")
_NAMESPACE_KEY = "agent_memory_namespace"
_LANE_KEY = "agent_memory_lane"
_CONTEXT_KEYS = (*_SESSION_KEYS, *_THREAD_KEYS, *_CONVERSATION_KEYS, _NAMESPACE_KEY, _LANE_KEY)

Layer = Mapping[str, Any]


def resolve_session(
    config: RunnableConfig | None = None,
    *,
    run_manager: object | None = None,
    session_id: object = None,
    namespace: object = None,
    default_session_id: str | None = None,
    default_namespace: str = "default",
) -> SessionKey:
    """Return the key of the session that a call belongs to.

    Args:
        config: the configuration the caller passed, if any.
        run_manager: the run manager of the call, where one has been made.
        session_id: the caller's own choice; None leaves it to the sources above.
        namespace: the same for the namespace.
        default_session_id: the model's session, used where no source names one.
        default_namespace: the model's namespace.

    Raises:
        InvalidRequest: the caller's own choice is not text.
    """
    full = ensure_config(config)
    layers = _layers(full, run_manager)
    chosen = (
        chosen_text(session_id, "session_id")
        or _first(layers, _SESSION_KEYS)
        or _from_handlers(full, run_manager)
    )
    thread = _first(layers, _THREAD_KEYS) if not chosen else None
    purpose = _first(layers, ("lc_source",))
    return SessionKey(
        session_id=chosen or thread or _conversation(layers) or default_session_id,
        namespace=chosen_text(namespace, "namespace")
        or _first(layers, (_NAMESPACE_KEY,))
        or default_namespace,
        lane=_first(layers, (_LANE_KEY,)) or _lane(layers, purpose),
        # A call that middleware makes for itself (a summary, a choice of tools) is not a turn of the conversation.
        ephemeral=purpose is not None,
        is_thread=thread is not None,
    )


def _layers(config: RunnableConfig, run_manager: object | None) -> list[Layer]:
    """The mappings that may name a session, nearest first."""
    surrounding = var_child_runnable_config.get() or {}
    configurable = config.get("configurable") or {}
    outer = surrounding.get("configurable") or {}
    return [
        configurable,
        _runtime_context(configurable) or _runtime_context(outer),
        config.get("metadata") or {},
        outer,
        surrounding.get("metadata") or {},
        # Survives a call that passes metadata of its own, which replaces the surrounding one.
        getattr(config.get("callbacks"), "inheritable_metadata", None) or {},
        getattr(run_manager, "metadata", None) or {},
    ]


def _runtime_context(configurable: Layer) -> Layer:
    """What ``graph.invoke(..., context=...)`` was given, seen through a node's configuration."""
    module = sys.modules.get("langgraph.runtime")  # where nobody imported LangGraph, no graph is running
    if module is None:
        return {}
    runtime = next((v for v in configurable.values() if isinstance(v, module.Runtime)), None)
    context = getattr(runtime, "context", None)
    if isinstance(context, Mapping):
        return context
    return {key: getattr(context, key, None) for key in _CONTEXT_KEYS}


def _first(layers: Sequence[Layer], keys: Sequence[str]) -> str | None:
    """The first usable value, by rank of key and then of layer."""
    for key in keys:
        for layer in layers:
            text = session_text(layer.get(key))
            if text is not None:
                return text
    return None


def _conversation(layers: Sequence[Layer]) -> str | None:
    """The nearest conversation's id; ``["<user>", "<conversation>"]`` where a user is named, which no two share."""
    conversation = _first(layers, ("conversation_id",))
    user = _first(layers, ("user_id",))
    if conversation is None or user is None:
        return conversation
    return json.dumps([user, conversation], ensure_ascii=False)


def _from_handlers(config: RunnableConfig, run_manager: object | None) -> str | None:
    callbacks: Any = config.get("callbacks")  # a list of handlers, or a manager of them
    handlers = getattr(callbacks, "handlers", callbacks) or getattr(run_manager, "handlers", None) or []
    found = (session_text(getattr(handler, "agent_memory_session_id", None)) for handler in handlers)
    return next((text for text in found if text is not None), None)


def _lane(layers: Sequence[Layer], purpose: str | None) -> str:
    agent = _first(layers, ("lc_agent_name",))
    # The first name is right inside subgraphs, where metadata holds the parent's path under the second.
    path = _first(layers, ("langgraph_checkpoint_ns", "checkpoint_ns"))
    return "/".join(filter(None, (agent, _graph_path(path or ""), purpose)))


def _graph_path(checkpoint_ns: str) -> str:
    """``team:<uuid>|inner:<uuid>|1`` as ``team|inner``: the ids change with every step."""
    return "|".join(part.split(":")[0] for part in checkpoint_ns.split("|") if not part.isdigit())
