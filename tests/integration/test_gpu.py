"""What matters on a GPU and can be counted on any machine: limits, waits, which thread touches memory, a lack of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from support import engine_driver

from agent_memory_core import AgentMemory, ChatRequest, Message, OutOfGpuMemory, SamplingParams, SessionKey
from agent_memory_core.config import EngineConfig
from agent_memory_core.engine import block_io
from agent_memory_core.models.loader import load_model

Open = Callable[..., engine_driver.Driver]
LACK = "[METAL] Command buffer execution failed: Insufficient Memory (kIOGPUCommandBufferCallbackErrorOutOfMemory)"


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


# Limits of MLX


@pytest.mark.parametrize("wired", ["off", "on"])
def test_no_turn_touches_the_wired_limit(llama: str, monkeypatch: pytest.MonkeyPatch, wired: str) -> None:
    calls: list[int] = []

    def set_wired_limit(nbytes: int) -> int:
        calls.append(nbytes)
        return 77

    info = {"max_recommended_working_set_size": 2**34, "architecture": "made up"}
    monkeypatch.setattr(mx, "device_info", lambda: info)
    monkeypatch.setattr(mx, "set_wired_limit", set_wired_limit)
    engine = stepped(llama, wired=wired)
    built = [] if wired == "off" else [2**34]
    assert calls == built
    for i, text in enumerate(("One.", "2. " * 300, "Three.", "4. " * 300)):  # two groups
        ids = engine.submit(request(text, 40), SessionKey(str(i)), engine_driver.RecordingSink())
    engine_driver.run(engine, lambda: len(engine.runner._groups) > 1)
    engine.cancel(ids)
    engine_driver.run(engine, lambda: not engine.busy)
    for _ in range(2):
        answer(engine, "Again.", "0")
    engine.submit(request("A fault.", 12), SessionKey("0"), engine_driver.RecordingSink())
    engine.step()
    engine.fail_all(RuntimeError("a fault"))
    engine.parity.verify(64, 2)
    assert calls == built
    engine.close()
    assert calls == ([] if wired == "off" else [2**34, 77])


def test_stats_tell_what_mlx_holds(llama: str) -> None:
    with AgentMemory(model=llama, cache_dir=None) as memory:
        memory.chat(said("Hello."), max_tokens=2)
        found = memory.stats().memory
        assert 0 < found.active_bytes <= found.peak_bytes
        assert found.cached_bytes >= 0


# The disk's threads


def test_a_block_is_read_with_one_evaluation_at_most(
    llama: str, open_driver: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = open_driver(llama)
    driver.turn(said("7" * 400), "s")
    driver.memory._thread.flush()
    driver.evict()
    evals: list[str] = []
    loads: list[Any] = []
    real_eval, real_load = mx.eval, driver.memory._open_store().load  # type: ignore[union-attr]

    def counted(*arrays: Any) -> None:
        evals.append(threading.current_thread().name)
        real_eval(*arrays)

    def load(*arguments: Any) -> Any:
        loads.append(real_load(*arguments))
        return loads[-1]

    monkeypatch.setattr(mx, "eval", counted)
    monkeypatch.setattr(driver.memory._store, "load", load)
    again = driver.turn(said("7" * 400), "s")
    assert again.tier == "warm"
    assert max(len(record.tensors) for record in loads) > 1
    assert 0 < evals.count("agent-memory-reader") <= len(loads)


def test_what_is_read_is_allocated_by_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    streams: list[Any] = []
    real = mx.zeros

    def zeros(*arguments: Any, **more: Any) -> mx.array:
        streams.append(more.get("stream"))
        return real(*arguments, **more)

    monkeypatch.setattr(mx, "zeros", zeros)
    assert block_io.memory_is_writable()
    assert streams == [mx.cpu]


def test_memory_of_a_block_is_only_touched_by_the_engine(
    llama: str, open_driver: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []
    real = block_io.to_record

    def to_record(block: Any) -> Any:
        threads.append(threading.get_ident())
        return real(block)

    monkeypatch.setattr(block_io, "to_record", to_record)
    driver = open_driver(llama)
    driver.turn(said("7" * 200), "s")
    driver.memory._thread.flush()
    assert threads
    assert set(threads) == {driver.engine(lambda engine: threading.get_ident())}


# A row that decodes by itself


def test_the_next_step_is_begun_before_a_token_is_handed_out(
    llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = stepped(llama)
    engine.runner.batches = False
    order: list[str] = []
    real = mx.async_eval

    def async_eval(*arrays: Any) -> None:
        order.append("begun")
        real(*arrays)  # type: ignore[no-untyped-call]

    monkeypatch.setattr(mx, "async_eval", async_eval)
    sink = Noted(order)
    engine.submit(request("Hello.", 6), SessionKey(None), sink)
    engine_driver.run(engine, lambda: not engine.busy)
    first = order.index("begun")
    assert order[first : first + 2] == ["begun", "begun"], "the first token, and the one after it"
    handed_out = [i for i, what in enumerate(order) if what == "token" and i > first]
    assert handed_out
    assert all(order[:i].count("begun") > order[first:i].count("token") for i in handed_out)
    engine.close()


# A lack of memory


class Failing:
    """A model that lacks memory in the forward passes that are asked for."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.fails: Callable[[mx.array], bool] = lambda ids: False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, ids: mx.array, **more: Any) -> mx.array:
        if self.fails(ids):
            self.fails = lambda ids: False
            raise RuntimeError(LACK)
        found: mx.array = self._model(ids, **more)
        return found


