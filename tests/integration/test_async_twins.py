"""Whatever a memory can be told and asked, a coroutine can, too, and the event loop goes on meanwhile."""

from __future__ import annotations

import asyncio
import inspect
import io
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from support import engine_driver

from agent_memory_core import AgentMemory, ChatStream, QueueFull, SessionNotFound
from agent_memory_core.storage.block_store import BlockStore

HELLO = [{"role": "user", "content": "Hello."}]

AT_ONCE = {"cipher", "history", "observe", "replace", "shared"}
"""Methods that wait for nothing: they hand out an object, or take one."""


def test_every_method_that_may_wait_has_a_twin_with_the_same_parameters() -> None:
    methods = dict(inspect.getmembers(AgentMemory, inspect.isfunction))
    public = {name for name in methods if not name.startswith("_")}
    twins = {name for name in public if inspect.iscoroutinefunction(methods[name])}
    assert {name.removeprefix("a") for name in twins} == public - twins - AT_ONCE
    for name in twins:
        twin, method = (inspect.signature(methods[n]) for n in (name, name.removeprefix("a")))
        assert twin.parameters == method.parameters, name
        assert twin.return_annotation.replace("Async", "") == method.return_annotation, name


async def test_coroutines_give_what_their_twins_give(
    llama: str, open_driver: Callable[..., engine_driver.Driver], tmp_path: Path
) -> None:
    memory = open_driver(llama).memory
    await memory.aload()
    assert await memory.acount_tokens(HELLO) == memory.count_tokens(HELLO)
    assert await memory.aencode("Hello.") == memory.encode("Hello.")
    await memory.achat(HELLO, session="a", max_tokens=4)
    await memory.aflush()
    assert await memory.asessions() == memory.sessions() != []
    assert await memory.abranches("a") == memory.branches("a")
    assert await memory.atranscript("a") == memory.transcript("a")
    await memory.afork("a", "b")
    await memory.apin("b")
    assert [info.pinned for info in memory.sessions() if info.session_id == "b"] == [True]
    carried = io.BytesIO()
    await memory.aexport_session("a", carried)
    carried.seek(0)
    assert await memory.aimport_session("c", carried) > 0
    assert await memory.aexport_prompt_cache("a", tmp_path / "a.safetensors") > 0
    assert await memory.aprune(0, dry_run=True) == memory.prune(0, dry_run=True) != []
    await memory.arelease("a")
    assert await memory.aforget("a")
    assert await memory.aforget_namespace("default") == 2
    assert (await memory.acheck()).clean
    assert (await memory.astats()).turns == 1
    assert await memory.aunload()
    with pytest.raises(SessionNotFound):
        await memory.abranches("a")
    async with memory:
        pass
    assert memory.closed


async def test_the_event_loop_goes_on_while_a_disk_takes_its_time(
    llama: str, open_driver: Callable[..., engine_driver.Driver], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = open_driver(llama).memory
    await memory.achat(HELLO, session="a", max_tokens=4)
    go = threading.Event()
    check = BlockStore.check

    def slow(store: BlockStore, fix: bool) -> object:
        assert go.wait(60)
        return check(store, fix)

    monkeypatch.setattr(BlockStore, "check", slow)
    checking = asyncio.ensure_future(memory.acheck())
    for _ in range(100):
        await asyncio.sleep(0)
    assert not checking.done()
    go.set()
    assert (await checking).clean


def test_whoever_comes_when_the_queue_is_full_is_told_and_the_others_are_answered(
    llama: str, open_driver: Callable[..., engine_driver.Driver]
) -> None:
    memory = open_driver(llama, max_waiting=1, max_batch_size=1).memory
    memory.load()
    streams: list[ChatStream] = []

    def ask() -> None:
        for _ in range(200):
            streams.append(memory.chat(HELLO, stream=True, max_tokens=8))

    with pytest.raises(QueueFull, match="max_waiting is 1"):
        ask()
    assert streams
    assert all(list(stream)[-1].report is not None for stream in streams)
    assert memory.chat(HELLO, max_tokens=4).report.usage.completion_tokens
