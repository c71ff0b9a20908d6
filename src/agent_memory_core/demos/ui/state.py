"""What the pages share: the engine, what it says as it says it, and numbers as plots."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from agent_memory_core import AgentMemory, AgentMemoryError
from agent_memory_core.coordination import Event, Step, Token, TurnComplete, TurnStart, TurnStats
from agent_memory_core.demos.ui.engine import Engine

COLOURS = {"in memory": "#1a7f4b", "from disk": "#d08a1d", "computed": "#2563ab"}
"""Where the tokens of a prompt came from."""


def engine_of(st: Any) -> Engine:
    """The engine of all pages and tabs, whose settings come from the environment."""

    @st.cache_resource  # type: ignore[untyped-decorator]
    def opened() -> Engine:
        return Engine()

    engine: Engine = opened()
    return engine


@contextmanager
def page(st: Any, title: str, words: str) -> Iterator[Engine]:
    """A page: what it is about, and beside it the engine's process with a button that kills it."""
    st.title(title)
    st.write(words)
    engine = engine_of(st)
    side = st.sidebar.container()
    yield engine
    # Drawn at the end, because what the page asks may have started the process.
    with side:
        _process(st, engine)


def _process(st: Any, engine: Engine) -> None:
    st.subheader("The engine")
    pid = engine.pid
    st.write(f"Process {pid} runs." if pid else "It is not running. It starts when it is asked.")
    words = "SIGKILL: the process is told nothing. What it had stored is read from disk afterwards."
    if st.button("Kill the engine", help=words, disabled=pid is None, width="stretch"):
        engine.kill()
        st.rerun()
    with AgentMemory() as settings:
        model = settings.model_name
    st.caption(f"Model: {model}. Processes so far: {engine.starts}.")
    if model == "tiny-chat":
        st.caption("It recalls facts and cannot argue. AGENT_MEMORY_MODEL names another one.")


def tried(st: Any, work: Callable[[], Any]) -> Any:
    """The result of what may be refused, or None, with the reason on the page."""
    try:
        return work()
    except AgentMemoryError as error:
        st.error(str(error))
        return None


def live(st: Any, steps: Generator[Step, None, Any], faces: Faces) -> Any:
    """Show what agents say while they say it; return what the steps return."""
    place: Any = st.empty()
    while True:
        try:
            step = next(steps)
        except StopIteration as end:
            return end.value
        if isinstance(step, TurnStart):
            place = faces.bubble(st, step.agent_id).empty()
        elif isinstance(step, Token):
            place.markdown(step.accumulated)
        elif isinstance(step, TurnComplete) and step.event.interrupted:
            place.markdown(f"{step.event.content} …")


class Faces:
    """How those who talk are shown.

    Args:
        names: what each agent is called, by id.
        icons: pictures by id; by default the first letter of a name.
    """

    def __init__(self, names: Mapping[str, str], icons: Mapping[str, str] | None = None) -> None:
        self.names, self._icons = names, icons or {}

    def name(self, sender: str) -> str:
        """What a sender is called."""
        return self.names.get(sender, "Announced" if sender == "system" else sender)

    def bubble(self, st: Any, sender: str) -> Any:
        """A place for the words of a sender, with its name above them."""
        icon = self._icons.get(sender, ":material/info:" if sender == "system" else ":material/person:")
        bubble = st.chat_message(self.name(sender), avatar=icon)
        bubble.caption(self.name(sender))
        return bubble

    def show(self, st: Any, event: Event) -> None:
        """Show an event, and who alone knows of it."""
        bubble = self.bubble(st, event.sender_id)
        bubble.markdown(event.content + (" …" if event.interrupted else ""))
        if event.visible_to:
            known = ", ".join(sorted(self.name(each) for each in event.visible_to))
            bubble.badge(f"only {known}", icon=":material/lock:", color="orange")
        elif event.kind == "decision":
            bubble.badge("decided", icon=":material/how_to_vote:", color="green")


def costs(st: Any, rows: Sequence[TurnStats]) -> None:
    """Known and computed tokens of each turn, as bars and as the numbers of the last one."""
    if not rows:
        return
    last = rows[-1]
    st.subheader("What each turn cost")
    numbers(st, last)
    table = {
        "turn": list(range(1, len(rows) + 1)),
        "in memory": [row.cache_read if row.hit_tier == "hot" else 0 for row in rows],
        "from disk": [row.cache_read if row.hit_tier == "warm" else 0 for row in rows],
        "computed": [row.new for row in rows],
    }
    st.bar_chart(
        table, x="turn", y=list(COLOURS), color=list(COLOURS.values()), y_label="tokens of the prompt"
    )


def numbers(st: Any, row: TurnStats) -> None:
    """What one turn cost."""
    columns = st.container(horizontal=True)
    columns.metric("tokens of the last prompt", row.prompt)
    columns.metric("of these computed", row.new)
    columns.metric("ms to the first token", round(row.ttft * 1000))


def gauge(st: Any, label: str, part: float, whole: float, unit: str = "MiB") -> None:
    """A part of a limit, as a bar."""
    share = min(1.0, part / whole) if whole > 0 else 0.0
    st.progress(share, text=f"{label}: {part:,.1f} of {whole:,.0f} {unit}")
