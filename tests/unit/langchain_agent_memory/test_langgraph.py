"""Sessions follow the threads of a checkpointer: deleted, copied and pruned with them, and reconciled."""

from __future__ import annotations

import asyncio
import copy
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver, empty_checkpoint
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver

from agent_memory_core import AgentMemory, EngineStopped, InvalidRequest, SessionKey
from langchain_agent_memory import ChatMLXPersistent
from langchain_agent_memory.langgraph import areconcile, follow, reconcile

pytestmark = pytest.mark.model


class FullSaver(InMemorySaver):
    """In memory, with the methods that LangGraph's own in-memory saver leaves out, built on one another."""

    def copy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        for item in reversed(list(self.list(config(source_thread_id)))):
            where = {**config(target_thread_id)["configurable"], "checkpoint_ns": ""}
            self.put({"configurable": where}, item.checkpoint, item.metadata, {})

    async def acopy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        self.copy_thread(source_thread_id, target_thread_id)

    def prune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        for thread_id in thread_ids if strategy == "delete" else ():
            self.delete_thread(thread_id)

    async def aprune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        self.prune(thread_ids, strategy=strategy)

    def delete_for_runs(self, run_ids: Sequence[str]) -> None:
        for thread_id, namespaces in list(self.storage.items()):
            for name, checkpoints in namespaces.items():
                for item in list(
                    self.list({"configurable": {"thread_id": thread_id, "checkpoint_ns": name}})
                ):
                    if item.metadata.get("run_id") in run_ids:
                        del checkpoints[item.config["configurable"]["checkpoint_id"]]

    async def adelete_for_runs(self, run_ids: Sequence[str]) -> None:
        self.delete_for_runs(run_ids)


def config(thread_id: str) -> RunnableConfig:
    return {"configurable": {"thread_id": thread_id, "checkpoint_ns": ""}}


@pytest.fixture(scope="module")
def memory() -> Iterator[AgentMemory]:
    with AgentMemory(cache_dir=None) as opened:
        yield opened


@pytest.fixture(autouse=True)
def _clean(memory: AgentMemory) -> Iterator[None]:
    yield
    for session in memory.sessions():
        memory.forget(session.session_id, session.namespace)


def begin(
    memory: AgentMemory,
    saver: BaseCheckpointSaver[Any] | None,
    *threads: str,
    run: str = "r",
    namespace: str = "default",
) -> None:
    """A thread with one checkpoint and a session with one turn, for each name."""
    for name in threads:
        memory.chat(f"I am {name}.", SessionKey(name, namespace), max_tokens=1)
        if saver is not None:
            saver.put(config(name), empty_checkpoint(), {"source": "input", "step": -1, "run_id": run}, {})


def names(memory: AgentMemory, namespace: str | None = "default") -> list[str]:
    return sorted(session.session_id for session in memory.sessions(namespace))


# Deleting


@pytest.mark.parametrize("make", [InMemorySaver, FullSaver])
def test_a_session_goes_with_its_thread(memory: AgentMemory, make: Callable[[], InMemorySaver]) -> None:
    saver = make()
    assert follow(saver, memory) is saver
    assert isinstance(saver, InMemorySaver)
    begin(memory, saver, "a", "b")
    saver.delete_thread("a")
    assert names(memory) == ["b"]
    assert saver.get_tuple(config("a")) is None
    saver.delete_thread(thread_id="a")
    saver.delete_thread("never was")
    assert names(memory) == ["b"]


async def test_a_session_goes_with_its_thread_in_coroutines(memory: AgentMemory) -> None:
    saver = follow(InMemorySaver(), memory)
    begin(memory, saver, "a", "b")
    await saver.adelete_thread("a")
    await saver.adelete_thread("a")
    assert names(memory) == ["b"]


async def test_the_event_loop_goes_on_while_a_session_is_forgotten(memory: AgentMemory) -> None:
    """InMemorySaver's coroutine calls its blocking twin, which is followed too."""
    saver = follow(InMemorySaver(), memory)
    begin(memory, saver, "a")
    busy = threading.Event()
    held = memory._thread.call(lambda engine: busy.wait(20))
    deleting = asyncio.ensure_future(saver.adelete_thread("a"))
    for _ in range(5):
        await asyncio.sleep(0.01)
    assert not deleting.done()
    busy.set()
    await deleting
    assert held.result() is True
    assert names(memory) == []


