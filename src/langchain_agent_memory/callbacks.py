"""A callback handler that counts, for each lane and each run, which tokens were reused and which were computed."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.callbacks.manager import BaseRunManager

from agent_memory_core import Miss, TurnReport

logger = logging.getLogger(__name__)

MAX_RUNS = 1024
"""How many runs a handler remembers; the oldest is forgotten first."""

Lane = tuple[str | None, str]
"""A session id, None for turns without one, and the lane in it: the agent or node that asked."""


@dataclass(frozen=True, slots=True)
class Reuse:
    """Prompt tokens of some turns."""

    turns: int = 0
    reused: int = 0
    """Prompt tokens that were known."""
    new: int = 0
    """Prompt tokens that were computed."""
    output: int = 0
    """Tokens of the answers."""
    cold: int = 0
    """Turns that computed tokens which the session had, or might have had; the first turn of a session is none."""

    @property
    def rate(self) -> float:
        """Which part of all prompt tokens was reused, from 0 to 1."""
        return self.reused / max(1, self.reused + self.new)

    def plus(self, report: TurnReport) -> Reuse:
        """The same with one more turn."""
        usage = report.usage
        return Reuse(
            self.turns + 1,
            self.reused + usage.cache_read,
            self.new + usage.cache_creation,
            self.output + usage.completion_tokens,
            self.cold + (report.miss_reason not in ("", "new")),
        )


class ReuseHandler(BaseCallbackHandler):
    """Counts what the turns of `ChatMLXPersistent` reused. Pass it as any callback; it may serve many runs at once.

    ```python
    from langchain_agent_memory import ChatMLXPersistent, ReuseHandler

    reuse = ReuseHandler()
    ChatMLXPersistent().invoke("Hello!", {"callbacks": [reuse], "configurable": {"thread_id": "ada"}})
    print(reuse.total, reuse.lanes)
    ```

    Args:
        warn: whether a lane that is cold a second time is written to the log, with the first text that differs. That
            text is a part of the conversation.
    """

    run_inline = True

    def __init__(self, *, warn: bool = True) -> None:
        self._warn = warn
        self._lock = threading.Lock()
        self._roots: OrderedDict[UUID, UUID] = OrderedDict()
        self.total = Reuse()
        """All turns together."""
        self.lanes: dict[Lane, Reuse] = {}
        """By session id and lane."""
        self.runs: OrderedDict[UUID, Reuse] = OrderedDict()
        """By the id of the outermost run, for example one ``graph.invoke``."""
        self.last: TurnReport | None = None
        """The report of the turn that ended last."""

    def on_chain_start(
        self, *args: Any, run_id: UUID, parent_run_id: UUID | None = None, **kwargs: Any
    ) -> None:
        """Remember which run this one is a part of."""
        self._place(run_id, parent_run_id)

    def on_chat_model_start(
        self, *args: Any, run_id: UUID, parent_run_id: UUID | None = None, **kwargs: Any
    ) -> None:
        """Remember which run the model's one is a part of, and that a model begins in it."""
        self._place(run_id, parent_run_id)
        _begun.set((*(other for other in _begun.get() if other[1] == run_id), (self, run_id)))

    def on_llm_end(self, *args: Any, run_id: UUID, **kwargs: Any) -> None:
        """The model has ended, also where a cache answered in its place."""
        _begun.set(())

    def on_llm_error(self, *args: Any, run_id: UUID, **kwargs: Any) -> None:
        """The model has ended."""
        _begun.set(())

    def on_tool_start(
        self, *args: Any, run_id: UUID, parent_run_id: UUID | None = None, **kwargs: Any
    ) -> None:
        """Remember which run a tool's one is a part of: tools may call models."""
        self._place(run_id, parent_run_id)

    def _place(self, run_id: UUID, parent_run_id: UUID | None) -> None:
        with self._lock:
            root = self._roots.get(parent_run_id, parent_run_id) if parent_run_id is not None else run_id
            _put(self._roots, run_id, root)

    def on_turn_end(self, report: TurnReport, run_id: UUID) -> None:
        """Count a turn of the model's run ``run_id``."""
        lane = (report.session_id, report.lane)
        with self._lock:
            before = self.lanes.get(lane, Reuse())
            after = self.lanes[lane] = before.plus(report)
            root = self._roots.get(run_id, run_id)
            _put(self.runs, root, self.runs.get(root, Reuse()).plus(report))
            self.total = self.total.plus(report)
            self.last = report
        if self._warn and (before.cold, after.cold) == (1, 2):
            logger.warning(_warning(report))

    def reset(self) -> None:
        """Begin at zero again."""
        with self._lock:
            self.total, self.last = Reuse(), None
            self.lanes.clear()
            self.runs.clear()


_begun: ContextVar[tuple[tuple[ReuseHandler, UUID], ...]] = ContextVar("_begun", default=())
"""The handlers that were just told of a model's run. LangChain does not hand them to a model that streams."""


class Listeners:
    """The `ReuseHandler`s of one call of the model. Make it where the call begins.

    Args:
        run_manager: the run manager of the call; None where LangChain hands over none.
    """

    def __init__(self, run_manager: BaseRunManager | None) -> None:
        self._found = _begun.get()
        _begun.set(())
        if run_manager is not None:
            self._found = tuple(
                (handler, run_manager.run_id)
                for handler in run_manager.handlers
                if isinstance(handler, ReuseHandler)
            )

    def tell(self, report: TurnReport | None) -> None:
        """Tell them of the turn, once it has ended."""
        if report is not None:
            for handler, run_id in self._found:
                handler.on_turn_end(report, run_id)


def _put(table: OrderedDict[UUID, Any], key: UUID, value: Any) -> None:
    table[key] = value
    if len(table) > MAX_RUNS:
        table.popitem(last=False)


def _warning(report: TurnReport) -> str:
    where = f"lane {report.lane!r} of session {report.session_id!r}"
    said = f"{where} was cold a second time ({report.miss_reason}): {report.usage.cache_creation} tokens computed"
    miss: Miss | None = report.miss
    if miss is None:
        return said
    place = miss.part if miss.message is None else f"message {miss.message} ({miss.part})"
    return f"{said}. It differs from {place} on: before {miss.before!r}, now {miss.now!r}"
