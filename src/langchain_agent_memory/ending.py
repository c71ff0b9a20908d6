"""What is done with the report of a turn, and how an agent is told that an answer was cut.

LangChain's agents look at an answer that was to have a form as if it were whole. One that was cut at ``max_tokens`` is
then a JSON error that does not name the cause, or, as a call that cannot be read, is asked for again until the agent's
own limit of steps. Inside a graph such an answer is therefore an error here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from langchain_core.callbacks.manager import BaseRunManager
from langchain_core.exceptions import OutputParserException
from langchain_core.runnables.config import ensure_config

from agent_memory_core import ChatResult, Delta
from langchain_agent_memory.call import report_to
from langchain_agent_memory.callbacks import Listeners


class OwnForm(dict[str, Any]):
    """A ``response_format`` of `with_structured_output`, whose parser tells itself that an answer was cut."""


class Ending:
    """The end of one call of the model. Make it where the call begins.

    Args:
        keywords: the keywords of the call.
        call_key: the keyword under which the `Call` travels.
        run_manager: the run manager of the call; None where LangChain hands over none.
    """

    def __init__(
        self, keywords: Mapping[str, Any], call_key: str, run_manager: BaseRunManager | None
    ) -> None:
        self._keywords, self._call_key = keywords, call_key
        self._listeners = Listeners(run_manager)
        # LangChain hands no run manager to a model that streams; the configuration around it says the same.
        self._in_graph = "langgraph_node" in (ensure_config().get("metadata") or {})
        self._calls = 0
        self._cut_at: int | None = None

    def take(self, part: Delta | ChatResult) -> None:
        """Take a piece of the answer, or all of it; the last piece has the report."""
        self._calls += len(part.tool_calls)
        report = part.report
        report_to(self._keywords, self._call_key, report)
        self._listeners.tell(report)
        if report is not None and report.finish_reason == "length":
            self._cut_at = report.usage.completion_tokens

    def check(self) -> None:
        """Say that the answer was cut, where nobody else would.

        Raises:
            OutputParserException: it was to have a form, and has none because it was cut.
        """
        if self._cut_at is None or not self._in_graph or self._calls:
            return
        form = self._keywords.get("response_format")
        is_forced = self._keywords.get("tool_choice") in ("any", "required", True)
        if is_forced or (form is not None and not isinstance(form, OwnForm)):
            place = "a call that it had to make" if is_forced else "its JSON"
            raise OutputParserException(
                f"the answer ended at max_tokens={self._cut_at} inside {place}: raise max_tokens, or bound the texts "
                "and lists of the schema."
            )
