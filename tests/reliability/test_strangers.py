"""What goes wrong in one turn, or on the disk of one session, is nobody else's matter.

That nobody waits is shown without a clock: what a stranger would have to wait for happens only after the stranger has
had an answer.
"""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent_memory_core import (
    AgentMemory,
    ChatRequest,
    Delta,
    InvalidRequest,
    Message,
    SamplingParams,
    SessionKey,
)
from agent_memory_core.engine import block_reader
from agent_memory_core.storage import record_reader

ADA, TOM = "Tell me of Ada. " * 20, "Tell me of Tom. " * 20


def memory_of(folder: Path) -> AgentMemory:
    return AgentMemory(cache_dir=folder, min_free_mb=0, block_tokens=64)


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[AgentMemory]:
    with memory_of(tmp_path / "store") as opened:
        opened.chat(ADA, "ada", max_tokens=2)
        opened.chat(TOM, "tom", max_tokens=2)
        yield opened


class InBackground:
    """One call on a thread of its own."""

    def __init__(self, call: Any) -> None:
        self.result: Any = None
        self._call = call
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        self.result = self._call()

    @property
    def waits(self) -> bool:
        return self._thread.is_alive()

    def end(self) -> Any:
        self._thread.join(60)
        assert not self.waits
        return self.result


def test_who_waits_for_a_locked_catalog_waits_alone(memory: AgentMemory, tmp_path: Path) -> None:
    """Another program holds the write lock: turns that are to be written wait, also those of new namespaces."""
    db = sqlite3.connect(tmp_path / "store" / "catalog.db", isolation_level=None)
    db.execute("BEGIN IMMEDIATE")
    saving = [
        InBackground(lambda: memory.chat("Of Mia. " * 40, SessionKey("mia", "new"), max_tokens=2)),
        InBackground(lambda: memory.chat("Of Rex. " * 40, "rex", max_tokens=2)),
    ]
    for _ in range(4):
        assert len(memory.chat("Hello.", max_tokens=4).token_ids) == 4
    assert memory.chat([{"role": "user", "content": "Hi."}] * 3, max_tokens=1).report.usage.prompt_tokens
    assert all(turn.waits for turn in saving)
    db.execute("ROLLBACK")
    db.close()
    assert all(turn.end().report.persisted for turn in saving)


