"""What the manager asks of whatever runs a model."""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Protocol

from agent_memory_core import (
    BackendMissing,
    Cancelled,
    ChatRequest,
    Delta,
    SessionKey,
    TurnReport,
    Usage,
)
from agent_memory_core.manager.config import ModelConfig

CANCELLED = "the call was withdrawn before it ended."


@dataclass(frozen=True, slots=True)
class Asked:
    """One call of a model."""

    request: ChatRequest
    """The conversation, and what is wanted of the answer."""
    given: dict[str, Any]
    """The sampling values that the configuration or the call names; the request's own have defaults for the rest."""
    session: SessionKey | str | None = None
    """Whose memory it continues, where a model has one."""
    cancel: threading.Event = field(default_factory=threading.Event)
    """Set when nobody wants the answer any more."""

    def check(self) -> None:
        """Stop here if nobody wants the answer any more.

        Raises:
            Cancelled: so it is.
        """
        if self.cancel.is_set():
            raise Cancelled(CANCELLED)


class Loaded(Protocol):
    """A model in memory."""

    native: Any
    """What the library that runs it calls a model."""
    tokenizer: Any
    """Its tokenizer, or None."""
    nbytes: int
    """What it takes, measured, with its KV."""

    def chat(self, asked: Asked) -> Iterator[Delta]:
        """Run one call. Only the last delta has a report. Closing the iterator, or the event, withdraws the call."""
        ...

    def cancel(self) -> None:
        """Withdraw the calls that others run on it past the manager's handles; it does not wait for them."""
        ...

    def unload(self) -> None:
        """Free it. Calling it again does nothing; no call is inside."""
        ...


class Backend(Protocol):
    """Loads the models of one type."""

    def estimate(self, config: ModelConfig, limit: int) -> int:
        """Bytes that a model will take, from its files alone, where all models together may take ``limit``."""
        ...

    def load(self, config: ModelConfig, limit: int) -> Loaded:
        """Load a model, on the caller's thread.

        Raises:
            BackendMissing: the library that runs it is not installed.
            Exception: what that library raises.
        """
        ...


def required(module: str, *, extra: str, what: str, note: str = "") -> ModuleType:
    """Import a library that only one type of models needs.

    Raises:
        BackendMissing: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BackendMissing(
            f"{what} models need {module}: pip install 'agent-memory-mlx[{extra}]'{note} ({error})."
        ) from error


class Clock:
    """The times of one call, for its report."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self._first: float | None = None

    def first(self) -> None:
        """The first token is there."""
        if self._first is None:
            self._first = time.perf_counter() - self._begin

    def report(self, model: str, reason: str, usage: Usage) -> TurnReport:
        """The report of a call that keeps no memory."""
        total = time.perf_counter() - self._begin
        known = reason if reason in ("stop", "length", "tool_calls") else "stop"
        return TurnReport(
            finish_reason=known,  # type: ignore[arg-type]
            usage=usage,
            hit_tier="none",
            miss_reason="",
            restore_seconds=0.0,
            time_to_first_token=self._first if self._first is not None else total,
            total_seconds=total,
            session_id=None,
            branch_id=None,
            model=model,
            persisted=False,
        )