def test_sqlite_threads_are_followed(memory: AgentMemory, tmp_path: Path) -> None:
    with SqliteSaver.from_conn_string(str(tmp_path / "c.db")) as saver:
        follow(saver, memory)
        begin(memory, saver, "a", "b")
        saver.delete_thread("a")
        assert names(memory) == ["b"]
        with pytest.raises(NotImplementedError):
            saver.copy_thread("b", "c")
        assert names(memory) == ["b"]


async def test_async_sqlite_threads_are_followed_from_both_sides(memory: AgentMemory, tmp_path: Path) -> None:
    async with AsyncSqliteSaver.from_conn_string(str(tmp_path / "c.db")) as saver:
        follow(saver, memory)
        for name in ("a", "b", "c"):
            begin(memory, None, name)
            await saver.aput(config(name), empty_checkpoint(), {"source": "input", "step": -1}, {})
        await saver.adelete_thread("a")
        await asyncio.to_thread(saver.delete_thread, "b")
        assert names(memory) == ["c"]


def test_a_checkpointer_that_fails_leaves_the_session(memory: AgentMemory, tmp_path: Path) -> None:
    with SqliteSaver.from_conn_string(str(tmp_path / "c.db")) as saver:
        follow(saver, memory)
        begin(memory, saver, "a")
    with pytest.raises(Exception, match="closed database"):
        saver.delete_thread("a")
    assert names(memory) == ["a"]


def test_a_memory_that_is_closed_says_so() -> None:
    memory = AgentMemory(cache_dir=None)
    saver = follow(InMemorySaver(), memory)
    begin(memory, saver, "a")
    memory.close()
    with pytest.raises(EngineStopped):
        saver.delete_thread("a")
    assert saver.get_tuple(config("a")) is None


def test_namespaces_and_memories_follow_for_themselves(memory: AgentMemory) -> None:
    with AgentMemory(cache_dir=None) as other:
        saver = follow(follow(follow(InMemorySaver(), memory), memory, "mine"), other)
        for where, namespace in (
            (memory, "default"),
            (memory, "mine"),
            (memory, "yours"),
            (other, "default"),
        ):
            begin(where, saver, "a", "b", namespace=namespace)
        saver.delete_thread("a")
        assert [names(memory, n) for n in ("default", "mine", "yours")] == [["b"], ["b"], ["a", "b"]]
        assert names(other) == ["b"]


def test_following_twice_wraps_once(memory: AgentMemory) -> None:
    saver = follow(InMemorySaver(), memory)
    wrapped = saver.delete_thread
    assert follow(saver, memory).delete_thread == wrapped


def test_a_copy_of_a_checkpointer_deletes_in_the_copy(memory: AgentMemory) -> None:
    saver = follow(InMemorySaver(), memory)
    begin(memory, saver, "a")
    twin = copy.deepcopy(saver)
    twin.delete_thread("a")
    assert twin.get_tuple(config("a")) is None
    assert saver.get_tuple(config("a")) is not None
    assert names(memory) == []


def test_threads_whose_session_was_never_on_this_engine_cost_nothing(tmp_path: Path) -> None:
    """Following and deleting load no model."""
    with AgentMemory(model="no/such/model", cache_dir=tmp_path / "caches") as memory:
        saver = follow(InMemorySaver(), memory)
        saver.delete_thread("a")
        assert not memory._thread.started


# Copying and pruning


def test_a_copied_thread_knows_what_the_old_one_knew(memory: AgentMemory) -> None:
    saver = follow(FullSaver(), memory)
    begin(memory, saver, "a")
    before = memory.stats().memory.blocks
    saver.copy_thread("a", "b")
    saver.copy_thread(source_thread_id="a", target_thread_id="b")
    saver.copy_thread("a", "a")
    saver.copy_thread("no such", "c")
    assert names(memory) == ["a", "b"]
    assert memory.stats().memory.blocks == before
    saver.delete_thread("a")
    assert names(memory) == ["b"]


async def test_threads_are_copied_and_pruned_in_coroutines(memory: AgentMemory) -> None:
    saver = follow(FullSaver(), memory)
    begin(memory, saver, "a")
    await saver.acopy_thread("a", "b")
    await saver.acopy_thread("a", "b")
    assert names(memory) == ["a", "b"]
    await saver.aprune(["a", "b"])
    assert names(memory) == ["a", "b"]
    await saver.aprune(["a"], strategy="delete")
    assert names(memory) == ["b"]