def test_a_read_that_hangs_holds_up_its_own_turn_and_not_for_ever(
    tmp_path: Path, memory: AgentMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.close()
    real: Any = vars(record_reader)["read_record"]
    hung, go_on = threading.Event(), threading.Event()

    def read(*args: Any) -> Any:
        if not hung.is_set():
            hung.set()
            go_on.wait(60)
        return real(*args)

    monkeypatch.setattr(record_reader, "read_record", read)
    monkeypatch.setattr(block_reader.BlockReader.__init__, "__defaults__", (1.0,))
    with memory_of(tmp_path / "store") as again:
        again.load()
        stuck = InBackground(lambda: again.chat(ADA, "ada", max_tokens=2))
        assert hung.wait(30)
        other = again.chat(TOM, "tom", max_tokens=2)
        assert other.report.hit_tier == "warm"
        # Its own turn goes on without the disk, which has not answered yet.
        mine = stuck.end()
        assert not go_on.is_set()
        assert mine.report.usage.cache_read < mine.report.usage.prompt_tokens - 1
        go_on.set()
        assert mine.token_ids == again.chat(ADA, max_tokens=2).token_ids


class Bad:
    """A caller's sink that raises whatever it is given."""

    def deliver(self, delta: Delta) -> None:
        raise ValueError("deliver")

    def fail(self, error: Exception) -> None:
        raise ValueError("fail")


def test_a_sink_that_raises_ends_its_own_turn(memory: AgentMemory) -> None:
    stranger = InBackground(lambda: memory.chat(ADA, "ada", max_tokens=60))
    request = ChatRequest((Message("user", "Hi."),), sampling=SamplingParams(max_tokens=300, temperature=1.0))
    handle = memory._thread.submit(request, SessionKey(), Bad())
    assert len(stranger.end().token_ids) > 0
    assert memory.chat("Hello.", max_tokens=2).report.finish_reason
    memory._thread.submit(request, SessionKey(), Bad())
    handle.cancel()
    while memory.stats().running or memory.stats().waiting:
        memory.chat("Hello.", max_tokens=1)
    assert memory.stats().memory.reserved_bytes == 0


def test_a_prompt_of_no_tokens_is_refused_and_others_go_on(
    memory: AgentMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = memory._thread.call(lambda engine: engine.template).result()
    real = template.render
    monkeypatch.setattr(
        template,
        "render",
        lambda asked, **more: "" if asked.messages[0].content == "" else real(asked, **more),
    )
    stranger = InBackground(lambda: memory.chat(ADA, "ada", max_tokens=40))
    with pytest.raises(InvalidRequest, match="renders nothing"):
        memory.chat([{"role": "user", "content": ""}])
    assert len(stranger.end().token_ids) > 0


DEAD_LOOP = """
import asyncio
from agent_memory_core import AgentMemory

memory = AgentMemory(cache_dir=None)

async def abandon():
    for n in range(9):
        asyncio.ensure_future(memory.achat("Hi.", max_tokens=2000, temperature=50, seed=n))
    while memory.stats().running < 8:
        await asyncio.sleep(0.01)

loop = asyncio.new_event_loop()
loop.run_until_complete(abandon())
loop.close()
memory.chat("Hello.", max_tokens=2)
stats = memory.stats()
print(stats.running, stats.waiting, stats.memory.reserved_bytes)
"""


def test_turns_of_a_dead_event_loop_give_back_their_places() -> None:
    """In a process of its own: Python complains of the tasks that such a loop leaves."""
    command = [sys.executable, "-W", "ignore", "-c", DEAD_LOOP]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
    assert done.stdout.split() == ["0", "0", "0"]


RAW: dict[str, Any] = {"kv_bits": None, "compute_dtype": "stored", "min_free_mb": 0, "block_tokens": 64}
"""A session of a few sentences takes a third of a megabyte, whatever multiplies matrices here."""


def test_a_namespace_that_fills_the_disk_evicts_its_own(tmp_path: Path) -> None:
    """What another one has keeps its place up to its equal share; what it has beyond that goes by age."""
    settings = RAW | {"disk_budget_mb": 3}
    with AgentMemory(cache_dir=tmp_path / "store", **settings) as memory:

        def ask(namespace: str, number: int) -> None:
            text = f"Number {number} of {namespace}. " * 12
            assert memory.chat(text, SessionKey(f"s{number}", namespace), max_tokens=2).report.persisted

        def live(namespace: str) -> set[str]:
            return {info.session_id for info in memory.sessions(namespace) if info.branches}

        for number in range(2):
            ask("quiet", number)
        for number in range(20):
            ask("loud", number)
        assert live("quiet") == {"s0", "s1"}
        assert len(live("loud")) < 20
        for number in range(2, 20):
            ask("quiet", number)
        assert abs(len(live("quiet")) - len(live("loud"))) <= 2
        assert max(live("quiet"), key=lambda name: int(name[1:])) == "s19"


def test_a_namespace_keeps_to_its_own_budget(tmp_path: Path) -> None:
    """It evicts its own oldest sessions; what the others have is not touched, though the store has room."""
    settings = RAW | {"namespace_budget_mb": 1}
    with AgentMemory(cache_dir=tmp_path / "store", **settings) as memory:
        for namespace, count in (("quiet", 2), ("loud", 9)):
            for number in range(count):
                text = f"Number {number} of {namespace}. " * 12
                assert memory.chat(text, SessionKey(f"s{number}", namespace), max_tokens=2).report.persisted
        assert len(memory.sessions("quiet")) == 2
        loud = memory.sessions("loud")
        assert 0 < sum(info.nbytes for info in loud) <= 2**20
        assert {info.session_id for info in loud} < {f"s{number}" for number in range(9)}
        assert memory.check().clean
