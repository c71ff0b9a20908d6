"""Many callers at once get what each would have got alone, and the interpreter ends cleanly."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support import engine_driver

from agent_memory_core import AgentMemory, ChatResult

pytestmark = pytest.mark.usefixtures("all_cores")

Open = Callable[..., engine_driver.Driver]
TURNS = 3
CALLERS = 8


def question(caller: int, turn: int) -> dict[str, str]:
    return {"role": "user", "content": f"Caller {caller}, turn {turn}: " + str(caller) * (5 + 4 * caller)}


def alone(memory: AgentMemory, caller: int, session: str) -> list[tuple[int, ...]]:
    history: engine_driver.History = []
    answers = []
    for turn in range(TURNS):
        history.append(question(caller, turn))
        result = memory.chat(history, session=session, max_tokens=6 + caller)
        answers.append(result.token_ids)
        history.append({"role": "assistant", "content": result.text})
    return answers


async def with_tasks(memory: AgentMemory, caller: int, session: str) -> list[tuple[int, ...]]:
    history: engine_driver.History = []
    answers = []
    for turn in range(TURNS):
        history.append(question(caller, turn))
        if caller % 2:
            result: ChatResult = await memory.achat(history, session=session, max_tokens=6 + caller)
            text, ids = result.text, result.token_ids
        else:
            deltas = [
                d
                async for d in await memory.achat(
                    history, session=session, stream=True, max_tokens=6 + caller
                )
            ]
            text, ids = "".join(d.text for d in deltas), tuple(t for d in deltas for t in d.token_ids)
        answers.append(ids)
        history.append({"role": "assistant", "content": text})
    return answers


def test_8_threads_and_8_tasks_answer_as_when_alone(llama: str, open_driver: Open, tmp_path: Path) -> None:
    lonely = open_driver(llama, cache_dir=tmp_path / "lonely").memory
    expected = [alone(lonely, caller, f"s{caller}") for caller in range(2 * CALLERS)]
    crowded = open_driver(llama, cache_dir=tmp_path / "crowded").memory

    async def tasks() -> list[list[tuple[int, ...]]]:
        return await asyncio.gather(*(with_tasks(crowded, CALLERS + c, f"task{c}") for c in range(CALLERS)))

    with ThreadPoolExecutor(CALLERS + 1) as pool:
        threads = [pool.submit(alone, crowded, c, f"thread{c}") for c in range(CALLERS)]
        from_tasks = pool.submit(lambda: asyncio.run(tasks())).result()
        from_threads = [thread.result() for thread in threads]
    assert from_threads + from_tasks == expected
    assert crowded.stats().running == 0


def test_8_turns_at_once_in_one_session_each_get_their_own_answer(
    llama: str, open_driver: Open, tmp_path: Path
) -> None:
    lonely = open_driver(llama, cache_dir=None).memory
    expected = [lonely.chat([question(c, 0)], max_tokens=6).token_ids for c in range(CALLERS)]
    memory = open_driver(llama).memory
    with ThreadPoolExecutor(CALLERS) as pool:
        got = list(
            pool.map(
                lambda c: memory.chat([question(c, 0)], session="one", max_tokens=6).token_ids, range(CALLERS)
            )
        )
    assert got == expected
    assert memory.sessions()[0].branches == CALLERS


def test_a_seed_gives_the_same_answer_alone_and_in_a_crowd(llama: str, open_driver: Open) -> None:
    # Unrounded, since a prompt's second run starts from its stored form.
    memory = open_driver(llama, kv_bits=None).memory
    sampling: dict[str, Any] = {
        "temperature": 1.0,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.01,
        "repetition_penalty": 1.1,
    }

    def draw(seed: int) -> tuple[int, ...]:
        result: ChatResult = memory.chat([question(3, 0)], seed=seed, max_tokens=12, **sampling)
        return result.token_ids

    alone_ = [draw(seed) for seed in range(6)]
    assert len(set(alone_)) == 6
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(draw, range(6))) == alone_


EXITS = {
    "closed": "memory.chat(q, session='s', max_tokens=4); memory.close()",
    "left open": "memory.chat(q, session='s', max_tokens=4)",
    "sampled": "memory.chat(q, session='s', max_tokens=4, temperature=1.0, top_p=0.9, top_k=9)",
    "mid-stream": "s = memory.chat(q, session='s', max_tokens=900, stream=True); next(s)",
    "while it loads": "s = memory.chat(q, session='s', max_tokens=900, stream=True)",
    "never used": "pass",
}
"""What a program does last, by how it ends."""


@pytest.mark.slow
@pytest.mark.parametrize("tries", [1, pytest.param(4, marks=pytest.mark.heavy)])
def test_the_interpreter_ends_cleanly_each_time(llama: str, tmp_path: Path, tries: int) -> None:
    """Two processes at a time."""
    code = (
        "import sys; from agent_memory_core import AgentMemory; q = [{'role': 'user', 'content': 'Hi'}]\n"
        f"memory = AgentMemory(model={llama!r}, cache_dir=sys.argv[1], min_free_mb=0)\n"
    )

    def run(job: tuple[str, int]) -> tuple[str, int, str]:
        way, number = job
        store = str(tmp_path / f"{way}-{number}".replace(" ", "-"))
        done = subprocess.run(
            [sys.executable, "-W", "error::ResourceWarning", "-c", code + EXITS[way], store],
            capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        return way, done.returncode, done.stderr

    jobs = [(way, number) for way in EXITS for number in range(tries)]
    with ThreadPoolExecutor(2) as pool:
        for way, code_, stderr in pool.map(run, jobs):
            assert (code_, stderr) == (0, ""), way


FAILURES: dict[str, Callable[[Path], object]] = {
    "no folder": lambda folder: folder.rename(folder.with_name("elsewhere")),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "no tokenizer": lambda folder: (folder / "tokenizer.json").write_text("{"),
}
"""What makes a model fail to load: before MLX is imported, with weights in memory, and between."""


@pytest.mark.parametrize("way", FAILURES)
def test_a_process_whose_model_cannot_be_loaded_ends_with_its_own_code(
    llama: str, tmp_path: Path, way: str
) -> None:
    """A thread that ran MLX and is still leaving it when the interpreter goes would abort the process."""
    folder = tmp_path / "model"
    shutil.copytree(llama, folder)
    FAILURES[way](folder)
    code = (
        "import sys; from agent_memory_core import AgentMemory, ModelError\n"
        "memory = AgentMemory(model=sys.argv[1], cache_dir=sys.argv[2], min_free_mb=0)\n"
        "try: memory.chat([{'role': 'user', 'content': 'Hi'}], session='s')\n"
        "except ModelError: sys.exit(7)\n"
    )
    command = [sys.executable, "-c", code, str(folder), str(tmp_path / "store")]
    for _ in range(3):
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert (done.returncode, done.stderr) == (7, "")


ORDER = """
import atexit, sys
names, real = [], atexit.register
def register(function, *args, **kwargs):
    names.append(getattr(function, "__name__", ""))
    return real(function, *args, **kwargs)
atexit.register = register
from agent_memory_core import AgentMemory, ModelNotFound
question = [{"role": "user", "content": "Hi"}]
try: AgentMemory(model="./none", cache_dir=None).chat(question)
except ModelNotFound: assert "mlx.core" not in sys.modules
AgentMemory(model=sys.argv[1], cache_dir=None, min_free_mb=0).chat(question, max_tokens=2)
print(names[-1])
"""


def test_engines_are_closed_before_mlx_cleans_up_also_if_one_failed_before_mlx_was_there(llama: str) -> None:
    """What was registered last runs first."""
    command = [sys.executable, "-c", ORDER, llama]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == ["_close_all"]