def test_pruning_deletes_only_where_it_says_so(memory: AgentMemory) -> None:
    saver = follow(FullSaver(), memory)
    begin(memory, saver, "a", "b", "c")
    saver.prune(["a"])
    saver.prune(["a", "b"], strategy="keep_latest")
    assert names(memory) == ["a", "b", "c"]
    saver.prune(("a", "b"), strategy="delete")
    assert names(memory) == ["c"]


@pytest.mark.parametrize("coroutine", [False, True])
async def test_a_thread_without_runs_left_is_forgotten(memory: AgentMemory, coroutine: bool) -> None:
    saver = follow(FullSaver(), memory)
    begin(memory, saver, "a", "b", run="one")
    begin(memory, saver, "b", "c", run="two")
    if coroutine:
        await saver.adelete_for_runs(["one"])
    else:
        saver.delete_for_runs(run_ids=["one"])
    assert names(memory) == ["b", "c"]


# Reconciling


def test_threads_that_vanished_elsewhere_are_forgotten_and_named(memory: AgentMemory, tmp_path: Path) -> None:
    place = str(tmp_path / "c.db")
    with SqliteSaver.from_conn_string(place) as saver, SqliteSaver.from_conn_string(place) as elsewhere:
        follow(saver, memory)
        begin(memory, saver, "a", "b")
        begin(memory, None, "chosen by the user")
        elsewhere.delete_thread("a")
        assert reconcile(saver, memory) == ["a"]
        assert reconcile(saver, memory) == []
        assert names(memory) == ["b", "chosen by the user"]


def test_ids_that_are_threads_by_the_callers_word(memory: AgentMemory) -> None:
    begin(memory, None, "a", "b", "mine")
    begin(memory, None, "a", namespace="other")
    restarted = InMemorySaver()
    begin(memory, restarted, "b")
    assert reconcile(restarted, memory, session_ids=["a", "b", "no session"]) == ["a"]
    assert names(memory) == ["b", "mine"]
    assert names(memory, "other") == ["a"]


def test_what_was_a_thread_is_not_guessed(memory: AgentMemory) -> None:
    begin(memory, None, "a")
    with pytest.raises(InvalidRequest, match="session_ids"):
        reconcile(InMemorySaver(), memory)
    with pytest.raises(InvalidRequest, match="follow"):
        reconcile(follow(InMemorySaver(), memory), memory, "other")
    assert reconcile(follow(InMemorySaver(), memory), memory) == []
    assert names(memory) == ["a"]


def test_after_a_restart_the_sessions_that_were_threads_are_known(tmp_path: Path) -> None:
    place, store = str(tmp_path / "c.db"), tmp_path / "store"
    llm = ChatMLXPersistent(model="tiny-chat", cache_dir=store, max_tokens=2)
    with SqliteSaver.from_conn_string(place) as saver:
        for thread in ("a", "b", "both"):
            llm.invoke("Hello.", config(thread))
            saver.put(config(thread), empty_checkpoint(), {"source": "input", "step": -1}, {})
        llm.invoke("Hello.", session_id="chosen by the user")
        llm.invoke("Hello. I am Ada.", session_id="both")
    llm.memory.close()
    with (
        AgentMemory(model="tiny-chat", cache_dir=store) as later,
        SqliteSaver.from_conn_string(place) as saver,
    ):
        for thread in ("a", "both"):
            saver.delete_thread(thread)
        assert reconcile(follow(saver, later), later) == ["a"]
        assert names(later) == ["b", "both", "chosen by the user"]


async def test_reconciling_in_coroutines(memory: AgentMemory, tmp_path: Path) -> None:
    async with AsyncSqliteSaver.from_conn_string(str(tmp_path / "c.db")) as saver:
        follow(saver, memory)
        for name in ("a", "b"):
            begin(memory, None, name)
            await saver.aput(config(name), empty_checkpoint(), {"source": "input", "step": -1}, {})
        await saver.conn.execute("DELETE FROM checkpoints WHERE thread_id = 'a'")
        assert await areconcile(saver, memory) == ["a"]
        assert await areconcile(saver, memory, session_ids=["b"]) == []
        assert names(memory) == ["b"]


def test_without_the_framework_the_extra_is_named() -> None:
    program = (
        "import sys\n"
        "sys.modules[sys.argv[1]] = None\n"
        "try: __import__(sys.argv[2])\n"
        "except ImportError as error: print(error)\n"
    )
    for blocked, module, extra in (
        ("langgraph.checkpoint.base", "langgraph", "langgraph"),
        ("langchain.agents.middleware", "middleware", "agents"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", program, blocked, f"langchain_agent_memory.{module}"],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        assert f"agent-memory-mlx[{extra}]" in done.stdout