class Noted(engine_driver.RecordingSink):
    """Notes when it is given tokens."""

    def __init__(self, order: list[str]) -> None:
        super().__init__()
        self._order = order

    def deliver(self, delta: Any) -> None:
        self._order.extend("token" for _ in delta.token_ids)
        super().deliver(delta)


def stepped(llama: str, **settings: Any) -> engine_driver.SteppedEngine:
    config = EngineConfig(model=llama, cache_dir=None, block_tokens=64, **settings)
    return engine_driver.SteppedEngine(load_model(llama), config, 2**26, None)


def request(text: str, max_tokens: int) -> ChatRequest:
    return ChatRequest((Message("user", text),), sampling=SamplingParams(max_tokens=max_tokens))


@pytest.fixture
def lacking(llama: str) -> Iterator[tuple[engine_driver.SteppedEngine, Failing]]:
    engine = stepped(llama)
    model = Failing(engine.loaded.model)
    engine.runner._model = model
    yield engine, model
    engine.close()


def answer(engine: engine_driver.SteppedEngine, text: str, session: str | None = None) -> list[int]:
    sink = engine_driver.RecordingSink()
    engine.submit(request(text, 8), SessionKey(session), sink)
    engine_driver.run(engine, lambda: not engine.busy)
    assert sink.error is None
    return sink.token_ids


def test_a_prompt_that_the_gpu_has_no_memory_for_fails_alone(
    lacking: tuple[engine_driver.SteppedEngine, Failing],
) -> None:
    engine, model = lacking
    wanted = {text: answer(engine, text) for text in ("Hello there.", "7" * 300)}
    held = engine.pool.block_bytes
    assert held > 0
    other, failed = engine_driver.RecordingSink(), engine_driver.RecordingSink()
    engine.submit(request("Hello there.", 8), SessionKey(None), other)
    engine_driver.run(engine, lambda: bool(engine.runner.rows()))
    engine.evict()
    model.fails = lambda ids: ids.shape[1] > 1
    engine.submit(request("7" * 300, 8), SessionKey("s"), failed)
    engine_driver.run(engine, lambda: failed.error is not None)
    assert isinstance(failed.error, OutOfGpuMemory)
    assert engine.pool.block_bytes < held
    assert len(engine.turns) == 1, "the other goes on"
    engine_driver.run(engine, lambda: not engine.busy)
    assert (other.error, other.token_ids) == (None, wanted["Hello there."])
    assert answer(engine, "7" * 300, "s") == wanted["7" * 300]
    engine.scheduler.check()
    assert (engine.counters.failed, engine.pool.reserved) == (1, 0)


@pytest.mark.parametrize("batches", [True, False])
def test_a_decode_step_that_the_gpu_has_no_memory_for_fails_those_who_decode(
    lacking: tuple[engine_driver.SteppedEngine, Failing], batches: bool
) -> None:
    engine, model = lacking
    engine.runner.batches = batches
    wanted = answer(engine, "7" * 300)
    engine.evict()
    decoding, waiting = engine_driver.RecordingSink(), engine_driver.RecordingSink()
    engine.submit(request("Hello.", 30), SessionKey(None), decoding)
    engine_driver.run(engine, lambda: bool(engine.runner.rows()))
    engine.submit(request("7" * 300, 8), SessionKey(None), waiting)
    model.fails = lambda ids: ids.shape[1] == 1
    engine_driver.run(engine, lambda: decoding.error is not None)
    assert isinstance(decoding.error, OutOfGpuMemory)
    engine_driver.run(engine, lambda: not engine.busy)
    assert (waiting.error, waiting.token_ids) == (None, wanted)
    assert engine.runner.rows() == []


def test_the_logits_after_a_lack_of_memory_are_those_of_before(
    llama: str, open_driver: Open, tmp_path: Path
) -> None:
    driver = open_driver(llama)
    model = driver.engine(lambda engine: Failing(engine.loaded.model))
    driver.engine(lambda engine: setattr(engine.runner, "_model", model))
    before = driver.turn(said("7" * 300), None)
    driver.evict()
    model.fails = lambda ids: True
    with pytest.raises(OutOfGpuMemory, match="memory_budget_mb"):
        driver.turn(said("7" * 300), None)
    after = driver.turn(said("7" * 300), None)
    assert (after.logits, after.token_ids) == (before.logits, before.token_ids)
