"""The ways into a chat model, each of which finds the session of its call before LangChain drops the configuration.

``BaseChatModel`` hides the configuration of a call from the model's inside, above all while streaming. So the session
is found at the entry, and travels on as a `Call` under a keyword that traces and the response cache are not told of.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.runnables import RunnableConfig

from agent_memory_core import AdapterSettings, SessionKey
from agent_memory_core.adapter import chosen_text
from langchain_agent_memory.call import Call
from langchain_agent_memory.sessions import resolve_session

CALL_KEY = "agent_memory_session"
"""The keyword under which a `Call` travels from an entry point to the model's inside."""


class SessionChatModel(AdapterSettings, BaseChatModel):
    """A chat model each of whose calls belongs to a session, or to none."""

    def invoke(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AIMessage:
        call = self._call(config, kwargs)
        return call.reported(super().invoke(input, config, stop=stop, **self._keywords(kwargs, call)))

    async def ainvoke(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AIMessage:
        call = self._call(config, kwargs)
        return call.reported(await super().ainvoke(input, config, stop=stop, **self._keywords(kwargs, call)))

    # Neither of the next two is a generator itself: its first line has to run at the call.
    def stream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> Iterator[AIMessageChunk]:
        call = self._call(config, kwargs)
        return call.in_stream(super().stream(input, config, stop=stop, **self._keywords(kwargs, call)))

    def astream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[AIMessageChunk]:
        call = self._call(config, kwargs)
        return call.in_async_stream(super().astream(input, config, stop=stop, **self._keywords(kwargs, call)))

    # Versions 1 and 2 of the events come by way of the methods above.
    def stream_events(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        version: str = "v2",
        **kwargs: Any,
    ) -> Any:
        if version == "v3":
            kwargs = self._keywords(kwargs, self._call(config, kwargs))
        return super().stream_events(input, config, version=version, **kwargs)  # type: ignore[call-overload]

    def astream_events(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        version: str = "v2",
        **kwargs: Any,
    ) -> Any:
        if version == "v3":
            kwargs = self._keywords(kwargs, self._call(config, kwargs))
        return super().astream_events(input, config, version=version, **kwargs)  # type: ignore[call-overload]

    def _call(self, config: RunnableConfig | None, kwargs: Mapping[str, Any]) -> Call:
        """The call that these keywords belong to: one entry point may go on to another one."""
        if CALL_KEY in kwargs:
            call: Call = kwargs[CALL_KEY]
            return call
        return Call(self._take_session(dict(kwargs), config=config))

    def _keywords(self, kwargs: Mapping[str, Any], call: Call) -> dict[str, Any]:
        """The keywords with the call in place of what named its session."""
        # "metadata", an option of other packages that is ignored here, is also a parameter of LangChain's inside,
        # which would be given twice.
        left_out = ("session_id", "namespace", "prompt_cache_key", "metadata", CALL_KEY)
        return {**{name: value for name, value in kwargs.items() if name not in left_out}, CALL_KEY: call}

    def _take_session(
        self, kwargs: dict[str, Any], *, config: RunnableConfig | None = None, run_manager: object = None
    ) -> SessionKey:
        """Remove from ``kwargs`` what names a session, and return the key."""
        own = {name: kwargs.pop(name, None) for name in ("session_id", "namespace")}
        cache_key = chosen_text(kwargs.pop("prompt_cache_key", None), "prompt_cache_key")
        call: Call | None = kwargs.pop(CALL_KEY, None)
        if call is not None:
            return call.key
        return resolve_session(
            config,
            run_manager=run_manager,
            default_session_id=cache_key or self.session_id,
            default_namespace=self.namespace,
            **own,
        )

    def _get_invocation_params(self, stop: list[str] | None = None, **kwargs: Any) -> dict[str, Any]:
        """The parameters that traces show of a call, without its session."""
        self._take_session(kwargs)
        return super()._get_invocation_params(stop=stop, **kwargs)

    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        """The response cache's key next to the prompt: sessions share answers, namespaces do not."""
        key = self._take_session(kwargs)
        return f"{super()._get_llm_string(stop=stop, **kwargs)}---{key.namespace}"
