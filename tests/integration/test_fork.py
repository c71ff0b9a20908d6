"""A forked child is told that its engines are gone; the parent goes on as if nothing had happened."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

# In a process of its own: forking one with threads is a warning on newer Pythons, and warnings are errors here.
PARENT = """
    import os, sys, threading, warnings
    warnings.simplefilter("ignore", DeprecationWarning)
    from agent_memory_core import AgentMemory, EngineStopped

    q = [{{"role": "user", "content": "Hello."}}]
    memory = AgentMemory(model={model!r}, cache_dir=sys.argv[1], min_free_mb=0, memory_budget_mb=64)

    def told(call):
        try:
            got = call()
        except EngineStopped as error:
            assert "spawn" in str(error), error
        else:
            raise AssertionError(f"{{got!r}} is no EngineStopped")

    def in_child(body, ends=os._exit):
        pid = os.fork()
        if pid == 0:
            try:
                body()
            except BaseException:
                import traceback
                traceback.print_exc()
                os._exit(1)
            ends(0)
        assert os.waitpid(pid, 0)[1] == 0, "the child failed"
"""


def run(body: str, llama: str, tmp_path: Path) -> None:
    program = textwrap.dedent(PARENT.format(model=llama)) + textwrap.dedent(body)
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "store")],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("ends", ["os._exit", "sys.exit"])
def test_every_call_in_the_child_is_told_and_the_parent_goes_on(
    llama: str, tmp_path: Path, ends: str
) -> None:
    run(
        f"""
        first = memory.chat(q, session="s", max_tokens=4)

        def body():
            told(lambda: memory.chat(q, session="s"))
            told(lambda: memory.chat(q, session="s", stream=True))
            told(lambda: memory.prewarm(q, session="s"))
            told(memory.sessions)
            told(lambda: memory.fork("s", "t"))
            told(lambda: memory.pin("s"))
            told(lambda: memory.forget("s"))
            told(memory.stats)
            told(lambda: memory.count_tokens(q))
            told(memory.load)
            assert memory.closed
            told(lambda: AgentMemory(model={llama!r}, cache_dir=None).chat(q))
            memory.close()

        in_child(body, {ends})
        assert memory.chat(q, session="s", max_tokens=4).token_ids == first.token_ids
        assert [info.session_id for info in memory.sessions()] == ["s"]
        memory.close()
        """,
        llama,
        tmp_path,
    )


def test_with_a_turn_in_flight_its_reader_in_the_child_is_told(llama: str, tmp_path: Path) -> None:
    run(
        """
        stream = memory.chat(q, session="s", max_tokens=300, stream=True)
        parts = [next(stream)]
        readers = [threading.Thread(target=lambda: parts.extend(stream))]
        readers[0].start()

        def body():
            told(lambda: next(stream))
            told(memory.sessions)
            stream.close()
            memory.close()

        for ends in (os._exit, sys.exit):
            in_child(body, ends)
        readers[0].join()
        assert stream.report is not None and stream.report.persisted
        assert sum(len(part.token_ids) for part in parts) >= 290
        assert [info.session_id for info in memory.sessions()] == ["s"]
        memory.close()
        """,
        llama,
        tmp_path,
    )


def test_a_coroutine_in_the_child_is_told_too(llama: str, tmp_path: Path) -> None:
    run(
        """
        import asyncio

        memory.load()

        def body():
            async def ask():
                return await memory.achat(q)
            told(lambda: asyncio.run(ask()))

        in_child(body)
        memory.close()
        """,
        llama,
        tmp_path,
    )


def test_a_memory_that_was_never_asked_works_in_the_child(llama: str, tmp_path: Path) -> None:
    run(
        """
        assert memory.sessions() == []

        def body():
            assert memory.chat(q, session="child", max_tokens=2).token_ids
            assert [info.session_id for info in memory.sessions()] == ["child"]
            memory.close()

        in_child(body)
        in_child(body, sys.exit)
        assert [info.session_id for info in memory.sessions()] == ["child"]
        memory.close()
        """,
        llama,
        tmp_path,
    )


def test_a_child_of_multiprocessing_is_told(llama: str, tmp_path: Path) -> None:
    run(
        """
        import multiprocessing

        memory.chat(q, session="s", max_tokens=2)

        def body():
            told(lambda: memory.chat(q))
            told(memory.stats)

        child = multiprocessing.get_context("fork").Process(target=body)
        child.start()
        child.join()
        assert child.exitcode == 0
        memory.close()
        """,
        llama,
        tmp_path,
    )
