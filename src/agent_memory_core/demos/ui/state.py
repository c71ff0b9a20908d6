"""What the pages share: one memory and one service in a process, and numbers as rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from agent_memory_core import AgentMemory
from agent_memory_core.coordination import CoordinationService, Event, Step, Token, TurnStats


def service_of(st: Any) -> tuple[AgentMemory, CoordinationService]:
    """The memory, whose settings come from the environment, and its service; opened once."""

    @st.cache_resource  # type: ignore[untyped-decorator]
    def opened() -> tuple[AgentMemory, CoordinationService]:
        memory = AgentMemory.shared()
        return memory, CoordinationService(memory)

    found: tuple[AgentMemory, CoordinationService] = opened()
    if found[0].closed:
        opened.clear()
        found = opened()
    return found


def restart_button(st: Any) -> None:
    """Close the engine: what stood in memory is gone, and what comes next is read from disk."""
    if st.button("Restart the engine", help="Frees the model and all that is known in memory."):
        memory, service = service_of(st)
        service.close()
        memory.close()
        st.rerun()


def told(names: dict[str, str], events: Sequence[Event]) -> list[dict[str, Any]]:
    """Events as rows of a table."""
    return [
        {
            "who": names.get(event.sender_id, event.sender_id),
            "what": event.content,
            "known to": ", ".join(sorted(names.get(each, each) for each in event.visible_to)) or "all",
        }
        for event in events
    ]


def costs(st: Any, rows: Sequence[TurnStats]) -> None:
    """New and known tokens of each turn, as bars and as the numbers of the last one."""
    if not rows:
        return
    last = rows[-1]
    columns = st.columns(3)
    columns[0].metric("tokens of the last prompt", last.prompt)
    columns[1].metric("of these computed", last.new)
    columns[2].metric("ms to the first token", round(last.ttft * 1000))
    table = {
        "turn": list(range(1, len(rows) + 1)),
        "known": [row.cache_read for row in rows],
        "computed": [row.new for row in rows],
    }
    st.bar_chart(table, x="turn", y=["known", "computed"])


def pieces(steps: Iterator[Step]) -> Iterator[str]:
    """The words of a streamed turn."""
    return (step.text for step in steps if isinstance(step, Token))
